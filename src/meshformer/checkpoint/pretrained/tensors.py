"""The tensors of a foreign folder, under our names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from meshformer.config.errors import ConfigError

from ..find import CONFIG
from .parts import Part
from .source import read_folder


def foreign_tensors(path: Path) -> dict[str, Tensor]:
    """A Hugging Face folder's tensors under our names, views of the files: only what is used of them is read. Those that have no place in our
    model are there under their own names. ConfigError where what should be a copy of another tensor differs from it: one of them would be lost."""
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
    """Our tensor out of the stored one. Where the stored one has no shape of this layout it is left as it is, and reported as a misfit."""
    if part.stored is not None and part.ours is not None:
        return x.reshape(part.ours) if tuple(x.shape) == part.stored else x
    x = x.T if part.transposed else x
    return x.chunk(part.of)[part.part] if len(x) % part.of == 0 else x
