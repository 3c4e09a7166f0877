"""Checks before a run: data, memory and the machine."""
