"""Private names of torch outside torch.distributed (2.11 to 2.13)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

# Multi-tensor arithmetic: one call for a hundred parameters costs what a call for three costs. torch's optimizers are built on these, and
# `torch.nn.utils.clip_grad_norm_`; there is no public way to them alone.
foreach_norm = torch._foreach_norm
foreach_div_ = torch._foreach_div_
foreach_lerp_ = torch._foreach_lerp_


def flex_operator() -> Any:
    """The operator behind `flex_attention`, which has a gradient on a CPU too; the public function refuses there."""
    from torch._higher_order_ops.flex_attention import flex_attention

    return flex_attention


def view_of(module: nn.Module) -> Any:
    """A copy of a module that shares all it has, and may be given other submodules (`setattr`) without changing the first.

    `copy.copy` alone shares the table of submodules. A deep copy would copy parameters.
    """
    view = copy.copy(module)
    view._modules = dict(module._modules)
    return view


def exchange_parameters(module: nn.Module, values: dict[str, Any]) -> dict[str, Any]:
    """Puts tensors in place of a module's own parameters and returns those. `setattr` takes nothing but parameters there."""
    before = dict(module._parameters)
    module._parameters.update(values)
    return before
