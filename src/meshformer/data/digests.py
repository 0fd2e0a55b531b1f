"""SHA-256 of files. For large files the hash is cached while size, times and inode are unchanged; hashing 1 GB takes seconds. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock

from meshformer.data.checked import stamp, write_json

LARGE, READ = 32 << 20, 1 << 20
_SETTLED = 2e9  # nanoseconds: two writes within one tick of the file system's clock leave the same modification time


def sha256_of(path: Path, cache: str | Path | None = None) -> str:
    """The SHA-256 in hexadecimal. ``cache``: the folder where hashes of large files are stored. Of several ranks, one reads."""
    found = stamp(path)
    if cache is None or found[0] < LARGE:
        return _read(path)
    memory, name = Path(cache).expanduser() / "prepared" / "digests.json", str(path.resolve())
    if (known := _known(memory, name, found)) is not None:
        return known
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{memory}.lock")
        lock.acquire()
        lock.release()
    except (OSError, NotImplementedError):  # the cache is not writable
        lock = nullcontext()
    with lock:
        if (known := _known(memory, name, found)) is not None:
            return known
        digest, now = _read(path), time.time_ns()
        if stamp(path) == found and max(found[1:3]) + _SETTLED < now:
            write_json(memory, {**_all(memory), name: {"stamp": found, "sha256": digest}})
        return digest


def _known(memory: Path, name: str, found: list[int]) -> str | None:
    entry = _all(memory).get(name)
    right = isinstance(entry, dict) and entry.get("stamp") == found and isinstance(entry.get("sha256"), str)
    return entry["sha256"] if right else None  # pyright: ignore[reportOptionalSubscript]


def _all(memory: Path) -> dict[str, Any]:
    try:
        content = json.loads(memory.read_bytes())
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def _read(path: Path) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(READ))
    with open(path, "rb", buffering=0) as file:
        while n := file.readinto(buffer):
            digest.update(buffer[:n])
    return digest.hexdigest()
