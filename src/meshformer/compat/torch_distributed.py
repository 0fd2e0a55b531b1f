"""Private names of torch.distributed (2.11 to 2.13)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

# Functional collectives: differentiable (`_autograd`) and traceable by torch.compile. torch 2.13 renamed the all-gathers.
all_gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
all_gather_autograd = getattr(collectives, "all_gather_single_autograd", None) or collectives.all_gather_tensor_autograd
all_to_all_autograd = collectives.all_to_all_single_autograd
wait_tensor = collectives.wait_tensor


def flatten(mesh: DeviceMesh, name: str) -> None:
    """Flattens the axes of `mesh`, a slice of a larger mesh, into one axis called `name` of the larger mesh."""
    mesh._flatten(name)


@register_sharding(torch.ops.aten._is_any_true.default)
def _any_true(x: Any) -> list[Any]:
    """How trainer.detect_anomaly looks for NaNs in a sharded gradient: in the whole of it. torch gives this operator no strategy of its own."""
    return [([Replicate()], [Replicate()])]


class Style(ParallelStyle):
    """A ParallelStyle to subclass: `apply` shards a module. torch's extension point `_apply` is private."""

    def apply(self, module: Any, mesh: DeviceMesh) -> nn.Module:
        raise NotImplementedError(f"{type(self).__name__} must define this method")

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return self.apply(module, device_mesh)


class ColumnStyle(ColwiseParallel):
    """ColwiseParallel with an overridable `partition` of the parameters. An output that is not a DTensor (a loss) is returned unchanged."""

    def partition(self, module: Any, mesh: DeviceMesh) -> None:
        super()._partition_linear_fn("", module, mesh)

    def _partition_linear_fn(self, name: str, module: Any, device_mesh: DeviceMesh) -> None:
        self.partition(module, device_mesh)

    @staticmethod
    def _prepare_output_fn(output_layouts: Any, use_local_output: bool, mod: nn.Module, outputs: Any, device_mesh: DeviceMesh) -> Any:
        if not isinstance(outputs, DTensor):
            return outputs
        return ColwiseParallel._prepare_output_fn(output_layouts, use_local_output, mod, outputs, device_mesh)


class RowStyle(RowwiseParallel):
    """RowwiseParallel with an overridable `partition` of the parameters."""

    def partition(self, module: Any, mesh: DeviceMesh) -> None:
        super()._partition_linear_fn("", module, mesh)

    def _partition_linear_fn(self, name: str, module: Any, device_mesh: DeviceMesh) -> None:
        self.partition(module, device_mesh)


# The option of torch.compile with which it splits matrix products next to an all-gather or reduce-scatter into chunks, and overlaps both.
ASYNC_TENSOR_PARALLEL = {"_micro_pipeline_tp": True}


def enable_symmetric_memory(group_name: str) -> None:
    """What ASYNC_TENSOR_PARALLEL needs for a process group."""
    import torch.distributed._symmetric_memory as symmetric

    enable = getattr(symmetric, "enable_symm_mem_for_group", None)
    if enable is not None and not hasattr(enable, "__deprecated__"):  # newer versions of torch enable every group by default
        enable(group_name)


def init_fake_process_group(rank: int, world_size: int) -> None:
    """Makes this process rank `rank` of a group that communicates with nobody: many ranks, simulated one at a time."""
    import torch.testing._internal.distributed.fake_pg

    torch.distributed.init_process_group("fake", rank=rank, world_size=world_size, store=torch.distributed.HashStore())
