"""Models whose parameters are on the meta device: they have shapes and no memory, until each rank allocates its own shards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Moves every parameter to the meta device as soon as a module registers it. Buffers and other tensors keep the constructor's values."""

    def without_values(module: nn.Module, name: str, parameter: nn.Parameter) -> Any:
        if parameter.is_meta:  # registered a second time, under a tied name
            return None
        return nn.Parameter(parameter.data.to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(without_values)
    try:
        yield
    finally:
        hook.remove()


def allocate(model: nn.Module, device: torch.device) -> None:
    """Gives every parameter on the meta device memory on `device`, without values, and moves the buffers that have values."""
    buffers = {name: buffer for name, buffer in model.named_buffers() if not buffer.is_meta}
    model.to_empty(device=device)
    for name, values in buffers.items():
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner).get_buffer(last).copy_(values)
