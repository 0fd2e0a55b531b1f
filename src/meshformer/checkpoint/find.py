"""Which checkpoints a run has, and which of them may be loaded. No torch: a command finds out before it starts anything."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from meshformer.config.errors import ConfigError
from meshformer.config.paths import CHECKPOINT
from meshformer.config.resolve import external_launcher
from meshformer.printing import say

from .manifest import Damaged, check_single, check_sizes, check_sums

SINGLE, WEIGHTS = ".ckpt", ".safetensors"  # files that hold all of a checkpoint, and its weights alone


class ForeignFormat(NamedTuple):
    """A folder of another program, whose weights the readers of this room accept like those of a checkpoint."""

    recognises: Callable[[Path], bool]
    read: Callable[[Path], Mapping[str, Any]]  # parameters by name; imports torch


FOREIGN_FORMATS: list[ForeignFormat] = []  # filled by meshformer.huggingface when it is imported, which this room must not import itself

# Verified already, by this process or the one that started it: {path: (its files as they were then, what is wrong with it)}.
VERIFIED: dict[str, tuple[Any, str | None]] = {}


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def candidates(run: Path) -> list[Path]:
    """Everything in the run that is named like a checkpoint, oldest first; any of it may be damaged."""
    found = [p for p in (Path(run) / "checkpoints").glob("step-*") if CHECKPOINT.fullmatch(p.name)]
    return sorted(found, key=lambda p: (step_of(p), p.is_dir()))


def checkpoints(run: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first: folders, and single files that `meshformer convert` made. Their content is not read."""
    return [p for p in candidates(run) if is_complete(p)]


def is_complete(checkpoint: Path) -> bool:
    """All files are there and of the right size. Single files are renamed to their name when they are complete."""
    return _defect(checkpoint) is None


def _defect(checkpoint: Path) -> str | None:
    if checkpoint.suffix == SINGLE:
        return None if checkpoint.is_file() else f"{checkpoint.name}: missing"
    try:
        check_sizes(checkpoint)
    except Damaged as damaged:
        return str(damaged)
    return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, by the checksums of all of its content; None for nothing. Once for files that stay as they are."""
    return _verify(checkpoint)[0]


def _verify(checkpoint: Path) -> tuple[str | None, bool]:
    """(`damage`, whether that was known before)."""
    checkpoint = Path(checkpoint).absolute()
    look = _look(checkpoint)
    known = VERIFIED.get(str(checkpoint))
    if known is not None and known[0] == look:
        return known[1], True
    try:
        (check_single if checkpoint.suffix == SINGLE else check_sums)(checkpoint)
        found = None
    except Damaged as damaged:
        found = str(damaged)
    VERIFIED[str(checkpoint)] = (look, found)
    return found, False


def _look(checkpoint: Path) -> Any:
    """Changes when a file is replaced or written to."""
    try:
        files = [checkpoint] if checkpoint.is_file() else sorted(Path(entry) for entry in os.scandir(checkpoint))
        stats = [(file.name, file.stat()) for file in files]
    except OSError:
        return None
    return tuple((name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in stats)


def step_of(checkpoint: Path) -> int:
    match = CHECKPOINT.fullmatch(Path(checkpoint).name)
    if match is None:
        raise ConfigError(f"{checkpoint} is not named like a checkpoint", fix="checkpoints are named step-00000500")
    return int(match[1])


def is_foreign(path: Path) -> bool:
    """Whether `path` holds weights without the state of a run: a .safetensors file, or a folder of another program."""
    return path.suffix == WEIGHTS or any(known.recognises(path) for known in FOREIGN_FORMATS)


def latest_checkpoint(run: Path, key: str = "run") -> Path:
    """The newest checkpoint of a run folder that is whole, verified by checksums; a checkpoint RUN/checkpoints/step-… itself, or foreign weights.

    Every damaged one that is newer is told on stderr (by the first process). ConfigError naming `key` when there is none, when all are damaged,
    or when the one that was named is. Processes that see the same files find the same.
    """
    run = Path(run)
    if is_foreign(run):
        return run
    if CHECKPOINT.fullmatch(run.name) and run.exists() and not (run / "checkpoints").is_dir():
        if (problem := damage(run)) is not None:
            fix = "Name the run folder: the newest of its checkpoints that is whole is taken."
            raise ConfigError(f"the checkpoint is damaged: {problem}", key, str(run), fix=fix)
        return run
    around = external_launcher()
    damaged: list[str] = []
    for found in reversed(candidates(run)):
        problem, told = _verify(found)
        if problem is None:
            return found
        damaged.append(problem)
        if not told and (around is None or around.rank == 0):
            say(f"damaged checkpoint skipped: {found.parent / problem}", error=True)
    if damaged:
        fix = "Restore the files from a copy, or start a new run."
        raise ConfigError(f"every checkpoint of the run is damaged: {'; '.join(damaged)}", key, str(run), fix=fix)
    raise ConfigError(f"{run} holds no checkpoint", key=key, value=str(run), fix="name a run folder that has checkpoints/step-…")
