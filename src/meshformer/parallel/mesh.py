"""The device mesh: named axes over the processes, and the groups of axes that belong together.

    pipeline   which layers a process holds
    replicate  copies that see different samples
    shard      processes that see different samples and each keep a part of every parameter (FSDP)
    context    processes that see different parts of each sequence
    tensor     processes that share every matrix product

Processes that are neighbours in the tensor axis have neighbouring ranks, so that the chattiest axis stays inside a machine.
"""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from meshformer.compat.torch_distributed import flatten
from meshformer.config.degrees import Degrees

AXES = ("pipeline", "replicate", "shard", "context", "tensor")


def make_mesh(degrees: Degrees, device_type: str) -> DeviceMesh:
    """The mesh of all processes, with three groups of axes under names of their own.

    `data_parallel` = replicate × shard: who sees which samples (Lightning's name). `sharded` = shard × context: over these FSDP cuts parameters,
    since both would otherwise hold copies. `tokens` = replicate × shard × context: over these losses and token counts are summed.
    """
    mesh = init_device_mesh(device_type, tuple(getattr(degrees, axis) for axis in AXES), mesh_dim_names=AXES)
    flatten(mesh["replicate", "shard"], "data_parallel")
    flatten(mesh["shard", "context"], "sharded")
    flatten(mesh["replicate", "shard", "context"], "tokens")
    return mesh
