"""Private names of torch.distributed (2.11 to 2.13)."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

# Collectives that autograd goes through and torch.compile may trace; torch 2.13 renamed the gathers, with the same arguments.
all_gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
all_gather_autograd = getattr(collectives, "all_gather_single_autograd", None) or collectives.all_gather_tensor_autograd
all_to_all_autograd = collectives.all_to_all_single_autograd
wait_tensor = collectives.wait_tensor


def flatten(mesh: DeviceMesh, name: str) -> None:
    """Gives the group of all axes of `mesh` a name of its own in the mesh that it is a slice of."""
    mesh._flatten(name)


class Style(ParallelStyle):
    """A way to cut a module. torch's own extension point is a method with a private name."""

    def apply(self, module: Any, mesh: DeviceMesh) -> nn.Module:
        raise NotImplementedError

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return self.apply(module, device_mesh)


class ColumnStyle(ColwiseParallel):
    """torch's, with a method for how a layer's parameters are cut; and an output that is no DTensor (a loss) is left as it is."""

    def cut(self, module: Any, mesh: DeviceMesh) -> None:
        super()._partition_linear_fn("", module, mesh)

    def _partition_linear_fn(self, name: str, module: Any, device_mesh: DeviceMesh) -> None:
        self.cut(module, device_mesh)

    @staticmethod
    def _prepare_output_fn(output_layouts: Any, use_local_output: bool, mod: nn.Module, outputs: Any, device_mesh: DeviceMesh) -> Any:
        if not isinstance(outputs, DTensor):
            return outputs
        return ColwiseParallel._prepare_output_fn(output_layouts, use_local_output, mod, outputs, device_mesh)


class RowStyle(RowwiseParallel):
    """torch's, with a method for how a layer's parameters are cut."""

    def cut(self, module: Any, mesh: DeviceMesh) -> None:
        super()._partition_linear_fn("", module, mesh)

    def _partition_linear_fn(self, name: str, module: Any, device_mesh: DeviceMesh) -> None:
        self.cut(module, device_mesh)


def overlap_products_with_transfers(group_name: str) -> None:
    """Has torch.compile cut products before a scatter and after a gather into pieces that are sent while the next is computed."""
    import torch._inductor.config
    import torch.distributed._symmetric_memory as symmetric

    torch._inductor.config._micro_pipeline_tp = True
    enable = getattr(symmetric, "enable_symm_mem_for_group", None)
    if enable is not None and not hasattr(enable, "__deprecated__"):  # newer torch enables every group by itself
        enable(group_name)


def fake_store() -> Any:
    """For a process group of backend "fake", in which one process stands for many."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()
