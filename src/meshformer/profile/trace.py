"""Read the traces that callbacks/profile.py writes: Chrome's trace format, as torch.profiler exports it, with marks of our own.

Times are milliseconds since the same instant on every rank, as far as the machines' clocks agree; parts.py aligns clocks that do not.
"""

from __future__ import annotations

import gzip
import json
import re
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .intervals import Interval, Intervals, difference, union

PREFIX = "meshformer:"  # of our own marks in a trace
MARKS = ("validation", "checkpoint", "data", "forward", "backward", "optimizer")  # time inside two of them belongs to the first
GLOO, NCCL = "gloo:", "nccl"
POINT_TO_POINT = re.compile(r"^gloo:(send|recv)|^nccl\w*(Send|Recv)", re.IGNORECASE)
# Operators that start a transfer or wait for one; the other operators on the CPU compute.
COMMUNICATES = ("c10d::", "_c10d_functional::", "c10d_functional::", GLOO, NCCL)
# Events around other work, which the operators inside them stand for: between these the thread may be waiting.
AROUND = ("autograd::engine::", "FSDP::", "DistributedDataParallel", "Optimizer.", PREFIX, "RegisterPostBackward")
COMPILED = ("Torch-Compiled Region", "CompiledFunction")  # their own loops are no operators
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
NAME = re.compile(r"rank(\d+)\.json(\.gz)?")


class Group(NamedTuple):
    """A process group: the mesh axis or the library's name for it, and its ranks."""

    name: str
    ranks: tuple[int, ...]


class Collective(NamedTuple):
    """A collective (or a send or receive) on one rank, from its start there to its end; `group` None: not known."""

    name: str
    group: Group | None
    start: float
    end: float


class Kernel(NamedTuple):
    """Work on a GPU, and the mark inside which the host launched it (None: inside none)."""

    start: float
    end: float
    mark: str | None


class Box(NamedTuple):
    """One micro-batch's pass through a pipeline stage; `kind`: forward, backward, or of a split backward its `inputs` or `weights`."""

    stage: int
    kind: str
    microbatch: int
    start: float
    end: float


@dataclass
class Trace:
    """One rank's recording. On a GPU `kernels` holds its work and `busy` is empty; on a CPU `busy` is when the main thread computed."""

    rank: int
    device: str  # cpu or cuda
    steps: dict[int, Interval]
    marks: dict[str, Intervals]
    collectives: list[Collective]  # in order of their starts
    point_to_point: list[Collective]
    busy: Intervals = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)  # (time, bytes allocated)
    sizes: dict[str, int] = field(default_factory=dict)  # bytes of this rank's weights, gradients and optimizer state


def trace_files(folder: Path) -> dict[int, Path]:
    """Rank -> its trace in `folder`."""
    found = {int(match[1]): file for file in folder.glob("rank*.json*") if (match := NAME.fullmatch(file.name))}
    return dict(sorted(found.items()))


def read_trace(file: Path) -> Trace:
    """Read one rank's trace. Raises ValueError if it is none of ours, OSError if it cannot be read."""
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as text:
            content = json.load(text)
        return parse(content)
    except (EOFError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as a trace of callbacks.profile ({type(error).__name__}: {error})") from None


def parse(content: dict[str, Any]) -> Trace:
    """The recording in a trace's decoded JSON."""
    about = content["meshformer"]
    about = json.loads(about) if isinstance(about, str) else about
    base = int(content.get("baseTimeNanoseconds", 0)) / 1e6
    events = [event for event in content["traceEvents"] if event.get("ph") in ("X", "i")]

    def span(event: dict[str, Any]) -> Interval:
        start = base + event["ts"] / 1e3
        return start, start + event.get("dur", 0) / 1e3

    spans = [event for event in events if event["ph"] == "X"]
    own = [(event["name"].removeprefix(PREFIX), span(event), event) for event in spans if is_mark(event)]
    steps = {int(name.split()[1]): where for name, where, _ in own if name.startswith("step ")}
    if not steps:
        raise ValueError("no step is marked in it")
    main = next(event["tid"] for name, _, event in own if name.startswith("step "))
    marks = {mark: union(where for name, where, _ in own if name == mark) for mark in MARKS}
    trace = Trace(about["rank"], about["device"], steps, marks, [], [], sizes=about.get("sizes", {}))
    trace.boxes = [_box(name, where) for name, where, _ in own if name.startswith("stage ")]
    for box in trace.boxes:  # a pipeline's passes are marked one by one
        kind = "forward" if box.kind == "forward" else "backward"
        marks[kind] = union([*marks[kind], (box.start, box.end)])
    groups = _groups_of_threads(own, spans, span, main) if trace.device == "cpu" else {}
    began = min(start for start, _ in steps.values())
    if trace.device == "cpu":
        transfers = [event for event in spans if event["name"].startswith(GLOO)]
        found = [Collective(event["name"], groups.get(event["tid"]), *span(event)) for event in transfers]
        trace.busy = _computing((event for event in spans if event["tid"] == main and event.get("cat") == "cpu_op"), span)
    else:
        found = [Collective(event["name"], _group(event), span(event)[0], span(event)[1]) for event in spans if is_nccl(event)]
        trace.kernels = _kernels(spans, span, trace.marks)
    found = sorted((c for c in found if c.start >= began), key=lambda c: c.start)  # without those that found the groups out
    trace.point_to_point = [c for c in found if POINT_TO_POINT.match(c.name)]
    trace.collectives = [c for c in found if not POINT_TO_POINT.match(c.name)]
    device_type = 1 if trace.device == "cuda" else 0
    trace.memory = sorted(
        (span(event)[0], event["args"]["Total Allocated"])
        for event in events
        if event["name"] == "[memory]" and event["args"].get("Device Type") == device_type
    )
    return trace


def is_mark(event: dict[str, Any]) -> bool:
    # On a GPU a mark is repeated on the device's timeline, as `gpu_user_annotation`.
    return event["name"].startswith(PREFIX) and event.get("cat") == "user_annotation"


def is_nccl(event: dict[str, Any]) -> bool:
    return event.get("cat") == "kernel" and event["name"].startswith(NCCL)


def _box(name: str, where: Interval) -> Box:
    _, stage, kind, microbatch = name.split()
    return Box(int(stage), kind, int(microbatch), *where)


def _group(event: dict[str, Any]) -> Group | None:
    args = event.get("args", {})
    if "Process Group Ranks" not in args:
        return None
    ranks = tuple(int(rank) for rank in re.findall(r"\d+", str(args["Process Group Ranks"])))
    return Group(str(args.get("Process Group Name", "")), ranks)


def _groups_of_threads(own: list[Any], spans: list[Any], span: Any, main: int) -> dict[int, Group]:
    """Thread -> the process group whose transfers it runs: gloo's events name none, so the recorder had each group transfer something once.

    A group has two threads of its own, made one after the other: one that the trial did not meet belongs to the nearest group of which it met one.
    """
    trials = [(name.split(), where) for name, where, _ in own if name.startswith("group ")]
    found: dict[int, Group] = {}
    for event in spans:
        if event["name"].startswith(GLOO) and event["tid"] != main:
            start, _ = span(event)
            for (_, name, ranks), where in trials:
                if where[0] <= start <= where[1]:
                    found[event["tid"]] = Group(name, tuple(map(int, ranks.split(","))))
    others = {event["tid"] for event in spans if event["name"].startswith(GLOO)} - set(found) - {main}
    met = list(found.values())
    single = {thread: group for thread, group in found.items() if met.count(group) == 1}
    for thread in sorted(others):
        if single:
            found[thread] = single.pop(min(single, key=lambda other: abs(other - thread)))
    return found


def _computing(operators: Iterable[dict[str, Any]], span: Any) -> Intervals:
    """When a thread computed: operators without others inside them, and compiled regions, save where these transfer or wait."""
    ordered = sorted(operators, key=lambda event: (event["ts"], -event.get("dur", 0)))
    leaves: list[Interval] = []
    compiled: list[Interval] = []
    for event, following in zip(ordered, [*ordered[1:], None], strict=True):
        name = event["name"]
        if name.startswith(COMPILED):
            compiled.append(span(event))
        inner = following is not None and following["ts"] < event["ts"] + event.get("dur", 0)
        if not inner and not name.startswith((*COMMUNICATES, *AROUND)):
            leaves.append(span(event))
    if not compiled:
        return union(leaves)
    transfers = union(span(event) for event in ordered if event["name"].startswith(COMMUNICATES))
    return union([*leaves, *difference(union(compiled), transfers)])


def _kernels(spans: list[dict[str, Any]], span: Any, marks: dict[str, Intervals]) -> list[Kernel]:
    """The GPU's computing kernels and copies, each with the mark of its launch, which is found by the `correlation` number."""
    launches = {e["args"]["correlation"]: span(e)[0] for e in spans if str(e.get("cat")).startswith("cuda") and "correlation" in e.get("args", {})}
    found = []
    for event in spans:
        if event.get("cat") in DEVICE_WORK and not is_nccl(event):
            where = span(event)
            launched = launches.get(event.get("args", {}).get("correlation"), where[0])
            found.append(Kernel(where[0], where[1], mark_at(marks, launched)))
    return sorted(found, key=lambda one: one.start)


def mark_at(marks: dict[str, Intervals], time: float) -> str | None:
    """The mark that holds `time`, the first of MARKS if several do."""
    for mark in MARKS:
        at = bisect_right(marks[mark], (time, float("inf")))
        if at and marks[mark][at - 1][1] > time:
            return mark
    return None
