"""The parts of training: options, data, model, checkpoints, log. The loop is train_accelerate.py."""
