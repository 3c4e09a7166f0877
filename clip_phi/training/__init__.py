"""What is learnt and how: arguments, optimizer, progress. The loop itself is train_accelerate.py."""
