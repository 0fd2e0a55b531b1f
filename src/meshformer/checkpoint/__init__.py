"""Save, find, verify and read checkpoints by tensor name, in one format for every layout."""
