"""The commands of clip-phi, a module a topic. Each has add_to(commands), which adds its parsers."""
