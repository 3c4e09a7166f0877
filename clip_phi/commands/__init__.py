"""The commands of clip-phi, one module per topic. Each module has add_to(commands), which adds its parsers."""
