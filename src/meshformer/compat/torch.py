"""Private names of torch outside torch.distributed (2.11 to 2.13)."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _python_dispatch

# One kernel launch for the norms of many tensors. `torch.nn.utils.get_total_norm` calls it, but returns one norm over all of them.
foreach_norm = torch._foreach_norm

DispatchMode = _python_dispatch.TorchDispatchMode  # a context that sees every operation; torch's documentation names it, its module is private


def flex_operator() -> Any:
    """The operator behind `flex_attention`. It has a gradient on CPUs too, where the public function raises."""
    from torch._higher_order_ops.flex_attention import flex_attention

    return flex_attention


def fake_tensor_mode() -> Any:
    """A context in which tensors have sizes, types and storages, but no memory and no values: new ones, and what operations return.

    Real tensors are accepted as inputs, because process groups and meshes keep some of their own.
    """
    return torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
