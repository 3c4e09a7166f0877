"""Held-out loss, generated answers, their scores, and the controls without the image."""
