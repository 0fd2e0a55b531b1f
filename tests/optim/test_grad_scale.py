"""`grad_scale` is what the next step divides gradients by, in a kernel or before it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from meshformer.optim import adamw, muon, sgd

MAKERS: dict[str, Callable[[list[tuple[str, Tensor]]], Any]] = {
    "adamw": lambda named: adamw(named, lr=0.1, fused=True),
    "adamw, not fused": lambda named: adamw(named, lr=0.1, fused=False),
    "sgd": lambda named: sgd(named, lr=0.1, momentum=0.9),
    "muon": lambda named: muon(named, lr=0.1),
}


def trained(make: Callable[[list[tuple[str, Tensor]]], Any], scales: list[float], in_optimizer: bool) -> list[Tensor]:
    torch.manual_seed(0)
    named = [("blocks.0.up.weight", torch.randn(16, 8)), ("norm.weight", torch.randn(16)), ("embedding.weight", torch.randn(5, 16))]
    for _, p in named:
        p.requires_grad_(True)
    optimizer = make(named)
    for scale in scales:
        for _, p in named:
            p.grad = torch.randn_like(p) / (1 if in_optimizer else scale)
        if in_optimizer:
            optimizer.grad_scale = torch.tensor(scale)
        optimizer.found_inf = torch.zeros(())
        optimizer.step()
        assert optimizer.grad_scale is None  # it was for that step alone
    return [p.detach() for _, p in named]


@pytest.mark.parametrize("name", MAKERS)
def test_a_step_divides_gradients_by_grad_scale(name: str):
    scales = [0.5, 1.0, 100.0]
    given = trained(MAKERS[name], scales, True)
    divided = trained(MAKERS[name], scales, in_optimizer=False)
    whole = trained(MAKERS[name], [1.0] * 3, in_optimizer=False)
    for a, b, c in zip(given, divided, whole, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
        assert not torch.allclose(a, c, atol=1e-3)
