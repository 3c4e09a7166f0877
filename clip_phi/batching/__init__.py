"""From Samples to a PackedBatch: token ids, the index, images, packs."""
