"""What PyTorch's caching allocator would reserve on a GPU for a sequence of allocations: more than is ever alive at once, because of fragmentation.

The rules of c10/cuda/CUDACachingAllocator.cpp with its default settings: sizes are rounded up to 512 bytes; up to 1 MiB come from segments of 2 MiB,
up to 10 MiB from segments of 20 MiB, and larger ones from a segment of their own, rounded up to 2 MiB. The smallest free block that is large enough
is taken and, if enough is left, split; a freed block is joined with free neighbours. Segments are not given back.
Left out: what happens when the device is full (cached segments are freed then, and the step takes longer), and rounding of streams' pools.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20
SMALL, MEDIUM = MIB, 10 * MIB


@dataclass(eq=False)
class Block:
    size: int
    before: Block | None = None  # its neighbours in the segment
    after: Block | None = None
    free: bool = True


class Reserve:
    """One pool: `reserved` bytes, which never fall. Blocks have the caller's keys."""

    def __init__(self) -> None:
        self.reserved = 0
        self._free: dict[bool, set[Block]] = {True: set(), False: set()}  # whether small -> blocks
        self._used: dict[int, tuple[Block, bool]] = {}

    def take(self, key: int, size: int) -> None:
        size = -(-max(size, 1) // 512) * 512
        small = size <= SMALL
        free = self._free[small]
        block = min((b for b in free if b.size >= size), key=lambda b: b.size, default=None)
        if block is None:
            block = Block(2 * MIB if small else 20 * MIB if size < MEDIUM else -(-size // (2 * MIB)) * 2 * MIB)
            self.reserved += block.size
        free.discard(block)
        if block.size - size >= (512 if small else SMALL + 1):
            rest = Block(block.size - size, block, block.after)
            if block.after is not None:
                block.after.before = rest
            block.size, block.after = size, rest
            free.add(rest)
        block.free = False
        self._used[key] = block, small

    def give(self, key: int) -> None:
        block, small = self._used.pop(key)
        for other in (block.before, block.after):
            if other is None or not other.free:
                continue
            self._free[small].discard(other)
            block.size += other.size
            if other is block.before:
                block.before = other.before
                if other.before is not None:
                    other.before.after = block
            else:
                block.after = other.after
                if other.after is not None:
                    other.after.before = block
        block.free = True
        self._free[small].add(block)
