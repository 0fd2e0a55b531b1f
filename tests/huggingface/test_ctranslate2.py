"""CTranslate2's file format, from a file written here as its specification says."""

from __future__ import annotations

import struct

import numpy as np

from meshformer.huggingface.pinned import _ctranslate2


def written(tensors: dict[str, np.ndarray]) -> bytes:
    def text(word: str) -> bytes:
        return struct.pack("<H", len(word) + 1) + word.encode() + b"\0"

    content = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(tensors))
    for name, value in tensors.items():
        kind = {"float32": 0, "float16": 4}[str(value.dtype)]
        content += text(name) + struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape) + struct.pack("<BI", kind, value.nbytes) + value.tobytes()
    return content


def test_variables_are_read_by_name() -> None:
    given = {"a/weight": np.arange(6, dtype=np.float16).reshape(2, 3), "b": np.float32([1.5]), "scalar": np.array(2, np.float32)}
    found = _ctranslate2(written(given))
    assert found.keys() == given.keys()
    assert all(np.array_equal(found[name], given[name]) and found[name].shape == given[name].shape for name in given)
