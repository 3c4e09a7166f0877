"""The Hub: the model card, and pushing a model, and trying again when the Hub fails."""
