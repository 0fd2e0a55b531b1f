"""The tensors of a Hugging Face folder: read under our parameter names, and written under its own, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from meshformer.config.errors import ConfigError
from meshformer.model.settings import SECOND_NAME

from .check import KEEPS_ALL, layout_for
from .parts import Model, Part, complete
from .source import CONFIG, ONE_FILE, listed, read_folder

# --- reading


def foreign_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a Hugging Face folder under our parameter names, as memory-mapped views of the files.

    Tensors that our model has no parameter for are included under their stored names, so that the caller refuses them as unknown. Some
    folders store one tensor twice (a tied embedding, say). ConfigError where the two copies differ, since one of them would be dropped.
    """
    source = read_folder(path)
    opened: dict[Path, Any] = {}

    def stored(file: Path, name: str) -> Tensor:
        if file not in opened:
            opened[file] = safe_open(file, framework="pt")
        return opened[file].get_tensor(name)

    for name, place in source.copies:
        if not torch.equal(stored(*source.files[name]), stored(*place)):
            first, second = source.files[name][1], place[1]
            message = f"{path} holds both {first} and {second}, which a {source.layout.NAME} of its config.json has as one, and they differ"
            tied = place[1] in source.layout.TIED
            fix = f"Write tie_word_embeddings=false into {source.path / CONFIG}, if they are two." if tied else f"Remove {second}, or {first}."
            raise ConfigError(message, fix=fix)
    whole = {part.name: stored(*source.files[part.name]) for part in source.parts.values()}
    found = {name: taken(whole[part.name], part) for name, part in source.parts.items()}
    where = {name: file for file, name in source.files.values()}
    return found | {name: stored(where[name], name) for name in source.unknown}


def taken(x: Tensor, part: Part) -> Tensor:
    """Our parameter out of the stored tensor `x`. A tensor whose shape is not of this layout is returned unchanged, and refused as a misfit
    when it is loaded."""
    if part.stored is not None and part.ours is not None:
        return x.reshape(part.ours) if tuple(x.shape) == part.stored else x
    x = x.T if part.transposed else x
    return x.chunk(part.of)[part.part] if len(x) % part.of == 0 else x


# --- writing


def write_folder(folder: Path, model: Model, weights: Mapping[str, Tensor]) -> None:
    """Writes config.json and model.safetensors of the model node `model` with `weights`, by our names, into the existing `folder`.

    Tensors keep their dtypes and bits. ConfigError as in `laid_out`, before anything is written; OSError when a file cannot be written.
    """
    save(folder, *laid_out(model, weights))


def save(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    safetensors.torch.save_file(tensors, folder / ONE_FILE, metadata={"format": "pt"})


def laid_out(model: Model, weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(contents of config.json, tensors to store). ConfigError names each weight that the layout would drop, and each one that is missing."""
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
    tensors = {layout.stored_name(name, whole): joined(group) for name, group in groups.items()}
    config: dict[str, Any] = layout.config(whole)
    types = {str(x.dtype).removeprefix("torch.") for x in tensors.values()}
    config |= {"torch_dtype": types.pop()} if len(types) == 1 else {}
    return config, tensors


def joined(group: list[tuple[Part, Tensor]]) -> Tensor:
    """The stored tensor that holds these parameters: the inverse of `taken`."""
    rows = torch.cat([x for _, x in sorted(group, key=lambda pair: pair[0].part)])
    part = group[0][0]
    whole = rows.T if part.transposed and rows.ndim == 2 else rows
    return (whole.reshape(part.stored) if part.stored is not None else whole).contiguous()
