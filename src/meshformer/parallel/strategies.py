"""The Lightning strategy that a `strategy` config node asks for."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, Strategy

from .strategy import MeshStrategy, all_reduced


class DataParallel(DDPStrategy):
    """Lightning's DDP; see `all_reduced` for the one difference."""

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        return all_reduced(tensor, group, reduce_op)


def make_strategy(strategy: dict[str, Any], compile: bool = False, context_length: int = 1, static_graph: bool = False) -> Strategy | str:
    """`single` and `ddp` are Lightning's own, everything else is the mesh strategy with other degrees.

    `strategy["timeout"]` is in seconds: how long a rank waits for a silent peer. `static_graph`: every step computes the same graph and reduces
    gradients. DDP dies in an internal assert where its first backward pass is a micro-batch that does not (`no_sync`).
    """
    if strategy["name"] == "single":
        return "auto"  # with one device: SingleDeviceStrategy on whatever the accelerator is
    if strategy["name"] == "ddp":
        # Ranks keep sums of their own (metrics): DDP must not overwrite them with rank 0's at every forward. The model has no buffers.
        timeout = timedelta(seconds=strategy["timeout"])
        return DataParallel(timeout=timeout, gradient_as_bucket_view=True, broadcast_buffers=False, static_graph=static_graph)
    return MeshStrategy(strategy, compile, context_length)
