"""What a row is told does not depend on when the host looked at the notes."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from meshformer.training import guard as guards
from meshformer.training.guard import Guard

ALONE: Any = SimpleNamespace(reduce=lambda x, reduce_op: x)


def noted(fold: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    monkeypatch.setattr(guards, "MAX_PENDING", fold)
    guard = Guard(torch.device("cpu"), (10.0, 4.0), 3, None)
    for step in range(1, 8):
        for micro in range(2):
            bad_loss = (step, micro) == (6, 1)
            guard.loss(step, torch.tensor(math.inf if bad_loss else float(step)), torch.tensor(2))
        bad, skip = step in (4, 5), step in (2, 4, 5)
        norms = torch.tensor([1.0, math.nan if bad else 1.0, float(step)])
        guard.gradient(step, 0.1 * step, torch.tensor(bad), torch.tensor(skip), norms)
    return (*guard.summarise(ALONE), guard.step, guard.loss_step, guard.norms[2])


@pytest.mark.parametrize("fold", [1, 3, 1024])
def test_when_the_host_looks_changes_nothing(fold: int, monkeypatch: pytest.MonkeyPatch):
    losses = 10.0 + 2 * sum(range(1, 8)) - 6
    assert noted(fold, monkeypatch) == (6, 4, (losses, 4 + 2 * 13), 4, 6, 4.0)
