"""The work of a job's processes: build the objects, then train, evaluate, generate, export or convert."""
