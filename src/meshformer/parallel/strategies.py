"""The Lightning strategy that a `strategy` config node asks for."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, Strategy


def make_strategy(strategy: dict[str, Any]) -> Strategy | str:
    """`single` and `ddp` are Lightning's own. `strategy["timeout"]` is in seconds: how long a rank waits for a silent peer."""
    if strategy["name"] == "single":
        return "auto"  # with one device: SingleDeviceStrategy on whatever the accelerator is
    if strategy["name"] == "ddp":
        # Ranks keep sums of their own (metrics): DDP must not overwrite them with rank 0's at every forward. The model has no buffers.
        return DDPStrategy(timeout=timedelta(seconds=strategy["timeout"]), gradient_as_bucket_view=True, broadcast_buffers=False)
    raise AssertionError(f"the config check lets no strategy {strategy['name']!r} through")
