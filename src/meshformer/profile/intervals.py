"""Sets of time as sorted lists of disjoint intervals (start, end), and their arithmetic."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

Interval = tuple[float, float]
Intervals = list[Interval]  # sorted, disjoint, none empty


def union(intervals: Iterable[Interval]) -> Intervals:
    """The set covered by any of `intervals`, which may overlap and come in any order."""
    merged: list[list[float]] = []
    for start, end in sorted(interval for interval in intervals if interval[1] > interval[0]):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return [(start, end) for start, end in merged]


def intersection(a: Sequence[Interval], b: Sequence[Interval]) -> Intervals:
    """The time in both sets."""
    found: Intervals = []
    i = j = 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if end > start:
            found.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return found


def difference(a: Sequence[Interval], b: Sequence[Interval]) -> Intervals:
    """The time in `a` and not in `b`."""
    found: Intervals = []
    j = 0
    for start, end in a:
        while j < len(b) and b[j][1] <= start:
            j += 1
        k = j
        while k < len(b) and b[k][0] < end:
            if b[k][0] > start:
                found.append((start, b[k][0]))
            start = max(start, b[k][1])
            k += 1
        if start < end:
            found.append((start, end))
    return found


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def gap_around(busy: Sequence[Interval], time: float) -> Interval | None:
    """The interval between two members of `busy` that holds `time` or ends there; None if `time` is inside one of them."""
    after = bisect_left(busy, (time, float("-inf")))
    if after and busy[after - 1][1] > time:
        return None
    return (busy[after - 1][1] if after else float("-inf"), busy[after][0] if after < len(busy) else float("inf"))
