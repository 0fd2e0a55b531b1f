"""TensorFlow's `tf.train.Example`, read and written without TensorFlow or protobuf. Imports no torch.

An Example maps names to features; a feature is a list of bytes, of float32 or of int64. In protobuf:
Example {Features features = 1}; Features {map<string, Feature> feature = 1}; Feature {BytesList 1 | FloatList 2 | Int64List 3}, each list's
values in field 1. Numbers may be packed (one field with all of them) or not (a field each).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Feature = list[bytes] | npt.NDArray[np.float32] | npt.NDArray[np.int64]
VARINT, FIXED64, DELIMITED, FIXED32 = 0, 1, 2, 5  # protobuf's wire types
BYTES, FLOAT, INT64 = 1, 2, 3  # the fields of a Feature
LONGEST = 10  # bytes of a varint of 64 bits


def parse_example(data: bytes) -> dict[str, Feature]:
    """Name -> values. A feature that is there without a kind is an empty list. Raises ValueError with what is wrong, in a few words."""
    found: dict[str, Feature] = {}
    for field, _, features in _fields(data, (1, 2)):
        if field == 2:
            raise ValueError("it has feature lists: it is a SequenceExample, not an Example")
        for _, _, entry in _fields(features, (1,)):
            name, feature = b"", b""
            for part, _, value in _fields(entry, (1, 2)):
                name, feature = (value, feature) if part == 1 else (name, value)
            found[name.decode("utf-8", "replace")] = _feature(feature)
    return found


def serialize_example(features: Mapping[str, Sequence[bytes] | npt.NDArray[Any]]) -> bytes:
    """The Example as bytes. A list of bytes becomes a BytesList, an array of floats a FloatList, one of integers an Int64List."""
    entries = []
    for name, values in features.items():
        if not isinstance(values, np.ndarray):
            kind, body = BYTES, b"".join(_delimited(1, value) for value in values)
        elif values.dtype.kind == "f":
            kind, body = FLOAT, _delimited(1, values.astype("<f4").tobytes())
        else:
            kind, body = INT64, _delimited(1, _encode_varints(values.astype(np.int64).ravel().view(np.uint64)))
        entries.append(_delimited(1, _delimited(1, name.encode()) + _delimited(2, _delimited(kind, body))))
    return _delimited(1, b"".join(entries))


def _feature(data: bytes) -> Feature:
    kind, lists = 0, []
    for field, _, value in _fields(data, (BYTES, FLOAT, INT64)):
        lists = [*lists, value] if field == kind else [value]  # protobuf: another kind replaces, the same one is merged
        kind = field
    values = [entry for part in lists for entry in _fields(part, None if kind != BYTES else (1,))]
    if kind in (0, BYTES):
        return [value for _, _, value in values]
    packed = b"".join(value for field, wire, value in values if field == 1)
    if kind == FLOAT:
        if len(packed) % 4:
            raise ValueError("a list of floats ends inside a number")
        return np.frombuffer(packed, "<f4").astype(np.float32, copy=False)
    return _decode_varints(packed).view(np.int64)


def _fields(data: bytes, messages: tuple[int, ...] | None) -> Iterator[tuple[int, int, bytes]]:
    """(field, wire type, bytes) of each field; a varint as its encoded bytes. With `messages`, only these, which must be length-delimited."""
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        field, wire, start = key >> 3, key & 7, at
        if wire == DELIMITED:
            size, start = _varint(data, at)
            at = start + size
        elif wire == VARINT:
            _, at = _varint(data, at)
        elif wire in (FIXED32, FIXED64):
            at += 4 if wire == FIXED32 else 8
        else:
            raise ValueError(f"it is no tf.train.Example (a field of wire type {wire})")
        if at > end:
            raise ValueError("a field reaches beyond its end")
        if messages is None:
            yield field, wire, data[start:at]
        elif field in messages:
            if wire != DELIMITED:
                raise ValueError(f"it is no tf.train.Example (field {field} has wire type {wire})")
            yield field, wire, data[start:at]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 7 * LONGEST:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
    raise ValueError("a number is cut off")


def _decode_varints(data: bytes) -> npt.NDArray[np.uint64]:
    """All varints of `data`, which holds nothing else."""
    raw = np.frombuffer(data, np.uint8)
    last = np.flatnonzero(raw < 128)
    if len(raw) and (not len(last) or last[-1] != len(raw) - 1):
        raise ValueError("a list of integers ends inside a number")
    first = np.concatenate((np.zeros(min(1, len(last)), np.int64), last[:-1] + 1))
    sizes = last - first + 1
    if len(sizes) and sizes.max() > LONGEST:
        raise ValueError("an integer has more than 64 bits")
    values = np.zeros(len(last), np.uint64)
    for byte in range(int(sizes.max(initial=0))):
        there = sizes > byte
        values[there] |= (raw[first[there] + byte] & np.uint8(127)).astype(np.uint64) << np.uint64(7 * byte)
    return values


def _encode_varints(values: npt.NDArray[np.uint64]) -> bytes:
    sizes = np.ones(len(values), np.int64)
    for byte in range(1, LONGEST):
        sizes += values >> np.uint64(7 * byte) > 0
    first = np.cumsum(sizes) - sizes
    out = np.zeros(int(sizes.sum()), np.uint8)
    for byte in range(int(sizes.max(initial=0))):
        there = sizes > byte
        part = (values[there] >> np.uint64(7 * byte) & np.uint64(127)).astype(np.uint8)
        out[first[there] + byte] = part | (sizes[there] > byte + 1).astype(np.uint8) << np.uint8(7)
    return out.tobytes()


def _delimited(field: int, data: bytes) -> bytes:
    return _encode_varint(field << 3 | DELIMITED) + _encode_varint(len(data)) + data


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out) + struct.pack("B", value)
