"""Private names of torch outside torch.distributed (2.11 to 2.13)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils import _python_dispatch

# Multi-tensor operations: one kernel launch for many parameters. torch's optimizers and `clip_grad_norm_` use them, but they have no
# public names.
foreach_norm = torch._foreach_norm
foreach_div_ = torch._foreach_div_

DispatchMode = _python_dispatch.TorchDispatchMode  # a context that sees every operation; torch's documentation names it, its module is private


def flex_operator() -> Any:
    """The operator behind `flex_attention`. It has a gradient on CPUs too, where the public function raises."""
    from torch._higher_order_ops.flex_attention import flex_attention

    return flex_attention


def shallow_copy(module: nn.Module) -> Any:
    """A shallow copy of a module: parameters are shared, but `setattr` of a submodule does not change the original.

    `copy.copy` alone would share the dict of submodules, and `copy.deepcopy` would copy the parameters.
    """
    view = copy.copy(module)
    view._modules = dict(module._modules)
    return view


def swap_parameters(module: nn.Module, values: dict[str, Any]) -> dict[str, Any]:
    """Replaces a module's own parameters with `values` and returns the previous ones. `setattr` would refuse plain tensors."""
    before = dict(module._parameters)
    module._parameters.update(values)
    return before


def fake_tensor_mode() -> Any:
    """A context in which tensors have sizes, types and storages, but no memory and no values: new ones, and what operations return.

    Real tensors are accepted as inputs, because process groups and meshes keep some of their own.
    """
    return torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
