"""Evaluation: held-out loss, generated answers, scores and their controls."""
