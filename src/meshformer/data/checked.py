"""A cache of folders named by the hash of their settings. One process builds a folder; every use verifies its checksums. Imports no torch.

``checksums.json`` in a folder holds a CRC-32 for each block of 4 MiB of its files, and the hash of the settings (source, tokenizer, …) it was
built from. A folder that fails the check is rebuilt, with one line of warning.

Reading gigabytes at each start would be slow. So a file beside the folder, ``….checked``, records size, times and inode of every file that was
verified completely. While these are unchanged, a start verifies files of up to 64 MiB completely, and of a larger file the first block, the last
and 30 others, which rotate from start to start. After any write to a file they differ, and all blocks are verified again. Of several processes
that start together, the first verifies under a lock, and the others rely on its record.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from meshformer.config.errors import ConfigError
from meshformer.printing import say

log = logging.getLogger(__name__)

SUMS, BLOCK, WHOLE, IN_TURN = "checksums.json", 4 << 20, 64 << 20, 30
_IMPORTED = time.time()
Stamp = list[int]


def built_once(settings: dict[str, Any], cache: str | Path, build: Callable[[Path], None]) -> Path:
    """Return the folder below ``cache`` that is named by the hash of ``settings``. If it is missing or fails the check, ``build`` fills it; of
    several processes that call this at the same time, one builds and the others wait."""
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    folder = Path(cache).expanduser() / "prepared" / key[:16]
    if _checked_since(folder, _began()):  # verified by another rank or job since this process started
        return folder
    lock = FileLock(f"{folder}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        if folder.is_dir() and check(folder, key) is None:  # a read-only cache; a folder is renamed into place only when complete
            return folder
        raise _unwritable(cache, error) from error
    try:
        if _checked_since(folder, _began()):
            return folder
        fault = check(folder, key) if folder.is_dir() else None
        if fault is not None:
            say(f"prepared data in {folder} is not used: {fault}. Preparing it anew.", error=True, one_line=True)
        if fault is not None or not folder.is_dir():
            _build(folder, key, build)
    except OSError as error:
        raise _unwritable(cache, error) from error
    finally:
        lock.release()
    return folder


def check(folder: Path, key: str) -> str | None:
    """Return what is wrong with the folder, in a few words, or None. Verifies the blocks that the module docstring names, and records it."""
    try:
        content = json.loads((folder / SUMS).read_bytes())
        told, files = content.pop("crc32"), content["files"]
        if told != _own_sum(content):
            return f"{SUMS} is damaged"
        if content["key"] != key:
            return "it was made from other data or with another tokenizer"
        sizes = {name: int(entry["bytes"]) for name, entry in files.items()}
        sums = {name: list(entry["crc32"]) for name, entry in files.items()}
    except FileNotFoundError:
        return f"it has no {SUMS}, as older versions left it"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{SUMS} is damaged"
    for name, size in sizes.items():
        try:
            found = os.stat(folder / name).st_size
        except OSError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found:,} bytes instead of {size:,}"
    note, stamps = _note(folder), _stamps(folder, sizes)
    known, turn = note.get("files") == stamps, note.get("turn", 0)
    for name, size in sizes.items():
        blocks = range(len(sums[name]))
        if known and size > WHOLE:
            first = turn * IN_TURN
            blocks = sorted({0, blocks[-1], *((first + i) % len(blocks) for i in range(IN_TURN))})
        try:
            if any(sums[name][i] != found for i, found in zip(blocks, _sums(folder / name, blocks), strict=True)):
                return f"the checksum of {name} differs"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    _write_note(folder, stamps, turn + 1 if known else 0)
    return None


def _build(folder: Path, key: str, build: Callable[[Path], None]) -> None:
    log.info("preparing tokens in %s", folder)
    for leftover in folder.parent.glob(f".{folder.name}-*"):  # left by a process that was killed while it held the lock
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        build(temporary)
        names = sorted(path.name for path in temporary.iterdir())
        content: dict[str, Any] = {"key": key, "files": {name: _entry(temporary / name) for name in names}}
        (temporary / SUMS).write_text(json.dumps({**content, "crc32": _own_sum(content)}), encoding="utf-8")
        temporary.chmod(0o755)  # mkdtemp makes it private; a cache may be shared
        with suppress(FileNotFoundError):  # a folder that failed the check; processes that have its files open can still read them
            os.rename(folder, folder.with_name(f".{folder.name}-unfit-{temporary.name[-8:]}"))
        os.replace(temporary, folder)
        _write_note(folder, _stamps(folder, names), 0)
    finally:
        for left in folder.parent.glob(f".{folder.name}-*"):
            shutil.rmtree(left, ignore_errors=True)


def _unwritable(cache: str | Path, error: Exception) -> ConfigError:
    return ConfigError(f"cannot write the data cache ({error})", "paths.data", cache, "Name a folder you may write to")


# --- sums


def _entry(path: Path) -> dict[str, Any]:
    size = os.stat(path).st_size
    return {"bytes": size, "crc32": list(_sums(path, range(-(-size // BLOCK))))}


def _sums(path: Path, blocks: Iterable[int]) -> Iterable[int]:
    """CRC-32 of the file's blocks with these numbers, in parallel: zlib and `os.pread` release the GIL."""
    with open(path, "rb", buffering=0) as file, ThreadPoolExecutor(_threads()) as pool:
        yield from pool.map(lambda number: zlib.crc32(os.pread(file.fileno(), BLOCK, number * BLOCK)), blocks)


def _threads() -> int:
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _own_sum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


# --- the record beside a folder (….checked): which files were verified completely, and when


def stamp(path: Path) -> Stamp:
    """Size, modification and change time, inode: they differ after every write, since a program cannot reset the change time."""
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _stamps(folder: Path, names: Iterable[str]) -> dict[str, Stamp]:
    return {name: stamp(folder / name) for name in names}


def _note(folder: Path) -> dict[str, Any]:
    try:
        note = json.loads(Path(f"{folder}.checked").read_bytes())
        return note if isinstance(note["files"], dict) and isinstance(note["turn"], int) and isinstance(note["time"], float) else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _write_note(folder: Path, stamps: dict[str, Stamp], turn: int) -> None:
    write_json(Path(f"{folder}.checked"), {"files": stamps, "turn": turn, "time": time.time(), "sums": stamp(folder / SUMS)})


def _checked_since(folder: Path, moment: float) -> bool:
    note = _note(folder)
    try:
        same = bool(note) and note["time"] >= moment and note.get("sums") == stamp(folder / SUMS)
        return same and _stamps(folder, note["files"]) == note["files"]
    except OSError:
        return False


def _began() -> float:
    """When this process started, from /proc on Linux; on other systems, when this module was imported."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return _IMPORTED


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write the file atomically (temporary file and rename). Does nothing where the folder is not writable."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    with suppress(OSError):
        temporary.write_text(json.dumps(content), encoding="utf-8")
        os.replace(temporary, path)
