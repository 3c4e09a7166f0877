"""Serving a trained model: the engine, the HTTP API, the chat page."""
