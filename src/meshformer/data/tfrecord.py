"""TFRecord files, TensorFlow's format of records, read by their number and written, without TensorFlow. Imports no torch.

A record is: its length (8 bytes), a checksum of the length (4), the data, a checksum of the data (4), little-endian; the checksums are
CRC-32C, rotated by 15 bits and moved by a constant ("masked"). A file may be compressed as a whole, by gzip or zlib.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from meshformer.config.errors import ConfigError
from meshformer.data.checked import built_once
from meshformer.data.digests import sha256_of

HEADER, FOOTER = 12, 4
_LAYOUT = 1  # version of the cached index; part of its key
_READ, _PART = 1 << 20, 1 << 16  # bytes that are read at a time, of a plain and of a compressed file
INDEX, UNPACKED = "index.npy", "records"  # the files of a cached index: (n, 2) offset and length of the data; the decompressed file


def check_installed(key: str = "data") -> None:
    """ConfigError without the package that computes the checksums: in plain Python they would take a minute for 100 MB."""
    if importlib.util.find_spec("google_crc32c") is None:
        raise ConfigError(
            "the checksums of TFRecord files need the package google-crc32c", key, "tfrecord", "Run `pip install 'meshformer[tfrecord]'`."
        )


def masked_crc(data: bytes) -> int:
    """The checksum that stands behind a length and behind the data of a record."""
    import google_crc32c

    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


class RecordFiles:
    """The records of several files, one after the other: `records[i]` are the bytes of a record. Both checksums are verified at every reading.

    Args:
        files: paths of TFRecord files, plain or compressed.
        cache: where the index of each file is kept, and the decompressed records of a compressed file. They are made once.

    ConfigError names the file and the offset of what is damaged (for a compressed file, the offset after decompression).
    """

    def __init__(self, files: Sequence[str | Path], cache: str | Path) -> None:
        self.paths, self._cache = [Path(file).expanduser() for file in files], cache
        self._open: dict[int, int] = {}  # number of a file -> its descriptor

    @cached_property
    def _folders(self) -> list[Path]:
        check_installed()
        return [_indexed(path, self._cache) for path in self.paths]

    @cached_property
    def _indices(self) -> list[npt.NDArray[np.int64]]:
        return [np.load(folder / INDEX, mmap_mode="r", allow_pickle=False) for folder in self._folders]

    @cached_property
    def _ends(self) -> list[int]:
        return np.cumsum([len(index) for index in self._indices]).tolist()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: int) -> bytes:
        if not 0 <= number < len(self):
            raise IndexError(number)
        file, row = self._at(number)
        offset, length = (int(value) for value in self._indices[file][row])
        try:
            data = os.pread(self._descriptor(file), HEADER + length + FOOTER, offset - HEADER)
        except OSError as error:
            raise ConfigError(f"cannot read it ({error.strerror})", "data.files", self.paths[file]) from error
        return next(_records(iter((data,)), self.paths[file], offset - HEADER, row))[1]

    def place(self, number: int) -> str:
        """Where the record stands, for error messages: its number in its file, from 1."""
        file, row = self._at(number)
        return f"record {row + 1:,} of {self.paths[file]}"

    def identity(self) -> list[str]:
        """The SHA-256 of each file."""
        return [_sha256(path, self._cache) for path in self.paths]

    def _at(self, number: int) -> tuple[int, int]:
        file = bisect_right(self._ends, number)
        return file, number - (self._ends[file - 1] if file else 0)

    def _descriptor(self, file: int) -> int:
        if file not in self._open:
            unpacked = self._folders[file] / UNPACKED
            if len(self._open) > 100:  # descriptors are few on some systems
                self.close()
            self._open[file] = os.open(unpacked if unpacked.exists() else self.paths[file], os.O_RDONLY)
        return self._open[file]

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:  # a descriptor belongs to its process
        return {"paths": self.paths, "_cache": self._cache, "_open": {}}

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):
            self.close()


def read_records(path: str | Path) -> Iterator[bytes]:
    """The records of one file in order, plain or compressed, without an index. ConfigError where it is damaged."""
    check_installed()
    with open(path, "rb") as file:
        yield from (data for _, data in _records(_bytes_of(file, Path(path)), Path(path)))


def write_records(path: Path, records: Iterable[bytes]) -> list[tuple[int, int]]:
    """Write a plain file, which must be new. Returns (offset, length) of each whole record, its header and checksums included."""
    check_installed("to")
    at, places = 0, []
    with open(path, "xb") as file:
        for data in records:
            length = struct.pack("<Q", len(data))
            file.write(length + struct.pack("<I", masked_crc(length)) + data + struct.pack("<I", masked_crc(data)))
            places.append((at, HEADER + len(data) + FOOTER))
            at += places[-1][1]
    return places


def is_compressed(path: Path) -> bool:
    """Whether the file is compressed, by its first bytes."""
    with open(path, "rb") as file:
        return _compressed(file.read(HEADER))


def _compressed(head: bytes) -> bool:
    if len(head) == HEADER and struct.unpack("<I", head[8:])[0] == masked_crc(head[:8]):
        return False  # a length may look like the first bytes of a compressed file
    return head[:2] == b"\x1f\x8b" or (len(head) > 1 and head[0] == 0x78 and (head[0] << 8 | head[1]) % 31 == 0)


def _indexed(path: Path, cache: str | Path) -> Path:
    """The folder of the file's index. It is made at first use, which verifies all checksums of the file."""

    def build(folder: Path) -> None:
        compressed = is_compressed(path)
        if compressed:
            with open(path, "rb") as file, open(folder / UNPACKED, "wb") as unpacked:
                for piece in _bytes_of(file, path):
                    unpacked.write(piece)
        with open(folder / UNPACKED if compressed else path, "rb") as file:
            pieces = iter(lambda: file.read(_READ), b"")
            places = [(offset, len(data)) for offset, data in _records(pieces, path)]
        np.save(folder / INDEX, np.array(places, np.int64).reshape(-1, 2))

    return built_once({"tfrecord": _LAYOUT, "sha256": _sha256(path, cache)}, cache, build)


def _sha256(path: Path, cache: str | Path) -> str:
    try:
        return sha256_of(path, cache)
    except OSError as error:
        raise ConfigError(f"cannot read it ({error.strerror})", "data.files", path) from error


def _bytes_of(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """The file's bytes in pieces, decompressed where it is compressed."""
    head = file.read(HEADER)
    file.seek(0)
    if not _compressed(head):
        yield from iter(lambda: file.read(_READ), b"")
        return
    inflate, at = zlib.decompressobj(47), 0  # 47: gzip or zlib, by the header
    while True:
        read = file.read(_PART)
        while read:
            try:
                piece = inflate.decompress(read)
            except zlib.error as error:
                raise _damaged(f"its compressed bytes are damaged near offset {at:,} ({_said(error)})", path) from None
            if piece:
                yield piece
            at += len(read) - len(inflate.unused_data)
            read = inflate.unused_data
            if inflate.eof:  # gzip files may be concatenated
                inflate = zlib.decompressobj(47) if read else inflate
        if not file.peek(1):  # pyright: ignore[reportAttributeAccessIssue]  # a BufferedReader has it
            break
        if inflate.eof:
            inflate = zlib.decompressobj(47)
    if not inflate.eof:
        raise _damaged(f"its compressed bytes end early, at offset {at:,}", path)


def _said(error: zlib.error) -> str:
    return str(error).rpartition(": ")[2]


def _records(pieces: Iterator[bytes], path: Path, start: int = 0, first: int = 0) -> Iterator[tuple[int, bytes]]:
    """(offset of its data, data) of each record; `start` is the offset of the first piece, `first` the number of its record."""
    held, at, offset, number = b"", 0, start, first + 1  # the next record starts at held[at], which is the file's `offset`
    while True:
        held, at = _filled(held, at, pieces, HEADER)
        if len(held) == at:
            return
        if len(held) < at + HEADER:
            raise _damaged(f"it ends inside the header of record {number:,}, at offset {offset:,}", path, "Is it a whole copy?")
        size = held[at : at + 8]
        if struct.unpack_from("<I", held, at + 8)[0] != masked_crc(size):
            if offset == 0:
                raise _damaged("it is no TFRecord file, or damaged: the checksum of the first length differs, at offset 0", path)
            raise _damaged(f"the checksum of the length of record {number:,} differs, at offset {offset:,}", path)
        (length,) = struct.unpack("<Q", size)
        whole = HEADER + length + FOOTER
        held, at = _filled(held, at, pieces, whole)
        if len(held) < at + whole:
            message = f"it ends inside record {number:,}, which starts at offset {offset:,} and has {length:,} bytes"
            raise _damaged(message, path, "Is it a whole copy?")
        data = held[at + HEADER : at + HEADER + length]
        if struct.unpack_from("<I", held, at + HEADER + length)[0] != masked_crc(data):
            raise _damaged(f"the checksum of record {number:,} differs, at offset {offset:,}", path)
        yield offset + HEADER, data
        at, offset, number = at + whole, offset + whole, number + 1


def _filled(held: bytes, at: int, pieces: Iterator[bytes], size: int) -> tuple[bytes, int]:
    """A buffer and a place in it, from where on it has `size` bytes of the stream, where the stream has so many."""
    have = len(held) - at
    if have >= size:
        return held, at
    parts = [held[at:]]
    for piece in pieces:
        parts.append(piece)
        have += len(piece)
        if have >= size:
            break
    return b"".join(parts), 0


def _damaged(message: str, path: Path, fix: str = "Restore it from a copy, or leave it out.") -> ConfigError:
    return ConfigError(message, "data.files", path, fix)


def write_shards(folder: Path, split: str, records: Sequence[bytes] | Iterable[bytes], shard_bytes: int = 128 << 20) -> list[Path]:
    """Write `split-00000-of-0000N.tfrecord` with up to `shard_bytes` of data each into `folder`, and beside each `….idx`: a line "offset size"
    for each record, the index of DALI and of the `tfrecord` package. Returns the shards."""
    written: list[Path] = []
    rest = iter(records)
    head = next(rest, None)
    while head is not None:
        taken: list[bytes] = []
        have = 0
        while head is not None and (not taken or have + len(head) <= shard_bytes):
            taken.append(head)
            have += len(head)
            head = next(rest, None)
        shard = folder / f"{split}-{len(written):05d}.part"
        places = write_records(shard, taken)
        shard.with_suffix(".idx").write_text("".join(f"{offset} {size}\n" for offset, size in places), encoding="ascii")
        written.append(shard)
    names = [folder / f"{split}-{number:05d}-of-{len(written):05d}.tfrecord" for number in range(len(written))]
    for shard, name in zip(written, names, strict=True):
        shard.rename(name)
        shutil.move(shard.with_suffix(".idx"), f"{name}.idx")
    return names
