"""Pictures of recorded steps as SVG, written by hand: they are made at the end of the recorded steps, where matplotlib may not be installed."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from .parts import (
    BACKWARD,
    BUBBLE,
    CHECKPOINT,
    DATA,
    EXPOSED,
    FORWARD,
    HIDDEN,
    IDLE,
    MEMORY,
    OPTIMIZER,
    PASSES,
    SUM,
    TABLE,
    VALIDATION,
    WAITING,
    Part,
    means,
    read_parts,
)

# The colour-blind-safe palette of Okabe and Ito (2008); what keeps a device from computing is warm.
COLOURS = {
    DATA: "#E69F00", FORWARD: "#56B4E9", BACKWARD: "#0072B2", OPTIMIZER: "#009E73", EXPOSED: "#D55E00", WAITING: "#CC79A7",
    BUBBLE: "#F0C060", CHECKPOINT: "#7A5C3E", VALIDATION: "#444444", IDLE: "#BBBBBB", HIDDEN: "#F2B49A",
}  # fmt: skip
KINDS = {"forward": COLOURS[FORWARD], "backward": COLOURS[BACKWARD], "inputs": COLOURS[BACKWARD], "weights": COLOURS[OPTIMIZER]}
WIDTH, LEFT, RIGHT = 880, 70, 20
BAR, ROW = 22, 32
SHOWN = 64  # ranks in a picture; of more, those that differ most from the mean are drawn


class Pass(NamedTuple):
    """A row of pipeline.csv, times in ms since the step began."""

    rank: int
    stage: int
    kind: str
    microbatch: int
    start: float
    end: float


class Point(NamedTuple):
    """A row of memory.csv: bytes at a time in ms."""

    rank: int
    milliseconds: float
    weights: float
    gradients: float
    optimizer: float
    rest: float


def draw_all(folder: Path) -> list[Path]:
    """Write the pictures that the tables in `folder` allow: parts.svg, pipeline.svg, memory.svg. Returns their paths.

    Raises ValueError for a damaged table, OSError if a file cannot be read or written.
    """
    written = []
    for name, text in pictures(folder).items():
        (folder / f"{name}.svg").write_text(text, encoding="utf-8")
        written.append(folder / f"{name}.svg")
    return written


def pictures(folder: Path) -> dict[str, str]:
    """Name -> SVG text, drawn from the tables in `folder`. Raises as `draw_all`."""
    found = {"parts": bars(read_parts(folder / TABLE))}
    if (folder / PASSES).is_file() and (passes := list(_rows(folder / PASSES, Pass))):
        found["pipeline"] = timeline(passes)
    if (folder / MEMORY).is_file() and (points := list(_rows(folder / MEMORY, Point))):
        found["memory"] = memory(points)
    return found


def _rows(file: Path, kind: Any) -> Iterator[Any]:
    whole = {"rank", "stage", "microbatch"}
    for row in csv.DictReader(io.StringIO(file.read_text(encoding="utf-8"))):
        try:
            values = [row[name] if name == "kind" else int(row[name]) if name in whole else float(row[name]) for name in kind._fields]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{file} is damaged") from None
        if not all(math.isfinite(value) for value in values if isinstance(value, float)):
            raise ValueError(f"{file} is damaged")
        yield kind(*values)


# --- the parts of a step


def bars(rows: Sequence[Part]) -> str:
    """Stacked bars, one a rank: the mean of the recorded steps, with communication beneath compute as a thin line below its bar."""
    of_rank = means(rows)
    ranks = shown_ranks(of_rank)
    longest = max(sum(of_rank[rank][part] for part in SUM) for rank in ranks)
    scale = (WIDTH - LEFT - RIGHT) / longest
    used = [part for part in (*SUM, HIDDEN) if max(of_rank[rank][part] for rank in ranks) > 0.002 * longest]
    out, top = _legend([(part, COLOURS[part]) for part in used])
    for row, rank in enumerate(ranks):
        x, y = float(LEFT), top + row * ROW
        out.append(_text(LEFT - 8, y + BAR / 2 + 4, f"rank {rank}", anchor="end"))
        for part in SUM:
            width = of_rank[rank][part] * scale
            out.append(_box(x, y, width, BAR, COLOURS[part], f"rank {rank}, {part}: {of_rank[rank][part]:.1f} ms"))
            if width > 34:
                out.append(_text(x + width / 2, y + BAR / 2 + 4, f"{of_rank[rank][part]:.3g}", anchor="middle", colour=_ink(COLOURS[part])))
            x += width
        if HIDDEN in used:
            hidden = of_rank[rank][HIDDEN]
            out.append(_box(LEFT, y + BAR + 1, hidden * scale, 4, COLOURS[HIDDEN], f"rank {rank}, {HIDDEN}: {hidden:.1f} ms"))
    bottom = top + len(ranks) * ROW
    out += _axis(bottom, longest, "milliseconds a step, mean of steps " + _range(sorted({row.step for row in rows})))
    return _svg(out, bottom + 44)


def shown_ranks(of_rank: dict[int, dict[str, float]]) -> list[int]:
    if len(of_rank) <= SHOWN:
        return sorted(of_rank)
    typical = {part: sum(parts[part] for parts in of_rank.values()) / len(of_rank) for part in SUM}
    distance = {rank: sum(abs(parts[part] - typical[part]) for part in SUM) for rank, parts in of_rank.items()}
    return sorted(sorted(distance, key=lambda rank: -distance[rank])[:SHOWN])


# --- a pipeline's micro-batches


def timeline(passes: Sequence[Pass]) -> str:
    """One row a rank, a box for each pass of a micro-batch, with its number; the white between boxes is the bubble and the rest of the step."""
    ranks = sorted({one.rank for one in passes})[:SHOWN]
    began, ended = min(one.start for one in passes), max(one.end for one in passes)
    scale = (WIDTH - LEFT - RIGHT) / (ended - began)
    words = {"inputs": "backward, inputs", "weights": "backward, weights"}
    kinds = [kind for kind in KINDS if any(one.kind == kind for one in passes)]
    out, top = _legend([(words.get(kind, kind), KINDS[kind]) for kind in kinds])
    for row, rank in enumerate(ranks):
        y = top + row * ROW
        out.append(_text(LEFT - 8, y + BAR / 2 + 4, f"rank {rank}", anchor="end"))
        out.append(_box(LEFT, y, WIDTH - LEFT - RIGHT, BAR, "#F4F4F4"))
        stages = sorted({one.stage for one in passes if one.rank == rank})
        for one in passes:
            if one.rank != rank or one.kind not in KINDS:
                continue
            x, width = LEFT + (one.start - began) * scale, (one.end - one.start) * scale
            about = f"stage {one.stage}, micro-batch {one.microbatch + 1}, {words.get(one.kind, one.kind)}: {one.end - one.start:.1f} ms"
            out.append(_box(x, y, width, BAR, KINDS[one.kind], about, 1.0 if one.stage == stages[0] else 0.6))
            if width > 12:
                out.append(_text(x + width / 2, y + BAR / 2 + 4, f"{one.microbatch + 1}", anchor="middle", colour=_ink(KINDS[one.kind])))
    bottom = top + len(ranks) * ROW
    paler = "; paler: a rank's further stages" if len({one.stage for one in passes}) > len({one.rank for one in passes}) else ""
    out += _axis(bottom, ended - began, f"milliseconds from the first forward pass of a step to its last backward pass{paler}")
    return _svg(out, bottom + 44)


# --- memory


def memory(points: Sequence[Point]) -> str:
    """The memory of the rank with the highest peak over the recorded steps, by kind."""

    def total(point: Point) -> float:
        return point.weights + point.optimizer + point.rest

    rank = max(points, key=total).rank
    mine = sorted((point for point in points if point.rank == rank), key=lambda point: point.milliseconds)
    highest, last = max(map(total, mine)), max(point.milliseconds for point in mine) or 1.0
    across, height, top = (WIDTH - LEFT - RIGHT) / last, 190.0, 40.0
    unit, name = next(((size, name) for size, name in ((2**30, "GiB"), (2**20, "MiB")) if highest >= size), (2**10, "KiB"))

    def y(size: float) -> float:
        return top + height * (1 - size / highest)

    weights, optimizer = mine[0].weights, mine[0].optimizer
    layers = [("weights", 0.0, weights, COLOURS[BACKWARD]), ("optimizer state", weights, weights + optimizer, COLOURS[OPTIMIZER])]
    out, _ = _legend([*((text, colour) for text, *_, colour in layers), ("gradients, activations and the rest", COLOURS[DATA])])
    line = " ".join(f"{LEFT + point.milliseconds * across:.1f},{y(total(point)):.1f}" for point in mine)
    floor = y(weights + optimizer)
    out.append(f'<polygon points="{LEFT},{floor:.1f} {line} {LEFT + last * across:.1f},{floor:.1f}" fill="{COLOURS[DATA]}"/>')
    for text, low, high, colour in layers:
        out.append(_box(LEFT, y(high), last * across, y(low) - y(high), colour, f"{text}: {(high - low) / unit:.3g} {name}"))
    if mine[0].gradients:
        level = y(weights + optimizer + mine[0].gradients)
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{level:.1f}" y2="{level:.1f}" stroke="#333" stroke-dasharray="4 3"/>')
        out.append(_text(WIDTH - RIGHT - 4, level - 4, "up to here with all gradients", anchor="end"))
    for size in _ticks(highest / unit):
        out.append(_text(LEFT - 8, y(size * unit) + 4, f"{size:g} {name}", anchor="end"))
    out += _axis(top + height, last, f"milliseconds since the first allocation (rank {rank}, whose peak is the highest: {highest / unit:.3g} {name})")
    return _svg(out, top + height + 44)


# --- pieces of a picture


def _svg(pieces: Sequence[str], height: float) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}" '
    style = 'font-family="DejaVu Sans, Helvetica, Arial, sans-serif" font-size="11">'
    return "\n".join([head + style, f'<rect width="{WIDTH}" height="{height:.0f}" fill="white"/>', *pieces, "</svg>", ""])


def _box(x: float, y: float, width: float, height: float, colour: str, about: str = "", opacity: float = 1.0) -> str:
    title = f"<title>{escape(about)}</title>" if about else ""
    faint = f' fill-opacity="{opacity}"' if opacity < 1 else ""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.2f}" height="{height:.1f}" fill="{colour}"{faint}>{title}</rect>'


def _text(x: float, y: float, text: str, anchor: str = "start", colour: str = "#222") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'


def _ink(colour: str) -> str:
    """Black or white, whichever is read better on `colour`."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#fff" if 0.299 * red + 0.587 * green + 0.114 * blue < 130 else "#222"


def _legend(entries: Sequence[tuple[str, str]]) -> tuple[list[str], float]:
    """The legend's pieces, in as many lines as it needs, and where the picture below it begins."""
    out, x, y = [], float(LEFT), 10.0
    for text, colour in entries:
        width = 24 + 6.6 * len(text)
        if x + width > WIDTH - RIGHT:
            x, y = float(LEFT), y + 18
        out += [_box(x, y, 11, 11, colour), _text(x + 15, y + 9.5, text)]
        x += width
    return out, y + 26


def _axis(y: float, longest: float, title: str) -> list[str]:
    """A time axis from 0 to `longest` ms at the height `y`."""
    out = [f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#777"/>']
    scale = (WIDTH - LEFT - RIGHT) / longest
    for tick in _ticks(longest):
        x = LEFT + tick * scale
        out.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="{y + 4:.1f}" stroke="#777"/>')
        out.append(_text(x, y + 16, f"{tick:g}", anchor="middle"))
    return [*out, _text((LEFT + WIDTH - RIGHT) / 2, y + 34, title, anchor="middle")]


def _ticks(longest: float) -> list[float]:
    """Four to ten round numbers from 0 to `longest`."""
    step = 10 ** math.floor(math.log10(longest)) if longest > 0 else 1.0
    step = next(step * factor for factor in (0.1, 0.2, 0.5, 1.0) if longest / (step * factor) <= 10)
    return [round(step * number, 10) for number in range(int(longest / step + 1e-9) + 1)]


def _range(steps: Sequence[int]) -> str:
    return f"{steps[0]} to {steps[-1]}" if len(steps) > 1 else str(steps[0])
