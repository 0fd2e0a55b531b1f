"""DCP's writer, which adds up checksums of what it writes on the way; and the exchange of two names."""

from __future__ import annotations

import ctypes
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem

from .manifest import Files


class SummingWriter(dcp.FileSystemWriter):
    """A file for each process, flushed to disk. `files`: what this process has written; the sums are of what was meant, not of what arrived."""

    def __init__(self, path: Path):
        super().__init__(path, single_file_per_rank=True, sync_files=True)
        self.files: Files = {}
        self.fs = _Summing(self.files)

    def write_bytes(self, name: str, content: bytes) -> None:
        with self.fs.create_stream(Path(self.path) / name, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())


class _Summing(FileSystem):
    def __init__(self, files: Files):
        self.files = files

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            summed = _Summed(stream)
            yield summed
        self.files[Path(path).name] = (summed.size, summed.crc)


class _Summed:
    """A stream that is written from start to end."""

    def __init__(self, stream: Any):
        self._stream = stream
        self.flush, self.fileno, self.close, self.tell = stream.flush, stream.fileno, stream.close, stream.tell
        self.size = self.crc = 0

    def write(self, content: Any) -> int:
        self.crc = zlib.crc32(content, self.crc)
        self.size += memoryview(content).nbytes
        return self._stream.write(content)


def exchange(a: Path, b: Path) -> bool:
    """Two paths change places at once, where the system can do that: Linux, on most local file systems."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    here, both = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(a), here, os.fsencode(b), both) == 0
