"""A checkpoint is a folder in torch's distributed format (DCP), in every layout, one process included.

    step-00000500/
        .metadata, __0_0.distcp   tensors, keyed by name: `model.<parameter>`, `optimizer.<parameter>.<state>`
        trainer.pt                everything else: plain containers only, read with weights_only=True

Keys are names, never positions in a list or coordinates in a mesh, so that any layout can read what any other wrote.
The folder is written aside and renamed when it is complete: a killed process leaves the old checkpoints and at most a `.tmp` folder.
"""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from meshformer.config.errors import ConfigError

from .find import PARTS, REST


def write_folder(path: Path, tensors: dict[str, torch.Tensor], rest: dict[str, Any]) -> None:
    """Writes one process's complete state. An existing folder of this name is replaced once the new one is complete."""
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what is meant
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(aside, single_file_per_rank=True, sync_files=True), no_dist=True)
    with open(aside / REST, "wb") as file:
        torch.save(rest, file)
        file.flush()
        os.fsync(file.fileno())
    old = path.with_name(path.name + ".old.tmp")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    os.replace(aside, path)
    shutil.rmtree(old, ignore_errors=True)
    parent = os.open(path.parent, os.O_RDONLY)
    os.fsync(parent)  # the rename itself
    os.close(parent)


def tensor_sizes(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and type of every tensor in the checkpoint, without reading them. ConfigError when it is not a complete checkpoint."""
    _check_is_checkpoint(path)
    metadata = dcp.FileSystemReader(path).read_metadata()
    return {k: (m.size, m.properties.dtype) for k, m in metadata.state_dict_metadata.items() if isinstance(m, TensorStorageMetadata)}


def read_tensors(path: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """Every tensor whose key starts with `prefix`, whole and on the CPU, in one process, whatever layout wrote it."""
    sizes = tensor_sizes(path)
    tensors = {key: torch.empty(size, dtype=dtype) for key, (size, dtype) in sizes.items() if key.startswith(prefix)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what is meant
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    return tensors


def read_rest(path: Path) -> dict[str, Any]:
    _check_is_checkpoint(path)
    return torch.load(Path(path) / REST, map_location="cpu", weights_only=True)


def _check_is_checkpoint(path: Path) -> None:
    path = Path(path)
    missing = [name for name in PARTS if not (path / name).is_file()]
    if missing:
        raise ConfigError(
            f"{path} is not a complete checkpoint: {', '.join(missing)} missing", fix="name a folder like RUN/checkpoints/step-00000500"
        )
