"""The commands of clip-phi, one module a topic. Each has add_to(commands), which adds its parsers."""
