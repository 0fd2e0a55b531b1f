"""Parameters beside submodules, replicated over the tensor axis: plain tensors while the module's forward runs, the same parameters afterwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from harness import run_ranks
from meshformer.compat.torch_distributed import init_fake_process_group
from meshformer.parallel.tensor import ReplicatedParameters


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.inner, self.shift = nn.Parameter(torch.ones(4)), nn.Linear(4, 4), nn.Parameter(torch.zeros(4))
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((type(self.scale), type(self.shift)))
        if len(self.seen) == 3:
            raise ValueError("in the middle")
        return self.inner(x) * self.scale + self.shift


def before_and_after() -> tuple[Any, ...]:
    init_fake_process_group(0, 2)
    module = Scaled()
    ReplicatedParameters().apply(module, init_device_mesh("cpu", (2,)))
    before = dict(module.named_parameters())
    for _ in range(2):
        module(torch.randn(2, 4)).sum().backward()
    try:
        module(torch.randn(2, 4))
    except ValueError as error:
        told = str(error)
    after = dict(module.named_parameters())
    kept = list(after) == list(before) == list(module.state_dict()) and all(after[name] is p for name, p in before.items())
    gradients = [isinstance(p.grad, DTensor) for p in (module.scale, module.shift)]
    return module.seen, kept, gradients, told


def test_a_forward_pass_leaves_the_parameters_as_they_were() -> None:
    seen, kept, gradients, told = run_ranks(1, before_and_after)[0]
    assert seen == [(Tensor, Tensor)] * 3
    assert kept and gradients == [True, True] and told == "in the middle"
