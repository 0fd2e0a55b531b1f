"""Show the progress of a sweep: a live table on a terminal, otherwise one line per change."""

from __future__ import annotations

import csv
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from meshformer.printing import visible

from .record import STATES, Point
from .results import settings_of, varying

COLOURS = {"queued": "dim", "running": "bold", "done": "green", "pruned": "cyan", "failed": "red", "interrupted": "yellow"}
DISPLAY_ORDER = ("running", "failed", "interrupted", "done", "pruned", "queued")
REFRESH_SECONDS = 0.5


class Display:
    """Progress of a sweep on stderr. `points` is the sweep's own list, which grows during a search."""

    def __init__(self, points: Sequence[Point], folder: Path, metric: str, total: int):
        self.points, self.folder, self.metric, self.total = points, folder, metric, total
        self.console = Console(stderr=True)
        self.started: dict[int, float] = {}
        self.live = Live(console=self.console, auto_refresh=False, transient=True) if self.console.is_terminal else None
        self._next = 0.0

    def __enter__(self) -> Display:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def say(self, text: str) -> None:
        self.console.print(Text(visible(text)), soft_wrap=True)

    def changed(self, point: Point) -> None:
        if point.state == "running":
            self.started[point.number] = time.monotonic()
        if self.live:
            self.refresh(now=True)
        if not self.live or point.state == "failed":
            ended = sum(p.state not in ("queued", "running") for p in self.points)
            parts = [f"[{ended}/{self.total}]", f"{point.state:<11}", self._name(point)]
            if point.state == "done" and self.metric in point.final:
                parts.append(f"{self.metric} {point.final[self.metric]:.4f}")
            if point.state not in ("running", "queued"):
                parts.append(f"{point.seconds:.1f} s")
            if point.error:
                parts.append(f"{point.error}" + (f"  (log: {self.folder / point.folder / 'job.log'})" if point.folder else ""))
            self.say("  ".join(parts))

    def refresh(self, now: bool = False) -> None:
        if self.live and (now or time.monotonic() >= self._next):
            self._next = time.monotonic() + REFRESH_SECONDS
            self.live.update(self._render(), refresh=True)

    def _render(self) -> Group:
        counts = {state: sum(p.state == state for p in self.points) for state in STATES}
        counts["queued"] += self.total - len(self.points)
        head = Text("  ").join(Text(f"{n} {state}", style=COLOURS[state]) for state, n in counts.items() if n)
        table = Table(box=None, pad_edge=False)
        for name, justify in (
            ("#", "right"),
            ("point", "left"),
            ("state", "left"),
            ("step", "right"),
            (self.metric, "right"),
            ("s", "right"),
        ):
            table.add_column(Text(visible(name)), justify=justify)  # pyright: ignore[reportArgumentType]
        order = sorted(self.points, key=lambda p: (DISPLAY_ORDER.index(p.state), -p.number if p.state in ("done", "pruned") else p.number))
        room = max(3, self.console.height - 4)
        for point in order[:room]:
            step, value, seconds = "", point.final.get(self.metric), point.seconds
            if point.state == "running":
                row = last_row(self.folder / point.folder / "metrics.csv")
                step, seconds = row.get("step", ""), time.monotonic() - self.started.get(point.number, time.monotonic())
                value = float(row[self.metric]) if row.get(self.metric) else None
            spent = f"{seconds:.0f}" if seconds else ""
            cells = [str(point.number), self._name(point), point.state, step, "" if value is None else f"{value:.4f}", spent]
            table.add_row(*(Text(visible(cell, lines=False)) for cell in cells), style=COLOURS[point.state])
        return Group(head, table)

    def _name(self, point: Point) -> str:
        settings, keys = settings_of(point), varying(self.points)
        return " ".join(f"{key}={settings[key]}" for key in keys if key in settings) or "the run"


def last_row(path: Path) -> dict[str, str]:
    """Return the newest complete row of a metrics.csv that is being written, or {} if there is none. Reads only the two ends of the file."""
    try:
        with path.open("rb") as file:
            header = file.readline()
            file.seek(max(len(header), path.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").split("\n")[:-1]
    except OSError:
        return {}
    if not lines:
        return {}
    names, values = next(csv.reader([header.decode()])), next(csv.reader([lines[-1]]))
    return dict(zip(names, values, strict=False)) if len(names) == len(values) else {}
