"""Which checkpoints a run has, and whether their files are whole. No torch, so that a command can refuse a damaged checkpoint at once.

Every checkpoint folder has a manifest.json with the size and the CRC-32 of each of its files, written last. CRC-32 detects accidental damage,
not forgery; it takes a third of a second a gigabyte (3.2 GiB/s on one core here; sha256 1.3, blake2b 0.5).
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from meshformer.config.errors import ConfigError
from meshformer.config.paths import CHECKPOINT
from meshformer.config.resolve import external_launcher
from meshformer.printing import say

MANIFEST, METADATA, REST = "manifest.json", ".metadata", "trainer.pt"
PARTS = (METADATA, REST)  # files that every checkpoint folder has
SINGLE, WEIGHTS = ".ckpt", ".safetensors"  # a whole checkpoint in one file; the weights alone
CHUNK = 4 << 20
Files = dict[str, tuple[int, int]]  # name: (bytes, CRC-32)


class ForeignFormat(NamedTuple):
    """The format of another program. checkpoint/read.py reads the weights of such a folder like those of a checkpoint."""

    recognises: Callable[[Path], bool]
    read: Callable[[Path], Mapping[str, Any]]  # parameters by name; imports torch


FOREIGN_FORMATS: list[ForeignFormat] = []
# Modules that append to FOREIGN_FORMATS when they are imported. They stand on a higher floor, so they are named here and imported at the first look.
PROVIDERS = ("meshformer.huggingface",)

# {path: (state of its files, problem)} of the checkpoints that this process, or the one that started it, has verified.
VERIFIED: dict[str, tuple[Any, str | None]] = {}


# --- finding


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def candidates(run: Path) -> list[Path]:
    """Every file and folder of the run that is named like a checkpoint, oldest first, whole or damaged."""
    found = [p for p in (Path(run) / "checkpoints").glob("step-*") if CHECKPOINT.fullmatch(p.name)]
    return sorted(found, key=lambda p: (step_of(p), p.is_dir()))


def checkpoints(run: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first: folders, and single files that `meshformer convert` wrote. Checksums are not compared."""
    return [p for p in candidates(run) if is_complete(p)]


def is_complete(checkpoint: Path) -> bool:
    """Whether all files exist and have the recorded size. A single file gets its name only once it is complete."""
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
    """What is wrong with a checkpoint, or None, from the checksums of all its files. They are read again only after one of them changed."""
    return _verify(checkpoint)[0]


def _verify(checkpoint: Path) -> tuple[str | None, bool]:
    """(what `damage` returns, whether it was known without reading the files again)."""
    checkpoint = Path(checkpoint).absolute()
    state = _state_of_files(checkpoint)
    known = VERIFIED.get(str(checkpoint))
    if known is not None and known[0] == state:
        return known[1], True
    try:
        (check_single if checkpoint.suffix == SINGLE else check_sums)(checkpoint)
        found = None
    except Damaged as damaged:
        found = str(damaged)
    VERIFIED[str(checkpoint)] = (state, found)
    return found, False


def _state_of_files(checkpoint: Path) -> Any:
    """Name, size, time and inode of each file: a value that changes when a file is replaced or written to."""
    try:
        files = [checkpoint] if checkpoint.is_file() else sorted(Path(entry) for entry in os.scandir(checkpoint))
        stats = [(file.name, file.stat()) for file in files]
    except OSError:
        return None
    return tuple((name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in stats)


def step_of(checkpoint: Path) -> int:
    match = CHECKPOINT.fullmatch(Path(checkpoint).name)
    if match is None:
        raise ConfigError(f"{checkpoint} is not named like a checkpoint", fix="Checkpoints are named step-00000500.")
    return int(match[1])


def foreign_formats() -> list[ForeignFormat]:
    for name in PROVIDERS:
        import_module(name)
    return FOREIGN_FORMATS


def is_foreign(path: Path) -> bool:
    """Whether `path` holds weights without the state of a run: a .safetensors file, or a folder of another program."""
    return path.suffix == WEIGHTS or any(known.recognises(path) for known in foreign_formats())


def latest_checkpoint(run: Path, key: str = "run") -> Path:
    """The newest undamaged checkpoint of the run folder `run`, verified by checksums. If `run` is a checkpoint or foreign weights, `run` itself.

    The first process reports each newer, damaged checkpoint on stderr. ConfigError naming `key` when the run has no checkpoint, when all are
    damaged, or when the one that was named is. All processes that see the same files return the same path.
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
        problem, reported = _verify(found)
        if problem is None:
            return found
        damaged.append(problem)
        if not reported and (around is None or around.rank == 0):
            say(f"damaged checkpoint skipped: {found.parent / problem}", error=True)
    if damaged:
        fix = "Restore the files from a copy, or start a new run."
        raise ConfigError(f"every checkpoint of the run is damaged: {'; '.join(damaged)}", key, str(run), fix=fix)
    raise ConfigError(f"{run} holds no checkpoint", key=key, value=str(run), fix="Name a run folder that has checkpoints/step-…")


# --- manifest.json


class Damaged(Exception):
    """The message names a file and its problem: `step-00000500/__1_0.distcp: 1,024 bytes instead of 4,096`."""


@dataclass(frozen=True)
class Manifest:
    files: Files
    metrics: dict[str, float]  # of the validation at this step; empty where there was none


def write_manifest(folder: Path, files: Files, metrics: Mapping[str, float] | None = None) -> None:
    """Writes manifest.json, the last file of a checkpoint folder, and flushes it to disk."""
    listed = {name: {"bytes": size, "crc32": f"{crc:08x}"} for name, (size, crc) in sorted(files.items())}
    content: dict[str, Any] = {"files": listed, "metrics": dict(metrics or {})}
    with open(Path(folder) / MANIFEST, "w", encoding="utf-8") as file:
        json.dump({**content, "crc32": _own_sum(content)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """Raises Damaged."""
    folder = Path(folder)
    place = f"{folder.name}/{MANIFEST}"
    if not folder.is_dir():
        raise Damaged(f"{folder.name}: missing")
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        own_sum = content.pop("crc32")
        files = {name: (entry["bytes"], int(entry["crc32"], 16)) for name, entry in content["files"].items()}
        metrics = {name: float(value) for name, value in content["metrics"].items()}
        if not all(isinstance(size, int) for size, _ in files.values()):
            raise ValueError
    except FileNotFoundError:
        raise Damaged(f"{place}: missing (not all was copied, or it was saved before checkpoints had one)") from None
    except OSError as error:
        raise Damaged(f"{place}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # ValueError: it is not UTF-8 or not JSON
        raise Damaged(f"{place}: no whole manifest") from None
    if own_sum != _own_sum(content):
        raise Damaged(f"{place}: checksum differs")
    if any(Path(name).name != name or name == ".." for name in files) or not files.keys() >= set(PARTS):
        raise Damaged(f"{place}: does not list the files of a checkpoint")
    return Manifest(files, metrics)


def check_sizes(folder: Path) -> Manifest:
    """Raises Damaged unless every file exists and has its recorded size. Takes milliseconds."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name, (size, _) in manifest.files.items():
        try:
            found = os.stat(folder / name).st_size
        except OSError:
            raise Damaged(f"{folder.name}/{name}: missing") from None
        if found != size:
            raise Damaged(f"{folder.name}/{name}: {found:,} bytes instead of {size:,}")
    return manifest


def check_sums(folder: Path) -> Manifest:
    """Raises Damaged unless every file has its recorded size and checksum. Reads all files."""
    folder = Path(folder)
    manifest = check_sizes(folder)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # zlib releases the GIL
        for name, found in zip(manifest.files, pool.map(lambda name: _sum_of(folder / name), manifest.files), strict=True):
            if isinstance(found, OSError):
                raise Damaged(f"{folder.name}/{name}: cannot be read ({found.strerror})")
            if found != manifest.files[name][1]:
                raise Damaged(f"{folder.name}/{name}: checksum differs")
    return manifest


def check_single(file: Path) -> None:
    """Raises Damaged unless the single file is intact. It is a zip archive written by torch.save, whose members have checksums of their own."""
    file = Path(file)
    try:
        with zipfile.ZipFile(file) as archive:
            differing = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, EOFError, zlib.error, RuntimeError) as error:
        raise Damaged(f"{file.name}: no whole archive ({error})") from None
    except OSError as error:
        raise Damaged(f"{file.name}: cannot be read ({error.strerror or error})") from None
    if differing is not None:
        raise Damaged(f"{file.name}: checksum of {differing} differs")


def _own_sum(content: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def _sum_of(file: Path) -> int | OSError:
    buffer, total = memoryview(bytearray(CHUNK)), 0
    try:
        with open(file, "rb", buffering=0) as stream:
            while read := stream.readinto(buffer):
                total = zlib.crc32(buffer[:read], total)
    except OSError as error:
        return error
    return total
