"""Save, find and read checkpoints by tensor name."""
