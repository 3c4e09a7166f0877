"""Pushing a model to the Hub, with its model card."""
