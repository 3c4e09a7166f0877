"""Readers of the common data formats. Each yields Samples and counts damaged records."""
