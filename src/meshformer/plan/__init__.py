"""Predicts step time and memory of every layout on a cluster, and measures the memory of a few without running them."""
