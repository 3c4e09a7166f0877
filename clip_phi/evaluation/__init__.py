"""Judging: held-out loss, generated texts, scores."""
