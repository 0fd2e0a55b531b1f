"""Read a checkpoint by tensor name, whatever layout wrote it: a folder (its files: see write.py), a single file, or foreign weights.

No function here communicates with other processes: each process reads the parts of the files that it needs.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from meshformer.config.errors import ConfigError

from . import single_file
from .find import METADATA, PARTS, REST, foreign_formats
from .pieces import LoadPieces, Piece, pieces_of

Foreign = Callable[[Path], Mapping[str, Tensor]]
SHOWN = 6  # problems listed in one message
# Classes that a checkpoint's .metadata may contain, besides the dataclasses and enumerations that are defined in DCP's own module.
ALLOWED = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("torch.distributed.checkpoint.filesystem", "_StorageInfo")}
OF_DCP = "torch.distributed.checkpoint.metadata"


def tensor_sizes(path: Path, foreign: Foreign | None = None) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """{name: (shape, dtype)} of every tensor in the checkpoint; no tensor is read. ConfigError when the checkpoint is not complete.

    `foreign`: reads a folder of another program under other names than ours, for a model that has those names itself.
    """
    if (whole := _whole(path, foreign)) is not None:
        return {k: (x.shape, x.dtype) for k, x in whole.items()}
    _check_is_checkpoint(path)
    metadata = read_metadata(path)
    return {k: (m.size, m.properties.dtype) for k, m in metadata.state_dict_metadata.items() if isinstance(m, TensorStorageMetadata)}


def read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor whose name starts with `prefix`, whole and on the CPU."""
    tensors = {key: torch.empty(size, dtype=dtype) for key, (size, dtype) in tensor_sizes(path).items() if key.startswith(prefix)}
    _fill(path, pieces_of(tensors))
    return tensors


def read_into(path: Path, tensors: Mapping[str, Tensor], foreign: Foreign | None = None) -> None:
    """Fills the given tensors in place, by name, converted to their dtypes: plain tensors whole, of a DTensor the piece this process holds.

    ConfigError lists the names that the checkpoint lacks and the tensors of another shape.
    """
    sizes = {key: size for key, (size, _) in tensor_sizes(path, foreign).items()}
    refuse_misfits(misfits(sizes, {key: x.shape for key, x in tensors.items()}), f"the tensors in {path} do not fit")
    _fill(path, pieces_of(tensors), foreign)


def read_rest(path: Path) -> dict[str, Any]:
    """Everything but the tensors: counters, hyper-parameters of the optimizer, the position in the data."""
    if single_file.is_single(path):
        rest = single_file.load(path)[1]
        if rest is None:
            raise ConfigError(f"{path} holds weights alone, no state of a training run", fix="Name the checkpoint that it was made from.")
        return rest
    _check_is_checkpoint(path)
    try:
        return torch.load(Path(path) / REST, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # the pickle would run code
        raise ConfigError(f"{Path(path) / REST} {single_file.what_it_asks_for(error)}", fix="Name another checkpoint.") from None


def _whole(path: Path, foreign: Foreign | None = None) -> dict[str, Tensor] | None:
    """Every tensor of a single file or of a foreign folder, as a memory-mapped view; None for a checkpoint folder."""
    if single_file.is_single(path):
        return single_file.load(path)[0]
    for known in foreign_formats():
        if known.recognises(Path(path)):
            return {f"model.{name}": x for name, x in (foreign or known.read)(Path(path)).items()}
    return None


@torch.no_grad()
def _fill(path: Path, pieces: dict[str, Piece], foreign: Foreign | None = None) -> None:
    if (whole := _whole(path, foreign)) is not None:
        for key, piece in pieces.items():
            piece.data.copy_(whole[key][piece.slices])
        return
    reader, planner = dcp.FileSystemReader(path), LoadPieces()
    metadata = read_metadata(path)
    planner.set_up_planner(pieces, metadata)
    reader.set_up_storage_reader(metadata, True)
    reader.read_data(planner.create_local_plan(), planner).wait()


def misfits(saved: Mapping[str, torch.Size], wanted: Mapping[str, torch.Size], extra: Iterable[str] = ()) -> list[str]:
    """One line for each tensor in `wanted` that `saved` lacks or has in another shape, and for each name in `extra`, which no tensor takes."""
    problems = [f"{k}: missing in the checkpoint" for k in wanted.keys() - saved.keys()] + [f"{k}: unknown to the model" for k in extra]
    problems += [
        f"{k}: {tuple(saved[k])} in the checkpoint, {tuple(wanted[k])} in the model"
        for k in wanted.keys() & saved.keys()
        if saved[k] != wanted[k]
    ]
    return sorted(problems)


def refuse_misfits(problems: list[str], message: str, fix: str = "use the model settings that the run was trained with") -> None:
    if problems:
        shown = "; ".join(problems[:SHOWN]) + (f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else "")
        raise ConfigError(f"{message}: {shown}", fix=fix)


def _check_is_checkpoint(path: Path) -> None:
    path = Path(path)
    missing = [name for name in PARTS if not (path / name).is_file()]
    if missing:
        raise ConfigError(
            f"{path} is not a complete checkpoint: {', '.join(missing)} missing", fix="Name a folder like RUN/checkpoints/step-00000500"
        )


# --- .metadata


class _Unpickler(pickle.Unpickler):
    """DCP's .metadata is a pickle, and unpickling calls what the pickle names. A checkpoint may be untrusted, so only DCP's own classes load."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        paths = module.partition(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath")
        if (module, name) in ALLOWED or paths:
            return super().find_class(module, name)
        found = super().find_class(module, name) if module == OF_DCP and "." not in name else None
        if isinstance(found, type) and found.__module__ == OF_DCP:
            return found
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")


def read_metadata(folder: Path) -> Metadata:
    """Which tensors the checkpoint folder holds, and where. ConfigError when the file is damaged or points to a file outside the folder."""
    folder = Path(folder)
    try:
        with open(folder / METADATA, "rb") as file:
            found = _Unpickler(file).load()
    # Any of these can come out of a damaged or malicious pickle.
    except (pickle.UnpicklingError, EOFError, LookupError, AttributeError, ImportError, ValueError, TypeError, ArithmeticError, RecursionError,
            MemoryError, OSError) as error:  # fmt: skip
        raise ConfigError(f"{folder / METADATA} is damaged ({error or type(error).__name__})", fix="Name another checkpoint.") from error
    if not isinstance(found, Metadata):
        raise ConfigError(f"{folder / METADATA} is damaged", fix="Name another checkpoint.")
    _check_places(folder, found)
    return found


def _check_places(folder: Path, metadata: Metadata) -> None:
    """ConfigError where the metadata name a file outside this folder: DCP would join the name to the folder's path and read it."""
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
