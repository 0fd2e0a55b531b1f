"""DCP's `.metadata` is a pickle, and reading a pickle runs what is in it. A checkpoint may come from a stranger: only its own classes are let in."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from meshformer.config.errors import ConfigError

from .find import METADATA

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
    """What is in the checkpoint folder and where. ConfigError when the file is damaged, or holds anything else."""
    try:
        with open(Path(folder) / METADATA, "rb") as file:
            found = _Unpickler(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{Path(folder) / METADATA} is damaged ({error or type(error).__name__})", fix="Name another checkpoint."
        ) from error
    if not isinstance(found, Metadata):
        raise ConfigError(f"{Path(folder) / METADATA} is damaged", fix="Name another checkpoint.")
    return found
