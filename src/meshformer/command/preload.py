"""What a server imports before it forks the processes of a job."""

from meshformer.importing import heavy_imports

with heavy_imports():
    import torch.distributed.launcher.api  # noqa: F401

    import meshformer.command.launch
    import meshformer.job.train  # noqa: F401
