"""Small models cut by torch's own FSDP2 and tensor parallel, whose pieces are the truth that checkpoints are held against."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

# name -> sizes of its axes (replicate, shard, tensor). 7 rows and 5 are uneven over 2, 3 and 4 processes; the gain of 3 leaves some without any.
LAYOUTS = {
    "one": (1, 1, 1),
    "shard 2": (1, 2, 1),
    "shard 4": (1, 4, 1),
    "replicate 2, shard 2": (2, 2, 1),
    "tensor 2": (1, 1, 2),
    "shard 2, tensor 2": (1, 2, 2),
    "replicate 2, shard 1, tensor 2": (2, 1, 2),
    "shard 3, tensor 2": (1, 3, 2),  # here torch's placements name other rows than FSDP cut
}


def processes(layout: str) -> int:
    replicate, shard, tensor = LAYOUTS[layout]
    return replicate * shard * tensor


class Net(nn.Module):
    def __init__(self, value: Any = None):
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 5, bias=False)
        self.gain = nn.LayerNorm(3, bias=False)
        for number, p in enumerate(self.parameters()):
            with torch.no_grad():
                p.copy_(torch.arange(p.numel()).view(p.shape) + 100.0 * number if value is None else torch.full(p.shape, value))


class _Whole(ParallelStyle):
    """Parameters as DTensors that every rank of the tensor axis holds."""

    def _apply(self, module: nn.Module, mesh: Any) -> nn.Module:
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(DTensor.from_local(p.data, mesh, [Replicate()], run_check=False)))
        return module


def cut(net: Net, layout: str) -> Net:
    """`net`, the same on every rank, in pieces."""
    if layout == "one":
        return net
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", LAYOUTS[layout], mesh_dim_names=("replicate", "shard", "tensor"))
    replicate, shard, tensor = LAYOUTS[layout]
    if tensor > 1:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel(), "gain": _Whole()}
        parallelize_module(net, mesh["tensor"], plan, src_data_rank=None)
    if replicate * shard > 1:
        fully_shard(net, mesh=mesh["replicate", "shard"] if replicate > 1 else mesh["shard"])
    return net


def states(net: Net) -> dict[str, Tensor]:
    return {f"model.{name}": p.detach() for name, p in net.named_parameters()}


def differing(got: dict[str, Tensor], expected: dict[str, Tensor]) -> Iterator[str]:
    """Names whose tensors, or this rank's pieces of them, are not the same to the last bit."""
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        pieces = [y.to_local() if isinstance(y, DTensor) else y for y in (got[name], x)]
        if pieces[0].dtype != pieces[1].dtype or not torch.equal(*pieces):
            yield name
