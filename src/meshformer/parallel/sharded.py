"""Fully sharded data parallelism: each rank keeps a shard of every parameter, gradient and optimizer state, and all-gathers a block's
parameters only while it computes with them (FSDP2; Zhao et al. 2023; ZeRO stage 3, Rajbhandari et al. 2020). With a `replicate` axis: HSDP."""

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
    """Shards `root` in place over `mesh` (one axis, or replicate × shard): one FSDP unit per block, and one for all other parameters.

    `strategy["param_dtype"]`: dtype in which parameters are all-gathered and used; `strategy["reduce_dtype"]`: dtype in which gradients are summed
    over micro-batches and ranks (null: unchanged). The sharded parameters keep their dtype. Inputs are not cast: under bf16-mixed, autocast is on
    as in one process, so the residual stream, norms and loss stay in fp32, and parameters gathered in bf16 need no further cast.
    `reshard_after_forward`: free a block's full parameters after its forward pass and gather them again for the backward pass.
    """
    types = MixedPrecisionPolicy(
        param_dtype=DTYPES[strategy["param_dtype"]], reduce_dtype=DTYPES[strategy["reduce_dtype"]], cast_forward_inputs=False
    )
    offload = CPUOffloadPolicy() if strategy["cpu_offload"] else OffloadPolicy()
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=types, offload_policy=offload, reshard_after_forward=reshard_after_forward)
    fully_shard(root, mesh=mesh, mp_policy=types, offload_policy=offload, reshard_after_forward=False)  # the backward pass needs it first


@contextmanager
def without_reduction(module: nn.Module) -> Iterator[None]:
    """Like DDP's no_sync: backward passes inside accumulate unsharded gradients; the first one after it reduces the sum."""
    roots = [m for m in module.modules() if isinstance(m, FSDPModule)]
    for m in roots:
        m.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        for m in roots:
            m.set_requires_gradient_sync(True, recurse=False)


def reshard(module: nn.Module) -> None:
    """Frees full parameters, which a forward pass without a backward pass leaves behind, so that `named_parameters` returns the shards."""
    for m in module.modules():
        if isinstance(m, FSDPModule):
            m.reshard()
