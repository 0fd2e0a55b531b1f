"""Split recorded steps into parts, for all ranks together: only the others' traces tell waiting for a slower rank from communication.

A collective runs from its start on a rank to its end there. It can move data only when its last rank has arrived: until then the others wait.
"""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from .intervals import Intervals, difference, gap_around, intersection, length, union
from .trace import MARKS, Box, Collective, Group, Trace, read_trace, trace_files

FOLDER = "profile"  # inside a run's folder
TABLE, PASSES, MEMORY = "parts.csv", "pipeline.csv", "memory.csv"
DATA, FORWARD, BACKWARD, OPTIMIZER = "data wait", "forward", "backward", "optimizer"
EXPOSED, WAITING, BUBBLE = "communication exposed", "waiting for a slower rank", "pipeline bubble"
CHECKPOINT, VALIDATION, IDLE = "checkpoint", "validation", "host idle"
HIDDEN = "communication hidden"
SUM = (DATA, FORWARD, BACKWARD, OPTIMIZER, EXPOSED, WAITING, BUBBLE, CHECKPOINT, VALIDATION, IDLE)  # these add up to a step
PARTS = (*SUM, HIDDEN)  # hidden communication runs beneath the others
OF_MARK: dict[str, str] = dict(zip(MARKS, (VALIDATION, CHECKPOINT, DATA, FORWARD, BACKWARD, OPTIMIZER), strict=True))
COLUMNS = 8  # ranks with a column of their own in the table
SAME_CLOCK = 5.0  # ms: below it, ends of collectives differ by the scheduling of processes, not by their machines' clocks


class Part(NamedTuple):
    """A row of parts.csv. Of `SUM`, the parts of a step and rank add up to that step's time there."""

    step: int
    rank: int
    part: str
    milliseconds: float


Arrivals = list[float]  # for each collective of a trace, when its last rank arrived, by that trace's clock


def split(traces: Sequence[Trace]) -> list[Part]:
    """The parts of every recorded step on every rank, in milliseconds."""
    rows: list[Part] = []
    for trace, arrivals in zip(traces, last_arrivals(traces), strict=True):
        claims, hidden = (_on_cpu if trace.device == "cpu" else _on_gpu)(trace, arrivals)
        for step, where in sorted(trace.steps.items()):
            left: Intervals = [where]
            taken: dict[str, float] = defaultdict(float)
            for part, intervals in claims:
                taken[part] += length(intersection(left, intervals))
                left = difference(left, intervals)
            taken[IDLE] += length(left)
            taken[HIDDEN] = length(intersection([where], hidden))
            rows += [Part(step, trace.rank, part, taken[part]) for part in PARTS]
    return rows


def _on_cpu(trace: Trace, arrivals: Arrivals) -> tuple[list[tuple[str, Intervals]], Intervals]:
    """What each part claims of a CPU's time, the first claim first, and the hidden communication.

    gloo transfers on threads of its own. The main thread can have waited for a transfer only in the gap of its work in which the transfer ended.
    """

    def blocked_from(transfer: Collective) -> float:
        gap = gap_around(trace.busy, transfer.end)
        return transfer.end if gap is None else max(gap[0], transfer.start)

    exposed, waiting, hidden = [], [], []
    for transfer, arrival in zip(trace.collectives, arrivals, strict=True):
        blocked = blocked_from(transfer)
        exposed.append((max(blocked, arrival), transfer.end))
        waiting.append((blocked, arrival))
        hidden.append((arrival, blocked))
    between = union((blocked_from(transfer), transfer.end) for transfer in trace.point_to_point)
    bubble = difference(between, trace.marks["optimizer"]) if trace.boxes else []
    exposed = union([*exposed, *difference(between, bubble)])
    waiting, hidden = union(waiting), union(hidden)
    claims = [(EXPOSED, exposed), (WAITING, waiting), (BUBBLE, bubble), *((OF_MARK[mark], trace.marks[mark]) for mark in MARKS)]
    return claims, difference(hidden, union([*exposed, *waiting]))


def _on_gpu(trace: Trace, arrivals: Arrivals) -> tuple[list[tuple[str, Intervals]], Intervals]:
    """The same of a GPU's time: kernels by the mark of their launch, communication beneath no kernel, then what the idle device waits for."""
    by_mark: dict[str, Intervals] = defaultdict(list)
    for kernel in trace.kernels:
        by_mark[OF_MARK.get(kernel.mark or "", IDLE)].append((kernel.start, kernel.end))
    compute = union(interval for intervals in by_mark.values() for interval in intervals)
    moving = union((arrival, transfer.end) for transfer, arrival in zip(trace.collectives, arrivals, strict=True))
    waiting = union((transfer.start, arrival) for transfer, arrival in zip(trace.collectives, arrivals, strict=True))
    between = difference(union((transfer.start, transfer.end) for transfer in trace.point_to_point), compute)
    bubble = difference(between, trace.marks["optimizer"]) if trace.boxes else []
    exposed = union([*difference(moving, compute), *difference(between, bubble)])
    claims = [(part, union(by_mark[part])) for part in (*OF_MARK.values(), IDLE)]
    claims += [(EXPOSED, exposed), (WAITING, waiting), (BUBBLE, bubble)]
    claims += [(OF_MARK[mark], trace.marks[mark]) for mark in ("validation", "checkpoint", "data")]
    return claims, intersection(moving, compute)


# --- the same collective on several ranks


def matches(traces: Sequence[Trace]) -> list[dict[int, int]]:
    """Each collective as {position of a trace: the collective's number there}: the k-th of a process group on each of its ranks."""
    by_group: dict[Group, dict[int, list[int]]] = defaultdict(dict)
    for position, trace in enumerate(traces):
        for number, collective in enumerate(trace.collectives):
            if collective.group is not None:
                by_group[collective.group].setdefault(position, []).append(number)
    found = []
    for numbers in by_group.values():
        for together in zip(*numbers.values(), strict=False):
            same = dict(zip(numbers, together, strict=True))
            if len({traces[position].collectives[number].name for position, number in same.items()}) > 1:
                break  # what follows no longer lies beside its like
            found.append(same)
    return found


def clock_offsets(traces: Sequence[Trace], found: Iterable[Mapping[int, int]]) -> list[float]:
    """What to add to each trace's times, in ms, so that all ranks leave a collective together; 0 for clocks that agree."""
    between: dict[tuple[int, int], list[float]] = defaultdict(list)
    for same in found:
        ends = {position: traces[position].collectives[number].end for position, number in same.items()}
        first = min(ends)
        for position in ends:
            between[first, position].append(ends[first] - ends[position])
    offsets = {0: 0.0}
    while new := {b: offsets[a] + median(d) for (a, b), d in between.items() if a in offsets and b not in offsets} | {
        a: offsets[b] - median(d) for (a, b), d in between.items() if b in offsets and a not in offsets
    }:
        offsets |= new
    return [offset if abs(offset := offsets.get(position, 0.0)) > SAME_CLOCK else 0.0 for position in range(len(traces))]


def last_arrivals(traces: Sequence[Trace]) -> list[Arrivals]:
    """For each trace and collective, when the last of its ranks arrived; its own start where the others are not known."""
    found = matches(traces)
    offsets = clock_offsets(traces, found)
    arrivals = [[collective.start for collective in trace.collectives] for trace in traces]
    for same in found:
        last = max(traces[position].collectives[number].start + offsets[position] for position, number in same.items())
        for position, number in same.items():
            collective = traces[position].collectives[number]
            arrivals[position][number] = min(max(last - offsets[position], collective.start), collective.end)
    return arrivals


# --- files


def analyse(folder: Path) -> list[Part]:
    """Read the traces in `folder`; write parts.csv, memory.csv and, of a pipeline, pipeline.csv there. Returns the parts.

    Raises ValueError for a damaged trace or if there is none, OSError if a file cannot be read or written.
    """
    traces = [read_trace(file) for file in trace_files(folder).values()]
    if not traces:
        raise ValueError(f"{folder} holds no trace")
    rows = split(traces)
    _write(folder / TABLE, Part._fields, ((*row[:3], round(row.milliseconds, 4)) for row in rows))
    if any(trace.boxes for trace in traces):
        _write(folder / PASSES, ("rank", *Box._fields), _passes(traces))
    _write(folder / MEMORY, ("rank", "milliseconds", "weights", "gradients", "optimizer", "rest"), _memory(traces))
    return rows


def _passes(traces: Sequence[Trace]) -> Iterable[tuple[object, ...]]:
    """Rows of pipeline.csv: the passes of the first recorded step, in ms since it began on any rank."""
    offsets = clock_offsets(traces, matches(traces))
    step = min(traces[0].steps)
    began = min(trace.steps[step][0] + offset for trace, offset in zip(traces, offsets, strict=True))
    for trace, offset in zip(traces, offsets, strict=True):
        for box in trace.boxes:
            if trace.steps[step][0] <= box.start < trace.steps[step][1]:
                times = [round(time + offset - began, 4) for time in (box.start, box.end)]
                yield (trace.rank, *box[:3], *times)


POINTS = 600  # of a rank's line in memory.csv


def _memory(traces: Sequence[Trace]) -> Iterable[tuple[object, ...]]:
    """Rows of memory.csv. Weights, gradients and optimizer state are their sizes; the rest is what else is allocated, such as activations.

    On a CPU the recorder counts from its own start, when weights and optimizer state are there already; on a GPU it counts everything.
    """
    for trace in traces:
        if not trace.memory:
            continue
        fixed = [trace.sizes.get(kind, 0) for kind in ("weights", "gradients", "optimizer")]
        low = min(size for _, size in trace.memory) if trace.device == "cpu" else fixed[0] + fixed[2]
        began, ended = trace.memory[0][0], trace.memory[-1][0]
        highest: dict[int, tuple[float, int]] = {}
        for time, size in trace.memory:
            slot = int(POINTS * (time - began) / max(ended - began, 1e-9))
            highest[slot] = max(highest.get(slot, (time, size)), (time, size), key=lambda point: point[1])
        for time, size in highest.values():
            yield (trace.rank, round(time - began, 4), *fixed, max(0, size - low))


def _write(file: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as text:
        csv.writer(text, lineterminator="\n").writerows([header, *rows])


def read_parts(file: Path) -> list[Part]:
    """The rows of a parts.csv. Raises ValueError if it is damaged, OSError if it cannot be read."""
    rows = []
    for row in csv.DictReader(io.StringIO(file.read_text(encoding="utf-8"))):
        try:
            found = Part(int(row["step"]), int(row["rank"]), row["part"], float(row["milliseconds"]))
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{file} is damaged") from None
        if found.part not in PARTS or not math.isfinite(found.milliseconds):
            raise ValueError(f"{file} is damaged")
        rows.append(found)
    if not rows:
        raise ValueError(f"{file} is empty")
    return rows


def means(rows: Iterable[Part]) -> dict[int, dict[str, float]]:
    """rank -> part -> milliseconds a step, the mean over the recorded steps."""
    sums: dict[int, dict[str, float]] = defaultdict(lambda: dict.fromkeys(PARTS, 0.0))
    steps = set()
    for row in rows:
        sums[row.rank][row.part] += row.milliseconds
        steps.add(row.step)
    return {rank: {part: value / len(steps) for part, value in parts.items()} for rank, parts in sorted(sums.items())}


def mean(of_rank: Mapping[int, Mapping[str, float]], parts: Sequence[str]) -> float:
    """Mean over the ranks of the sum of `parts`, in ms."""
    return sum(values[part] for values in of_rank.values() for part in parts) / max(len(of_rank), 1)


def table(of_rank: Mapping[int, Mapping[str, float]]) -> list[dict[str, str]]:
    """A row for each part, and one for the step: its share of the step and its ms on every rank, or, of many ranks, the mean and the extremes."""
    total = mean(of_rank, SUM)
    rows: list[dict[str, str]] = []
    names = [part for part in next(iter(of_rank.values())) if mean(of_rank, [part]) > 0]
    for name, parts in [*((name, [name]) for name in names), ("step", list(SUM))]:
        each = {rank: sum(values[part] for part in parts) for rank, values in of_rank.items()}
        average = sum(each.values()) / len(each)
        share = "beneath compute" if not set(parts) <= set(SUM) else f"{average / total:.1%}"
        row = {"part": name, "share": share}
        if len(each) <= COLUMNS:
            row |= {f"rank {rank}": f"{value:.1f}".rjust(len(f"{total:.1f}")) for rank, value in each.items()}
        else:
            low, high = min(each, key=lambda rank: each[rank]), max(each, key=lambda rank: each[rank])
            row |= {"mean": f"{average:.1f}", "least": f"{each[low]:.1f} (rank {low})", "most": f"{each[high]:.1f} (rank {high})"}
        rows.append(row)
    return rows
