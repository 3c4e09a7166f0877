"""The Hub: the model card, and pushing a run so that it loads anywhere."""
