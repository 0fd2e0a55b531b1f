"""What a run would need, computed without running it."""
