"""Write a checkpoint: a folder in torch's distributed checkpoint format (DCP), in every layout, one process included.

    step-00000500/
        .metadata, __0_0.distcp …   tensors by name: `model.<parameter>`, `optimizer.<parameter>.<state>`; one .distcp file for each process
        trainer.pt                  everything else: plain containers only, read with weights_only=True
        manifest.json               size and checksum of each of these files; written last

Tensors are keyed by name, never by a position in a list or a coordinate in a mesh, so that any layout can read what any other wrote.
The folder is written under a temporary name, flushed to disk, and renamed when it is complete. If the process is killed or the power fails, the
old checkpoints remain, and at most a `.tmp` folder is left over.
"""

from __future__ import annotations

import ctypes
import errno
import io
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata

from .find import METADATA, REST, Files, write_manifest
from .pieces import Piece, SavePieces, pieces_of

T = TypeVar("T")
R = TypeVar("R")


class State(NamedTuple):
    """What one rank writes. `rest` and `metrics` are given on the group's first rank only."""

    pieces: dict[str, Piece]
    rest: bytes = b""  # content of trainer.pt
    metrics: dict[str, float] = {}  # noqa: RUF012  # never changed


def write_folder(path: Path, tensors: Mapping[str, Tensor], rest: dict[str, Any], group: dist.ProcessGroup | None = None) -> None:
    """Writes a complete checkpoint; an existing folder of this name is replaced once the new one is complete.

    With `group`, all its ranks call this, each with the tensors it holds: DTensors on any mesh, of which it writes its piece, and plain tensors,
    which must be the same on every rank that holds them. Names may differ between ranks (pipeline stages). `rest` is taken from the first rank;
    its entry `metrics`, if any, is copied to the manifest. Without `group`, this process writes everything.
    An error on one rank, such as a full disk, raises StepFailed on all ranks and leaves the old checkpoints as they are.
    """
    write_state(path, lambda: state_of(tensors, rest, group), group)


def state_of(tensors: Mapping[str, Tensor], rest: dict[str, Any], group: dist.ProcessGroup | None = None) -> State:
    if group is not None and dist.get_rank(group) != 0:
        return State(pieces_of(tensors))
    buffer = io.BytesIO()
    torch.save(rest, buffer)
    return State(pieces_of(tensors), buffer.getvalue(), rest.get("metrics", {}))


def write_state(path: Path, state: Callable[[], State], group: dist.ProcessGroup | None = None) -> None:
    """`write_folder` of what `state()` returns. `state()` may fail on some ranks: that raises StepFailed on all, like any other error here."""
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    ranks = Ranks(group, f"the checkpoint {path} could not be written")
    writer, planner = ChecksumWriter(aside), SavePieces()

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
        with naming_the_cause():
            return writer.write_data(planner.finish_plan(mine), planner).value(), writer.files

    def finish(written: list[tuple[Any, Files]]) -> list[None]:
        assert metadata is not None
        writer.finish(metadata, [results for results, _ in written])
        writer.write_bytes(REST, held.rest)
        files = {name: entry for part in (*(files for _, files in written), writer.files) for name, entry in part.items()}
        files[METADATA] = files.pop(f"{METADATA}.tmp")  # DCP writes it under this name and renames it
        write_manifest(aside, files, held.metrics)
        sync_folder(aside)
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
    """OSError, before anything is written, where the disk has too little space for what all ranks are going to write."""
    items = [item for plan in plans for item in plan.items]
    sizes = (math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize for item in items)
    needed = sum(sizes) + rest + 2048 * len(items)  # each tensor is a zip archive with headers, and has an entry in .metadata
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"not enough disk space: {needed:,} bytes needed, {free:,} free", str(folder.parent))


def _replace(path: Path, aside: Path) -> None:
    """Renames `aside` to `path`. If a checkpoint of that name existed before, there is a complete one at every moment."""
    old = _replaced(path)
    shutil.rmtree(old, ignore_errors=True)
    if not path.exists():
        aside.rename(path)
    elif exchange(aside, path):
        aside.rename(old)
    else:
        path.rename(old)  # if the process is killed between these two lines, _recover undoes the first
        aside.rename(path)
    sync_folder(path.parent)  # the renames themselves
    shutil.rmtree(old, ignore_errors=True)


def _recover(path: Path) -> None:
    """Renames an old checkpoint back that `_replace` had moved away when it was killed, on a file system that cannot exchange two names."""
    if not path.exists() and _replaced(path).exists():
        _replaced(path).rename(path)


def tidy(folder: Path) -> None:
    """Removes what interrupted saves and removals left in a run's checkpoints/. No other process may be saving there."""
    for left in sorted(Path(folder).glob("step-*.tmp")) if Path(folder).is_dir() else []:
        if left.is_dir():  # a .tmp file may belong to a conversion in progress
            _recover(left.with_name(left.name.removesuffix(".tmp").removesuffix(".old")))
            shutil.rmtree(left, ignore_errors=True)


def _replaced(path: Path) -> Path:
    return path.with_name(path.name + ".old.tmp")


# --- steps that succeed on all ranks or fail on all


class StepFailed(RuntimeError):
    """Raised on all ranks when a step failed on one. The message names the rank and its error."""


def _each(results: list[Any]) -> list[Any]:
    return results


class Ranks:
    """The ranks of `group`, or this process alone for None. `failure` is the beginning of StepFailed's message."""

    def __init__(self, group: dist.ProcessGroup | None, failure: str):
        self.group, self.failure = group, failure
        self.rank, self.size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def step(self, work: Callable[[], T], join: Callable[[list[T]], list[R]] = _each) -> R:
        """Runs `work()` on every rank, then `join` on the first rank with the results of all; returns this rank's entry of what `join` returns.

        An exception in either raises StepFailed on all ranks, after all have reached this point, so that no rank waits for one that has left.
        (Without a group, an OSError becomes StepFailed; any other exception is raised as it is.)
        """
        if self.group is None:
            try:
                return join([work()])[0]
            except OSError as error:
                raise StepFailed(f"{self.failure}: {type(error).__name__}: {error}") from error
        mine, error = _attempt(work)
        note = None if error is None else f"{type(error).__name__}: {error}"
        results: list[Any] = [None] * self.size
        dist.gather_object((mine, note), results if self.is_first else None, group=self.group, group_dst=0)
        answers: list[Any] | None = None
        if self.is_first:
            failed = [f"rank {rank}: {note}" for rank, (_, note) in enumerate(results) if note is not None]
            joined: Any = None
            if not failed:
                joined, error = _attempt(lambda: join([value for value, _ in results]))
                failed = [] if error is None else [f"rank 0: {type(error).__name__}: {error}"]
            answers = [(None, "; ".join(failed))] * self.size if failed else [(answer, None) for answer in joined]
        got: list[Any] = [None]
        dist.scatter_object_list(got, answers, group=self.group, group_src=0)
        answer, failures = got[0]
        if failures is not None:
            raise StepFailed(f"{self.failure}: {failures}") from error
        return answer


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


# --- files


class ChecksumWriter(dcp.FileSystemWriter):
    """DCP's writer, one file for each process, flushed to disk. `files` has the size and CRC-32 of each file this process has written, computed
    from the bytes in memory, so that an error on the way to the disk is detected too."""

    def __init__(self, path: Path):
        super().__init__(path, single_file_per_rank=True, sync_files=True)
        self.files: Files = {}
        self.fs = _ChecksumFiles(self.files)

    def write_bytes(self, name: str, content: bytes) -> None:
        with self.fs.create_stream(Path(self.path) / name, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())


class _ChecksumFiles(FileSystem):
    def __init__(self, files: Files):
        self.files = files

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            counted = _ChecksumStream(stream)
            yield counted
        self.files[Path(path).name] = (counted.size, counted.crc)


class _ChecksumStream:
    """A stream, written from start to end, that computes size and checksum of what passes through."""

    def __init__(self, stream: Any):
        self._stream = stream
        self.flush, self.fileno, self.close, self.tell = stream.flush, stream.fileno, stream.close, stream.tell
        self.size = self.crc = 0

    def write(self, content: Any) -> int:
        self.crc = zlib.crc32(content, self.crc)
        self.size += memoryview(content).nbytes
        return self._stream.write(content)


def exchange(a: Path, b: Path) -> bool:
    """Swaps two paths in one atomic operation. False where that is not possible: it takes Linux and a local file system, most of which can."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    here, both = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(a), here, os.fsencode(b), both) == 0


@contextmanager
def naming_the_cause() -> Iterator[None]:
    """On a full disk, torch.save raises "unexpected pos 704 vs 598". Raises the OSError that caused it instead."""
    try:
        yield
    except RuntimeError as error:
        cause = error.__context__
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        raise cause from None


def sync_folder(folder: Path) -> None:
    """Flushes a folder to disk, so that renames in it survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
