"""GPU-only matrix products: in float8, and with tensor parallelism overlapped with communication (async tensor parallelism). Both need
torch.compile, which parallel/check.py enforces. We have measured neither."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from meshformer.compat.torch_distributed import ASYNC_TENSOR_PARALLEL, enable_symmetric_memory
from meshformer.config.errors import ConfigError
from meshformer.model.layout import blocks_name
from meshformer.parallel.check import FLOAT8_CAPABILITY


def in_float8(model: Any) -> None:
    """Makes the linear layers of the blocks multiply in float8 (torchao, tensorwise scaling), forward and backward. Weights keep dtype and name."""
    if torch.cuda.get_device_capability() < FLOAT8_CAPABILITY:
        raise ConfigError("this GPU multiplies no float8 matrices", "trainer.float8", "true", fix="Leave it out.")
    from torchao.float8 import convert_to_float8_training  # pyright: ignore[reportMissingImports]

    convert_to_float8_training(model.get_submodule(blocks_name(model) or ""))


def overlap(mesh: DeviceMesh) -> dict[str, Any]:
    """The options of torch.compile that split the matrix products next to an all-gather or reduce-scatter over `mesh` (the tensor axis) into
    chunks, and overlap both."""
    enable_symmetric_memory(mesh.get_group().group_name)
    return ASYNC_TENSOR_PARALLEL
