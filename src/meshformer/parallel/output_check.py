"""Compares the output of a sharded model with that of the unsharded one, on the same tokens, before the first step.

For models that are built with real weights (users' models; ours are built on the meta device). It finds errors of a Plan that its names do not
show: one matrix for q, k and v, or a hard-coded number of heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from meshformer.config.errors import ConfigError

TOLERANCE = 1e-3  # relative to the largest output; summing in another order causes 1e-6 in fp32
FIX = "See docs/make_it_yours/model.md: heads are numbered by view(B, T, -1, size), and q, k and v are matrices of their own."


def trial_batch(length: int) -> dict[str, Tensor]:
    """Random tokens 0 and 1, which every vocabulary has, (2, `length`)."""
    tokens_BT = torch.randint(2, (2, length), generator=torch.Generator().manual_seed(0))
    return {"tokens": tokens_BT, "targets": tokens_BT}


@torch.no_grad()
def output_of(model: Any, task: Any, batch: dict[str, Tensor]) -> Tensor | None:
    """The model's output in eval mode; None if the task needs other inputs than tokens."""
    try:
        arguments = task.arguments(batch, "val")
    except (KeyError, ConfigError):
        return None
    training = model.training
    model.eval()
    try:
        output = model(**arguments)
    finally:
        model.train(training)
    return output.full_tensor() if isinstance(output, DTensor) else output


def check_same_output(model: Any, task: Any, batch: dict[str, Tensor], expected: Tensor, axis: str, degree: int) -> None:
    """ConfigError if the sharded model fails on the batch, or its output differs from `expected`, that of the unsharded model."""
    try:
        found = output_of(model, task, batch)
    except Exception as error:
        last = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise ConfigError(f"sharded as its Plan says, the model fails: {last}", f"strategy.{axis}", degree, fix=FIX) from error
    if found is None:  # the task cannot use the sharded batch, and raises its own error at the first step
        return
    if found.shape == expected.shape and (found - expected).abs().max() <= TOLERANCE * expected.abs().max():
        return
    message = "sharded as its Plan says, the model computes a different output than unsharded"
    raise ConfigError(message, f"strategy.{axis}", degree, fix=FIX)
