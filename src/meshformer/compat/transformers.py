"""The private names of transformers that this package uses. tests/test_compat.py says when they have changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


@torch.no_grad()
def draw_parameters(net: Any, part: nn.Module) -> None:
    """Initialises the parameters of `part`, a submodule of the transformers model `net`, in place, by the model's own rule for each module.

    transformers 5: `PreTrainedModel._init_weights(module)`. The public `init_weights()` draws the whole model in one sequence of random numbers,
    so a process would need all of it in memory to draw its own share.
    """
    for child in part.children():
        draw_parameters(net, child)
    net._init_weights(part)


def as_stored(net: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`tensors` of the transformers model `net`, by name, under the names and in the form in which folders store them: experts one by one, say.

    transformers 5: `core_model_loading.revert_weight_conversion`, which is what `save_pretrained` calls; that itself would split and write them.
    """
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(net, tensors)
