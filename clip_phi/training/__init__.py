"""Parts of the training loop: options, model, data, checkpoints, logs. The loop is in train_accelerate.py."""
