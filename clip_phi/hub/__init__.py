"""The Hub: the model card, pushing a model, and retries."""
