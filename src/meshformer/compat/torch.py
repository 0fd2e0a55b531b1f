"""Private names of torch (written for 2.11 to 2.13)."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh

# Multi-tensor arithmetic. Optimizers and `torch.nn.utils.clip_grad_norm_` are built on these; public only through those. One call for a hundred
# parameters costs what a call for three costs.
foreach_norm = torch._foreach_norm
foreach_div_ = torch._foreach_div_
foreach_lerp = torch._foreach_lerp
foreach_lerp_ = torch._foreach_lerp_
foreach_copy_ = torch._foreach_copy_


def flatten(mesh: DeviceMesh, name: str) -> None:
    """Gives the group of all axes of `mesh` a name of its own in the mesh that it is a slice of. torch has no public way."""
    mesh._flatten(name)
