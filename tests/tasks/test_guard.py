"""What a row is told does not depend on when the host looked at the notes, nor on whether they are tensors or plain flags."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from meshformer.tasks import guard as guards
from meshformer.tasks.guard import Guard

ALONE: Any = SimpleNamespace(reduce=lambda x, reduce_op: x)


def noted(fold: int, known: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    monkeypatch.setattr(guards, "FOLD", fold)
    guard = Guard(torch.device("cpu"), (10.0, 4.0), 3, None)
    for step in range(1, 8):
        for micro in range(2):
            bad_loss = (step, micro) == (6, 1)
            guard.loss(step, torch.tensor(math.inf if bad_loss else float(step)), torch.tensor(2))
        bad, skip = step in (4, 5), step in (2, 4, 5)
        norms = torch.tensor([1.0, math.nan if bad else 1.0, float(step)])
        flags = (bad, skip) if known else (torch.tensor(bad), torch.tensor(skip))
        guard.gradient(step, 0.1 * step, *flags, norms)
    return (*guard.look(ALONE), guard.step, guard.loss_step, guard.norms[2])


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("fold", [1, 3, 1024])
def test_when_the_host_looks_changes_nothing(fold: int, known: bool, monkeypatch: pytest.MonkeyPatch):
    losses = 10.0 + 2 * sum(range(1, 8)) - 6
    assert noted(fold, known, monkeypatch) == (6, 4, (losses, 4 + 2 * 13), 4, 6, 4.0)


def test_flags_may_become_known_between_two_rows():
    guard = Guard(torch.device("cpu"), (0.0, 0.0), 0, None)
    guard.gradient(1, 0.1, torch.tensor(False), torch.tensor(True), torch.ones(2))
    guard.gradient(2, 0.1, True, True, torch.ones(3))
    assert guard.look(ALONE) == (2, 2, (0.0, 0.0)) and guard.norms == [1.0] * 3
