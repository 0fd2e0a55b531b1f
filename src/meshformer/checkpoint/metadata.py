"""DCP's `.metadata` is a pickle, and reading a pickle runs what is in it. A checkpoint may come from a stranger: only its own classes are let in."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from meshformer.config.errors import ConfigError

from .manifest import METADATA

ALLOWED = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("torch.distributed.checkpoint.filesystem", "_StorageInfo")}
OURS = "torch.distributed.checkpoint.metadata"  # dataclasses and enumerations, defined there


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        paths = module.partition(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath")
        if (module, name) in ALLOWED or paths:
            return super().find_class(module, name)
        found = super().find_class(module, name) if module == OURS and "." not in name else None
        if isinstance(found, type) and found.__module__ == OURS:
            return found
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")


def read_metadata(folder: Path) -> Metadata:
    """What is in the checkpoint folder and where. ConfigError when the file is damaged, holds anything else, or points out of the folder."""
    folder = Path(folder)
    try:
        with open(folder / METADATA, "rb") as file:
            found = _Unpickler(file).load()
    # A pickle of a stranger's may end in any of these; a file that is damaged does.
    except (pickle.UnpicklingError, EOFError, LookupError, AttributeError, ImportError, ValueError, TypeError, ArithmeticError, RecursionError,
            MemoryError, OSError) as error:  # fmt: skip
        raise ConfigError(f"{folder / METADATA} is damaged ({error or type(error).__name__})", fix="Name another checkpoint.") from error
    if not isinstance(found, Metadata):
        raise ConfigError(f"{folder / METADATA} is damaged", fix="Name another checkpoint.")
    _check_places(folder, found)
    return found


def _check_places(folder: Path, metadata: Metadata) -> None:
    """Tensors are read from the files that the metadata name, by a path that DCP joins to the folder's: each must be a file of this folder."""
    try:
        names = {storage.relative_path for storage in (metadata.storage_data or {}).values()}
        entries = set(metadata.state_dict_metadata)
    except (AttributeError, TypeError):
        raise ConfigError(f"{folder / METADATA} is damaged", fix="Name another checkpoint.") from None
    if not all(isinstance(name, str) for name in entries):
        raise ConfigError(f"{folder / METADATA} is damaged", fix="Name another checkpoint.")
    for name in names:
        if (
            not isinstance(name, str)
            or not name
            or Path(name).name != name
            or not (folder / name).resolve().is_relative_to(folder.resolve())
        ):
            message = f"{folder / METADATA} points to {name}, which is no file of the checkpoint"
            raise ConfigError(message, fix="Name another checkpoint: this one was made to read what lies elsewhere.")
