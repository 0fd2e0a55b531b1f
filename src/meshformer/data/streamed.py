"""Streams of text and tokens, so that the memory for tokenizing does not grow with the corpus. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from meshformer.config.errors import ConfigError
from meshformer.data.tokenizer import Tokens, code_points, in_order, token_type

PIECE = 1 << 20  # characters
_POINTS = 0x110000


class Stream:
    """Yields a corpus in pieces of at most ``PIECE`` characters; may be iterated repeatedly. Without ``pieces()``, ``text()`` is called once."""

    def __init__(self, source: Any) -> None:
        self._source, self._text = source, None if hasattr(source, "pieces") else source.text()

    def pieces(self) -> Iterator[str]:
        for piece in self._source.pieces() if self._text is None else (self._text,):
            for start in range(0, len(piece), PIECE):
                yield piece[start : start + PIECE]

    def part(self, first: int, end: int) -> Iterator[str]:
        """The characters [``first``, ``end``) in pieces."""
        at = 0
        for piece in self.pieces():
            if at + len(piece) > first:
                yield piece[max(first - at, 0) : end - at]
            at += len(piece)
            if at >= end:
                return
        raise ConfigError("the text became shorter while it was read", "data.source", fix="Leave it alone until it is prepared")

    @cached_property
    def _survey(self) -> tuple[int, str]:
        seen, length = np.zeros(_POINTS, dtype=bool), 0
        for n, points in in_order(_distinct, self.pieces()):
            seen[points] = True
            length += n
        return length, np.flatnonzero(seen).astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")

    @property
    def length(self) -> int:
        """The length in characters."""
        return self._survey[0]

    @property
    def characters(self) -> str:
        """The distinct characters, in code point order."""
        return self._survey[1]


def write_tokens(path: Path, pieces: Iterable[Tokens], vocab_size: int) -> None:
    """Write the concatenated ids as one ``.npy`` file, byte for byte as ``np.save`` would."""
    dtype = np.dtype(token_type(vocab_size))
    about: dict[str, Any] = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
    with open(path, "wb") as file:
        # NumPy pads the header, so the final length fits into it afterwards.
        np.lib.format.write_array_header_1_0(file, {**about, "shape": (0,)})
        begin, n = file.tell(), 0
        for ids in pieces:
            file.write(np.ascontiguousarray(ids, dtype).data)
            n += len(ids)
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, {**about, "shape": (n,)})
        assert file.tell() == begin


def _distinct(piece: str) -> tuple[int, Any]:
    points = code_points(piece)
    seen = np.zeros(int(points.max(initial=0)) + 1, dtype=bool)
    seen[points] = True
    return len(piece), np.flatnonzero(seen)
