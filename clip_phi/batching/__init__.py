"""From Samples to the tensors that the model eats."""
