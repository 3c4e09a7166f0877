"""The commands of clip-phi, one module per topic. commands.json lists them, and options.json their options."""
