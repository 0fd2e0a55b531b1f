"""The Lightning strategy that a `strategy` config node asks for."""

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
    """Lightning's, and what a step asks of it."""


class DataParallel(StepStrategy, DDPStrategy):
    """Lightning's DDP, and what a step asks of it. It wraps the task's `forward` alone, as in plain PyTorch."""

    @property
    def averaged_over(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.world_size

    def without_reduction(self) -> AbstractContextManager[Any]:
        model: Any = self.model
        return model.no_sync()

    # Lightning does what DDP's forward does once more, for tasks that are not called through it.

    def pre_backward(self, closure_loss: Tensor) -> None:
        pass

    def post_backward(self, closure_loss: Tensor) -> None:
        pass

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        return all_reduced(tensor, group, reduce_op)


def make_strategy(
    strategy: dict[str, Any], compile: bool = False, context_length: int = 1, static_graph: bool = False, device: str = "cpu"
) -> Strategy:
    """`single` (on `device`) and `ddp` are Lightning's own, everything else is the mesh strategy with other degrees.

    `strategy["timeout"]` is in seconds: how long a rank waits for a silent peer. `static_graph`: every step computes the same graph and reduces
    gradients. DDP dies in an internal assert where its first backward pass is a micro-batch that does not (`no_sync`).
    """
    if strategy["name"] == "single":
        return SingleDevice(torch.device(device))
    if strategy["name"] == "ddp":
        # Ranks keep sums of their own (metrics): DDP must not overwrite them with rank 0's at every forward. The model has no buffers.
        timeout = timedelta(seconds=strategy["timeout"])
        return DataParallel(timeout=timeout, gradient_as_bucket_view=True, broadcast_buffers=False, static_graph=static_graph)
    return MeshStrategy(strategy, compile, context_length, device)
