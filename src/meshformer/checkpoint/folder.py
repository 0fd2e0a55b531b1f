"""A checkpoint is a folder in torch's distributed format (DCP), in every layout, one process included.

    step-00000500/
        .metadata, __0_0.distcp …   tensors, keyed by name: `model.<parameter>`, `optimizer.<parameter>.<state>`; a file for each process
        trainer.pt                  everything else: plain containers only, read with weights_only=True
        manifest.json               size and checksum of each of these; written last

Keys are names, never positions in a list or coordinates in a mesh, so that any layout can read what any other wrote.
The folder is written aside, flushed to disk and renamed when it is complete: a killed process or a power cut leaves the old checkpoints and at
most a `.tmp` folder.

The readers below take single files (see single_file.py) and Hugging Face folders (see FOREIGN_FORMATS) as well. They communicate with nobody: each
process reads what it needs.
"""

from __future__ import annotations

import errno
import io
import math
import pickle
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from meshformer.config.errors import ConfigError

from . import single_file
from .find import FOREIGN_FORMATS
from .manifest import METADATA, PARTS, REST, Files, write_manifest
from .metadata import read_metadata
from .pieces import LoadPieces, Piece, SavePieces, pieces_of
from .ranks import Ranks
from .summing import SummingWriter, exchange

SHOWN = 6  # problems named in a message


class State(NamedTuple):
    """What one rank writes: its pieces, and on the group's first rank trainer.pt as bytes and the metrics that go to the manifest."""

    pieces: dict[str, Piece]
    rest: bytes = b""
    metrics: dict[str, float] = {}  # noqa: RUF012  # never changed


# --- writing


def write_folder(path: Path, tensors: Mapping[str, Tensor], rest: dict[str, Any], group: dist.ProcessGroup | None = None) -> None:
    """Writes a complete checkpoint; an existing folder of this name is replaced once the new one is complete.

    With `group`, all of its ranks call this, each with what it holds: pieces (DTensors on any mesh) and whole tensors, under names that may differ
    between ranks (pipeline stages). A whole tensor that several ranks hold must be the same on each. `rest` counts on the first rank alone;
    its entry `metrics`, if any, goes to the manifest as well. Without `group`, this process writes everything.
    What fails on one rank (no space for all of it, say) raises StepFailed on all, and the old checkpoints stay.
    """
    write_state(path, lambda: state_of(tensors, rest, group), group)


def state_of(tensors: Mapping[str, Tensor], rest: dict[str, Any], group: dist.ProcessGroup | None = None) -> State:
    if group is not None and dist.get_rank(group) != 0:
        return State(pieces_of(tensors))
    buffer = io.BytesIO()
    torch.save(rest, buffer)
    return State(pieces_of(tensors), buffer.getvalue(), rest.get("metrics", {}))


def write_state(path: Path, state: Callable[[], State], group: dist.ProcessGroup | None = None) -> None:
    """`write_folder` of what `state()` returns, which may fail on some ranks like anything else here."""
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    ranks = Ranks(group, f"the checkpoint {path} could not be written")
    writer, planner = SummingWriter(aside), SavePieces()

    def begin() -> None:
        nonlocal held
        held = state()
        if ranks.is_first:
            _recover(path)
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)

    def plan() -> Any:
        planner.set_up_planner(held.pieces, writer.storage_meta(), ranks.is_first)
        writer.set_up_storage_writer(ranks.is_first, rank=ranks.rank)
        return writer.prepare_local_plan(planner.create_local_plan())

    def plan_together(plans: list[Any]) -> list[Any]:
        nonlocal metadata
        plans, metadata = planner.create_global_plan(plans)
        _check_space(aside, plans, len(held.rest))
        return writer.prepare_global_plan(plans)

    def write() -> tuple[Any, Files]:
        with single_file.naming_the_cause():
            return writer.write_data(planner.finish_plan(mine), planner).value(), writer.files

    def finish(written: list[tuple[Any, Files]]) -> list[None]:
        assert metadata is not None
        writer.finish(metadata, [results for results, _ in written])
        writer.write_bytes(REST, held.rest)
        files = {name: entry for part in (*(files for _, files in written), writer.files) for name, entry in part.items()}
        files[METADATA] = files.pop(f"{METADATA}.tmp")  # DCP's own way to complete a file
        write_manifest(aside, files, held.metrics)
        single_file.sync_folder(aside)
        _replace(path, aside)
        return [None] * len(written)

    held = State({})
    metadata: Metadata | None = None
    try:
        ranks.step(begin)
        mine = ranks.step(plan, plan_together)
        ranks.step(write, finish)
    except Exception:
        if ranks.is_first:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def _check_space(folder: Path, plans: list[Any], rest: int) -> None:
    """OSError before anything is written, where the disk has not enough room for what all ranks are going to write."""
    items = [item for plan in plans for item in plan.items]
    sizes = (math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize for item in items)
    needed = sum(sizes) + rest + 2048 * len(items)  # each tensor is an archive of its own, and has its entry in .metadata
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"not enough disk space: {needed:,} bytes needed, {free:,} free", str(folder.parent))


def _replace(path: Path, aside: Path) -> None:
    """`aside` becomes `path`. At every moment there is a complete checkpoint of that name, if there was one before."""
    old = _replaced(path)
    shutil.rmtree(old, ignore_errors=True)
    if not path.exists():
        aside.rename(path)
    elif exchange(aside, path):
        aside.rename(old)
    else:
        path.rename(old)  # a kill between these two: see _recover
        aside.rename(path)
    single_file.sync_folder(path.parent)  # the renames themselves
    shutil.rmtree(old, ignore_errors=True)


def _recover(path: Path) -> None:
    """Where a file system cannot exchange two names at once, a kill in the middle leaves the checkpoint that was to be replaced aside."""
    if not path.exists() and _replaced(path).exists():
        _replaced(path).rename(path)


def tidy(folder: Path) -> None:
    """Removes what killed saves and removals left in a run's checkpoints/. Nothing else may be saving there."""
    for left in sorted(Path(folder).glob("step-*.tmp")) if Path(folder).is_dir() else []:
        if left.is_dir():  # a file may be a conversion in progress
            _recover(left.with_name(left.name.removesuffix(".tmp").removesuffix(".old")))
            shutil.rmtree(left, ignore_errors=True)


def _replaced(path: Path) -> Path:
    return path.with_name(path.name + ".old.tmp")


# --- reading


def tensor_sizes(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and type of every tensor in the checkpoint, without reading them. ConfigError when it is not a complete checkpoint."""
    if (whole := _whole(path)) is not None:
        return {k: (x.shape, x.dtype) for k, x in whole.items()}
    _check_is_checkpoint(path)
    metadata = read_metadata(path)
    return {k: (m.size, m.properties.dtype) for k, m in metadata.state_dict_metadata.items() if isinstance(m, TensorStorageMetadata)}


def read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor whose key starts with `prefix`, whole and on the CPU, whatever layout wrote it."""
    tensors = {key: torch.empty(size, dtype=dtype) for key, (size, dtype) in tensor_sizes(path).items() if key.startswith(prefix)}
    _fill(path, pieces_of(tensors))
    return tensors


def read_into(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills the given tensors, by key, in place: plain ones with the whole, DTensors with this process's piece, converted to their type.

    ConfigError lists the keys that the checkpoint lacks and the tensors of another shape.
    """
    sizes = {key: size for key, (size, _) in tensor_sizes(path).items()}
    refuse_misfits(misfits(sizes, {key: x.shape for key, x in tensors.items()}), f"the tensors in {path} do not fit")
    _fill(path, pieces_of(tensors))


def read_rest(path: Path) -> dict[str, Any]:
    """What is no tensor: counters, hyper-parameters of the optimizer, the position in the data."""
    if single_file.is_single(path):
        rest = single_file.load(path)[1]
        if rest is None:
            raise ConfigError(f"{path} holds weights alone, no state of a training run", fix="Name the checkpoint that it was made from.")
        return rest
    _check_is_checkpoint(path)
    try:
        return torch.load(Path(path) / REST, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # a pickle that would run code, from a stranger
        raise ConfigError(f"{Path(path) / REST} {single_file.what_it_asks_for(error)}", fix="Name another checkpoint.") from None


def _whole(path: Path) -> dict[str, Tensor] | None:
    """Every tensor of a single file or of a foreign folder, as a view of it; None for a checkpoint folder."""
    if single_file.is_single(path):
        return single_file.load(path)[0]
    for known in FOREIGN_FORMATS:
        if known.recognises(Path(path)):
            return {f"model.{name}": x for name, x in known.read(path).items()}
    return None


@torch.no_grad()
def _fill(path: Path, pieces: dict[str, Piece]) -> None:
    if (whole := _whole(path)) is not None:
        for key, piece in pieces.items():
            piece.data.copy_(whole[key][piece.slices])
        return
    reader, planner = dcp.FileSystemReader(path), LoadPieces()
    metadata = read_metadata(path)
    planner.set_up_planner(pieces, metadata)
    reader.set_up_storage_reader(metadata, True)
    reader.read_data(planner.create_local_plan(), planner).wait()


def misfits(saved: Mapping[str, torch.Size], wanted: Mapping[str, torch.Size], extra: Iterable[str] = ()) -> list[str]:
    """What keeps tensors of the shapes `saved` from filling those of the shapes `wanted`, in words; `extra` are names that nobody wants."""
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
            f"{path} is not a complete checkpoint: {', '.join(missing)} missing", fix="name a folder like RUN/checkpoints/step-00000500"
        )
