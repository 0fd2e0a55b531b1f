"""Builds the Lightning strategy of a `strategy` config node."""

from __future__ import annotations

from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor

from meshformer.training.protocol import StepStrategy

from .strategy import MeshStrategy, all_reduced


class SingleDevice(StepStrategy, SingleDeviceStrategy):
    """Lightning's SingleDeviceStrategy with the methods that training/step.py calls."""


class DataParallel(StepStrategy, DDPStrategy):
    """Lightning's DDPStrategy with the methods that training/step.py calls. DDP wraps the task's `forward` only, as in plain PyTorch."""

    @property
    def averaged_over(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.world_size

    def without_reduction(self) -> AbstractContextManager[Any]:
        model: Any = self.model
        return model.no_sync()

    # Lightning's two hooks prepare the reducer for modules that are not called through DDP's forward. Ours is, so they do nothing.

    def pre_backward(self, closure_loss: Tensor) -> None:
        pass

    def post_backward(self, closure_loss: Tensor) -> None:
        pass

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        return all_reduced(tensor, group, reduce_op)


def make_strategy(
    strategy: dict[str, Any], compile: bool = False, context_length: int = 1, static_graph: bool = False, device: str = "cpu"
) -> Strategy:
    """`single` (on `device`) and `ddp` are Lightning's own strategies; every other layout is MeshStrategy with other degrees.

    `strategy["timeout"]`: seconds until a collective fails for want of a rank. `static_graph`: DDP's option; every backward pass must have the same
    graph and reduce gradients, since DDP fails in an internal assert if its first backward pass is inside `no_sync`.
    """
    if strategy["name"] == "single":
        return SingleDevice(torch.device(device))
    if strategy["name"] == "ddp":
        # broadcast_buffers would overwrite each rank's metric sums with rank 0's at every forward. The model itself has no buffers.
        timeout = timedelta(seconds=strategy["timeout"])
        return DataParallel(timeout=timeout, gradient_as_bucket_view=True, broadcast_buffers=False, static_graph=static_graph)
    return MeshStrategy(strategy, compile, context_length, device)
