"""A model in the layout of a Hugging Face folder, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..find import CONFIG
from .parts import Model, Part, complete
from .source import ONE_FILE, layout_for


def write_folder(folder: Path, model: Model, weights: Mapping[str, Tensor]) -> None:
    """config.json and model.safetensors of the model node `model` with `weights`, by our names, in a folder that is there.

    Tensors keep their types and bits. OSError when it cannot be written.
    """
    layout, whole = layout_for(model), complete(model)
    groups: dict[str, list[tuple[Part, Tensor]]] = {}
    for name, part in layout.parts(whole).items():
        groups.setdefault(part.name, []).append((part, weights[name]))
    tensors = {layout.stored_name(name, whole): stored(group) for name, group in groups.items()}
    config: dict[str, Any] = layout.config(whole)
    types = {str(x.dtype).removeprefix("torch.") for x in tensors.values()}
    config |= {"torch_dtype": types.pop()} if len(types) == 1 else {}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    safetensors.torch.save_file(tensors, folder / ONE_FILE, metadata={"format": "pt"})


def stored(group: list[tuple[Part, Tensor]]) -> Tensor:
    """The stored tensor that ours are parts of."""
    rows = torch.cat([x for _, x in sorted(group, key=lambda pair: pair[0].part)])
    part = group[0][0]
    whole = rows.T if part.transposed and rows.ndim == 2 else rows
    return (whole.reshape(part.stored) if part.stored is not None else whole).contiguous()
