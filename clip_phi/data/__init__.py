"""Readers: files in the layouts people have, to Samples."""
