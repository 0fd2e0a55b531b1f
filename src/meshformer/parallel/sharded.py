"""Fully sharded data parallel: each rank keeps a part of every parameter, gradient and optimizer state, and gathers a block's parameters
for the moment it computes with them (FSDP2; Zhao et al. 2023, Rajbhandari et al. 2020, ZeRO stage 3). With a `replicate` axis: HSDP."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, None: None}


def shard(root: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh, strategy: dict[str, Any], reshard_after_forward: bool) -> None:
    """Shards `root` in place over `mesh` (one axis, or replicate × shard), block by block, the rest with the root.

    `strategy["param_dtype"]` is what parameters are gathered and computed in, `strategy["reduce_dtype"]` what gradients are summed in, over
    micro-batches and ranks (null: as they come); the parameters themselves stay as they are. Inputs do too: with bf16-mixed autocast is on as
    in one process, so the residual stream, norms and loss keep their fp32, and parameters that arrive in bf16 are not cast again.
    `reshard_after_forward`: free a block's whole parameters after its forward pass and gather them again for the backward pass.
    """
    types = MixedPrecisionPolicy(
        param_dtype=DTYPES[strategy["param_dtype"]], reduce_dtype=DTYPES[strategy["reduce_dtype"]], cast_forward_inputs=False
    )
    offload = CPUOffloadPolicy() if strategy["cpu_offload"] else OffloadPolicy()
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=types, offload_policy=offload, reshard_after_forward=reshard_after_forward)
    fully_shard(root, mesh=mesh, mp_policy=types, offload_policy=offload, reshard_after_forward=False)  # the backward pass starts with it


@contextmanager
def without_reduction(module: nn.Module) -> Iterator[None]:
    """Backward passes inside accumulate whole gradients on each rank; the next one outside reduces the sum."""
    roots = [m for m in module.modules() if isinstance(m, FSDPModule)]
    for m in roots:
        m.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        for m in roots:
            m.set_requires_gradient_sync(True, recurse=False)


def reshard(module: nn.Module) -> None:
    """Frees whole parameters that an evaluation left behind, so that `named_parameters` shows the shards."""
    for m in module.modules():
        if isinstance(m, FSDPModule):
            m.reshard()
