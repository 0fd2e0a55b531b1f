"""Results of a sweep, best first, with one row for points that differ only in their seed: a table, results.csv and results.json."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from meshformer.printing import csv_cell, visible
from meshformer.record import atomic_write_text

from .record import Point

SPEED = "train/tokens_per_second"


@dataclass
class Row:
    """Points that differ only in their seed. `metrics`: name -> (mean, sample standard deviation, which is None for a single run)."""

    settings: dict[str, str]
    points: list[Point]
    metrics: dict[str, tuple[float, float | None]]
    seconds: float | None

    def count(self, *states: str) -> int:
        return sum(point.state in states for point in self.points)


def settings_of(point: Point) -> dict[str, str]:
    return {key.lstrip("+"): value for key, _, value in (override.partition("=") for override in point.overrides)}


def varying(points: Sequence[Point]) -> list[str]:
    """Keys that differ between points, in the order of the command."""
    each = [settings_of(point) for point in points]
    keys = list(dict.fromkeys(key for settings in each for key in settings))
    return [key for key in keys if len({settings.get(key) for settings in each}) > 1]


def rows(points: Sequence[Point], metrics: Sequence[str], largest_first: bool = False) -> list[Row]:
    """Group points over seeds and sort the groups by the mean of the first metric; groups without it come last."""
    keys = [key for key in varying(points) if key != "seed"]
    groups: dict[tuple[str | None, ...], list[Point]] = {}
    for point in points:
        groups.setdefault(tuple(settings_of(point).get(key) for key in keys), []).append(point)
    found = []
    for values, members in groups.items():
        done = [point for point in members if point.state == "done"]
        seconds = statistics.fmean(point.seconds for point in done) if done else None
        means = {name: _spread([point.final[name] for point in done if name in point.final]) for name in metrics}
        known = {name: spread for name, spread in means.items() if spread is not None}
        found.append(Row({k: v for k, v in zip(keys, values, strict=True) if v is not None}, members, known, seconds))
    sign = -1 if largest_first else 1
    return sorted(found, key=lambda row: sign * row.metrics[metrics[0]][0] if metrics[0] in row.metrics else float("inf"))


def _spread(values: list[float]) -> tuple[float, float | None] | None:
    if not values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def table(points: Sequence[Point], metrics: Sequence[str], largest_first: bool = False, limit: int = 40) -> Table:
    """Return the first `limit` rows as a Rich table."""
    made = Table()
    listed = rows(points, list(dict.fromkeys([*metrics, SPEED])), largest_first)
    keys = list(dict.fromkeys(key for row in listed for key in row.settings))
    shown = [*metrics, *([SPEED] if SPEED not in metrics and any(SPEED in row.metrics for row in listed) else [])]
    for key in keys or ["run"]:
        made.add_column(Text(visible(key)), overflow="fold")
    for name in shown:
        made.add_column("tokens/s" if name == SPEED else Text(visible(name)), justify="right")
    made.add_column("s a run", justify="right")
    made.add_column("runs", justify="right")
    for row in listed[:limit]:
        cells: list[str | Text] = [Text(visible(row.settings.get(key, ""))) for key in keys] or ["all"]
        cells += [_cell(row.metrics.get(name), name) for name in shown]
        cells.append("" if row.seconds is None else f"{row.seconds:.1f}")
        made.add_row(*cells, _counts(row))
    if len(listed) > limit:
        made.caption = f"and {len(listed) - limit} more in results.csv"
    return made


def _cell(spread: tuple[float, float | None] | None, name: str) -> str:
    if spread is None:
        return ""
    mean, deviation = spread
    form = ",.0f" if name == SPEED else ".4f"
    return f"{mean:{form}}" if deviation is None else f"{mean:{form}} ± {deviation:{form}}"


def _counts(row: Row) -> str:
    parts = [str(row.count("done"))] + [
        f"{n} {state}" for state in ("pruned", "failed", "interrupted", "queued") if (n := row.count(state))
    ]
    return ", ".join(parts)


def write(folder: Path, points: Sequence[Point], metrics: Sequence[str], largest_first: bool = False) -> None:
    """Write results.csv (one line per point) and results.json (the table's rows, best first, and the points)."""
    keys = varying(points)
    names = list(dict.fromkeys(name for point in points for name in point.final))
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(map(csv_cell, ["point", "state", "folder", "seconds", *keys, *names, "error"]))
    for point in points:
        settings = settings_of(point)
        cells = [settings.get(key, "") for key in keys] + [repr(point.final[name]) if name in point.final else "" for name in names]
        line = [point.number, point.state, point.folder, repr(round(point.seconds, 3)), *cells, point.error or ""]
        out.writerow(map(csv_cell, line))
    atomic_write_text(folder / "results.csv", text.getvalue())
    listed: list[dict[str, Any]] = []
    for row in rows(points, [*metrics, *[n for n in names if n not in metrics]], largest_first):
        means = {name: {"mean": mean, "deviation": deviation} for name, (mean, deviation) in row.metrics.items()}
        listed.append({"settings": row.settings, "points": [p.number for p in row.points], "seconds": row.seconds, "metrics": means})
    fields = {"metrics": list(metrics), "rows": listed, "points": [vars(point) for point in points]}
    atomic_write_text(folder / "results.json", json.dumps(fields, indent=1, default=str) + "\n")
