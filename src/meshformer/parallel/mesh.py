"""The device mesh: its named axes, outermost first, and groups of axes with names of their own.

    pipeline   each rank holds other layers
    replicate  each rank gets other samples and holds a replica of the parameters
    shard      each rank gets other samples and holds a shard of every parameter (FSDP)
    context    each rank gets another slice of every sequence
    tensor     each rank computes a part of every matrix product

The tensor axis is innermost, so its ranks are consecutive: it communicates most and should stay inside a node.
"""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from meshformer.compat.torch_distributed import flatten
from meshformer.config.degrees import Degrees

AXES = ("pipeline", "replicate", "shard", "context", "tensor")
GROUPS_OF_AXES = {"data_parallel": ("replicate", "shard"), "sharded": ("shard", "context"), "tokens": ("replicate", "shard", "context")}


def make_mesh(degrees: Degrees, device_type: str) -> DeviceMesh:
    """The mesh of all processes, with three flattened groups of axes.

    `data_parallel` = replicate × shard: ranks with different samples (Lightning's name). `sharded` = shard × context: FSDP shards parameters over
    both, since context ranks would otherwise hold replicas. `tokens` = replicate × shard × context: losses and token counts are summed over it.
    """
    mesh = init_device_mesh(device_type, tuple(getattr(degrees, axis) for axis in AXES), mesh_dim_names=AXES)
    for name, axes in GROUPS_OF_AXES.items():
        flatten(mesh[axes], name)
    return mesh
