"""A model in the layout of a Hugging Face folder, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from meshformer.config.errors import ConfigError
from meshformer.model.settings import SECOND_NAME

from ..find import CONFIG
from .parts import Model, Part, complete
from .source import KEEPS_ALL, ONE_FILE, layout_for, listed


def write_folder(folder: Path, model: Model, weights: Mapping[str, Tensor]) -> None:
    """config.json and model.safetensors of the model node `model` with `weights`, by our names, in a folder that is there.

    Tensors keep their types and bits. ConfigError as `laid_out`, before anything is written; OSError when it cannot be written.
    """
    save(folder, *laid_out(model, weights))


def save(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    safetensors.torch.save_file(tensors, folder / ONE_FILE, metadata={"format": "pt"})


def laid_out(model: Model, weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config.json, the tensors to store). ConfigError where a weight has no place in the layout, or a place no weight: each is named."""
    layout, whole = layout_for(model, weights.keys), complete(model)
    parts = layout.parts(whole)
    copies = {name for name, first in SECOND_NAME.items() if name in weights and first in weights and torch.equal(weights[name], weights[first])}
    if lost := [name for name in weights if name not in parts and name not in copies]:
        message = f"{layout.NAME} has no place for {listed(lost)}, which would be lost"
        raise ConfigError(message, "format", "huggingface", fix=KEEPS_ALL)
    if missing := [name for name in parts if name not in weights]:
        raise ConfigError(f"the weights lack {listed(missing)}, which {layout.NAME} has", "format", "huggingface", fix=KEEPS_ALL)
    groups: dict[str, list[tuple[Part, Tensor]]] = {}
    for name, part in parts.items():
        groups.setdefault(part.name, []).append((part, weights[name]))
    tensors = {layout.stored_name(name, whole): stored(group) for name, group in groups.items()}
    config: dict[str, Any] = layout.config(whole)
    types = {str(x.dtype).removeprefix("torch.") for x in tensors.values()}
    config |= {"torch_dtype": types.pop()} if len(types) == 1 else {}
    return config, tensors


def stored(group: list[tuple[Part, Tensor]]) -> Tensor:
    """The stored tensor that ours are parts of."""
    rows = torch.cat([x for _, x in sorted(group, key=lambda pair: pair[0].part)])
    part = group[0][0]
    whole = rows.T if part.transposed and rows.ndim == 2 else rows
    return (whole.reshape(part.stored) if part.stored is not None else whole).contiguous()
