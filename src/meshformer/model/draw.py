"""Random initialisation that does not depend on the layout: a rank that holds a shard of a parameter draws that shard alone.

A large parameter is divided into tiles, each with a generator of its own. The value of an element is a function of the seed and the parameter's
name and shape, so every sharding gives the same weights.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WHOLE = 2**20  # parameters of at most this many elements are one tile; so is every matrix of the model sizes up to `micro`
TILE = 256  # rows and columns of a tile of a larger parameter


def _tile(shape: Sequence[int]) -> tuple[int, int]:
    return (shape[0], shape[1]) if math.prod(shape) <= WHOLE else (TILE, TILE)


def sizes(shape: Sequence[int], part: Sequence[slice] | None) -> list[int]:
    """The shape of `part` of a tensor; of all of it for None."""
    return list(shape) if part is None else [len(range(n)[where]) for n, where in zip(shape, part, strict=True)]


def normal(shape: Sequence[int], std: float, key: str, part: Sequence[slice] | None = None) -> Tensor:
    """`part` (default: all) of a tensor with two or more dimensions, drawn from N(0, `std`²). Each tile's generator is seeded by `key` and its place.

    The values are drawn on the CPU, so they are the same for every device.
    """
    part = part or [slice(None)] * len(shape)
    (top, bottom, _), (left, right, _) = (where.indices(n) for where, n in zip(part[:2], shape, strict=False))
    height, width = _tile(shape)
    values = torch.empty(sizes(shape, part), device="cpu")
    for row in range(top // height * height, bottom, height) if height else ():
        for column in range(left // width * width, right, width) if width else ():
            digest = hashlib.sha256((f"{key}/{row}/{column}" if (height, width) != tuple(shape[:2]) else key).encode()).digest()
            generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            below, beyond = min(row + height, shape[0]), min(column + width, shape[1])
            tile = torch.empty(below - row, beyond - column, *shape[2:], device="cpu").normal_(0.0, std, generator=generator)
            rows, columns = slice(max(row, top), min(below, bottom)), slice(max(column, left), min(beyond, right))
            values[_moved(rows, top), _moved(columns, left)] = tile[(_moved(rows, row), _moved(columns, column), *part[2:])]
    return values


def _moved(where: slice, start: int) -> slice:
    return slice(where.start - start, where.stop - start)


def fill_part(out: Tensor, part: Sequence[slice], shape: Sequence[int], value: Callable[..., Tensor]) -> None:
    """Writes `value()[part]` to `out`. Where `value` has a parameter `part`, only that part is computed, one row of tiles at a time."""
    if len(shape) < 2 or "part" not in inspect.signature(value).parameters:
        out.copy_(value()[tuple(part)])
        return
    (top, bottom, _), height = part[0].indices(shape[0]), max(1, _tile(shape)[0])
    for row in range(top // height * height, bottom, height):
        rows = slice(max(row, top), min(row + height, bottom))
        out[_moved(rows, top)] = value(part=(rows, *part[1:]))
