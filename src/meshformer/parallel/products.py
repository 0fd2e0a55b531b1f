"""Matrix products that only GPUs have: in float8, and, under tensor parallel, overlapped with the exchange of what they multiply. Both need
torch.compile. parallel/check.py refuses them elsewhere; neither has been measured by us."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from meshformer.compat.torch_distributed import overlap_products_with_transfers
from meshformer.config.errors import ConfigError
from meshformer.model.layout import blocks_name
from meshformer.parallel.check import FLOAT8_CAPABILITY


def in_float8(model: Any) -> None:
    """The linear layers of the blocks multiply in float8, forward and backward, scaled by tensor (torchao). Weights and their names stay."""
    if torch.cuda.get_device_capability() < FLOAT8_CAPABILITY:
        raise ConfigError("this GPU multiplies no float8 matrices", "trainer.float8", "true", fix="Leave it out.")
    from torchao.float8 import convert_to_float8_training  # pyright: ignore[reportMissingImports]

    convert_to_float8_training(model.get_submodule(blocks_name(model) or ""))


def overlap(mesh: DeviceMesh) -> None:
    """Products before a scatter and after a gather over `mesh` (the tensor axis) are cut into pieces that are sent while the next is computed."""
    overlap_products_with_transfers(mesh.get_group().group_name)
