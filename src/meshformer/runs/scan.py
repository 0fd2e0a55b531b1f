"""Read run folders as plain data: settings, state, last and best metrics. Uses neither torch nor pandas.

Results are cached in the user's cache folder, never in the runs folder. A run is read again only if the time or size of one of its files has
changed. A damaged or half-written file causes a message, never an exception.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from meshformer.config.paths import default_cache, leads_out
from meshformer.printing import visible
from meshformer.record import RunNotFound, atomic_write_text, read_metrics, read_run
from meshformer.record.run_folder import is_run, list_runs
from meshformer.runs.choices import Loader, choices

FILES = ("config.yaml", "overrides.txt", "run.json", "metrics.csv")
VERSION = 2  # format version of the cache
HIGHER_IS_BETTER = ("accuracy", "f1", "bleu")  # parts of metric names; every other validation metric is better when lower
UNREADABLE = (
    OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, ArithmeticError, MemoryError, csv.Error, yaml.YAMLError,
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One run. `config`: dotted key -> value, lists as JSON text; `choices`: group -> option; `metrics`: see `summary`."""

    name: str  # its path below the folder that was read
    folder: str
    config: dict[str, Any]
    choices: dict[str, str]
    record: dict[str, Any]
    metrics: dict[str, Any]

    @property
    def context_length(self) -> int:
        return int(self.config.get("data.context_length") or 0)


def scan(path: Path | str, cache: bool = True) -> tuple[list[Run], list[str]]:
    """Return every run at or below `path`, the latest last, and a message for each file that could not be read.

    Raises RunNotFound if there is no such folder. `cache=False` reads every file.
    """
    root = Path(path).expanduser().absolute()
    if not root.is_dir():
        raise RunNotFound(f"{path} is no folder.")
    folders = [root] if is_run(root) else list_runs(root)
    store = cache_file(root)
    known = _read_cache(store) if cache else {}
    runs, problems, lines, changed = list[Run](), list[str](), dict[str, Any](), False
    for folder in folders:
        name = folder.relative_to(root).as_posix() if folder != root else folder.name
        stamp = _stamp(folder)
        entry = known.get(name)
        if entry is None or entry["stamp"] != stamp:
            run, found = _read(folder, name)
            problems += found
            if run is None:
                continue
            # No stamp for a run that is damaged or changed while it was read, so that the next scan reads and reports it again.
            entry = {"stamp": stamp if not found and _stamp(folder) == stamp else None, "run": vars(run)}
            changed = True
        runs.append(Run(**{**entry["run"], "folder": str(folder)}))
        lines[name] = entry
    if cache and (changed or lines.keys() != known.keys()):
        _write_cache(store, lines)
    return runs, [visible(problem, lines=False) for problem in problems]


def cache_file(root: Path) -> Path:
    """Return the cache file for scans of `root`, in $MESHFORMER_DATA/runs or ~/.cache/meshformer/runs."""
    base = Path(default_cache()).expanduser()
    return base / "runs" / f"{hashlib.sha256(str(root).encode()).hexdigest()[:16]}.jsonl"


def _read_cache(store: Path) -> dict[str, Any]:
    try:
        head, *lines = store.read_text(encoding="utf-8").splitlines()
        if json.loads(head) != {"version": VERSION}:
            return {}
        return {entry["run"]["name"]: entry for entry in map(json.loads, lines) if Run(**entry["run"])}
    except UNREADABLE:  # no cache, or one of another version
        return {}


def _write_cache(store: Path, entries: Mapping[str, Any]) -> None:
    lines = [{"version": VERSION}, *entries.values()]
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(store, "".join(json.dumps(line) + "\n" for line in lines))
    except OSError:  # full or read-only disk: the next call is slow again
        pass


def _stamp(folder: Path) -> list[Any]:
    """Return modification times and sizes of the run's files, to detect changes."""

    def signature(name: str) -> Any:
        try:
            found = os.stat(f"{folder}/{name}")
        except OSError:
            return None
        return [found.st_mtime_ns, found.st_size]

    return [signature(name) for name in FILES]


def _read(folder: Path, name: str) -> tuple[Run | None, list[str]]:
    problems: list[str] = []
    file = folder / "config.yaml"
    try:
        for file in (folder / name for name in FILES):
            if leads_out(file, folder):
                raise ValueError("a link out of the run's folder")
        file = folder / "config.yaml"
        config = yaml.load(file.read_text(encoding="utf-8"), Loader)
        if not isinstance(config, dict):
            raise ValueError("empty or half written")
        context_length = int((config.get("data") or {}).get("context_length") or 0)
        settings = flat(config)
        file = folder / "overrides.txt"
        overrides = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        chosen = choices(config, overrides)
        file = folder / "run.json"
        record = _record(read_run(folder)) if file.is_file() else {"state": "starting"}
    except UNREADABLE as error:
        return None, [f"{file}: {_why(error)}; the run is left out"]
    metrics: dict[str, Any] = {}
    file = folder / "metrics.csv"
    try:
        if file.is_file():
            metrics = summary(read_metrics(file), context_length)
    except UNREADABLE as error:
        problems.append(f"{file}: {_why(error)}; the run is shown without it")
    return Run(name, str(folder), settings, chosen, record, metrics), problems


def _why(error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text if len(text) <= 100 else text[:97] + "..."


def _record(fields: dict[str, Any]) -> dict[str, Any]:
    """Extract from run.json what tables show, converted to text, numbers and booleans whatever types the file has."""
    git, error, layout = fields.get("git") or {}, fields.get("error") or {}, fields.get("layout") or {}
    spans = [(part.get("started"), part.get("ended")) for part in (*(fields.get("segments") or []), fields)]
    spent = [(datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds() for start, end in spans if start and end]
    return {
        **{key: _text(fields.get(key)) for key in ("state", "started", "ended")},
        "parameters": _whole(fields.get("parameters")),
        "duration_s": sum(spent) if spent else None,
        "layout": layout_name(layout),
        "processes": _whole(layout.get("processes")),
        "device": _text((fields.get("device") or {}).get("accelerator")),
        "commit": _text(git.get("commit")),
        "dirty": None if git.get("dirty") is None else bool(git["dirty"]),
        "error": ": ".join(str(error[key]) for key in ("type", "message") if error.get(key)) or None,
        "final": {key: number for key, value in (fields.get("final") or {}).items() if (number := _number(value)) is not None},
    }


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _whole(value: Any) -> int | None:
    return None if value is None else int(value)


def _number(value: Any) -> float | None:
    try:
        return float(value)  # run.json writes "nan" and "inf" as text
    except (TypeError, ValueError, OverflowError):
        return None


def layout_name(layout: Mapping[str, Any]) -> str:
    """`single`, `ddp 2`, `fsdp_tensor shard 2 × tensor 2`: the strategy and every axis whose degree is above 1."""
    name = str(layout.get("name", "single"))
    axes = [(axis, layout[axis]) for axis in ("pipeline", "replicate", "shard", "context", "tensor") if (layout.get(axis) or 1) != 1]
    if len(axes) == 1 and name != "mesh":
        return f"{name} {axes[0][1]}"
    return " ".join([name, *([" × ".join(f"{axis} {degree}" for axis, degree in axes)] if axes else [])])


def flat(config: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Flatten to dotted key -> scalar, with lists as JSON text. A node's key maps to its class name, if it has a `_target_`."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        key = f"{path}.{name}" if path else str(name)
        if name == "_target_":
            found[path] = str(value).rpartition(".")[2]
        elif name in ("_partial_", "_convert_"):
            continue
        elif isinstance(value, dict):
            found |= flat(value, key)
        else:
            found[key] = value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value, default=str)
    return found


def with_axes(rows: Iterable[Mapping[str, Any]], context_length: int) -> Iterator[dict[str, Any]]:
    """Add `tokens` (trained on so far) and `training_s` (seconds spent in training steps so far) to rows of metrics.csv.

    The seconds are the sum of tokens / rate over the logged intervals. They exclude start-up, validation and checkpoints, and continue over a
    resume. `training_s` is absent if the run logged no rate.
    """
    seconds, counted = None, 0.0
    for row in rows:
        if not isinstance(row.get("step"), int):
            continue
        added: dict[str, Any] = {}
        samples, rate = row.get("samples"), row.get("train/tokens_per_second")
        if isinstance(samples, (int, float)) and context_length:
            added["tokens"] = samples * context_length
            if isinstance(rate, (int, float)) and rate > 0:
                seconds = (seconds or 0.0) + (samples - counted) * context_length / rate
                counted = samples
        if seconds is not None:
            added["training_s"] = seconds
        yield {**row, **added}


def summary(rows: Iterable[Mapping[str, Any]], context_length: int) -> dict[str, Any]:
    """Return `last` (newest value per column), `best` (per val/ column), `best_step` (of val/loss) and `rate` (median tokens per second)."""
    last: dict[str, Any] = {}
    best: dict[str, tuple[float, int]] = {}
    rates: list[float] = []
    for row in with_axes(rows, context_length):
        last.update({key: value for key, value in row.items() if isinstance(value, (int, float))})
        for key, value in row.items():
            if not key.startswith("val/") or not isinstance(value, (int, float)) or not math.isfinite(value):
                continue
            sign = -1 if any(word in key for word in HIGHER_IS_BETTER) else 1
            if key not in best or sign * value < sign * best[key][0]:
                best[key] = value, row["step"]
        if isinstance(rate := row.get("train/tokens_per_second"), (int, float)):
            rates.append(rate)
    found: dict[str, Any] = {"last": last, "best": {key: value for key, (value, _) in best.items()}}
    if "val/loss" in best:
        found["best_step"] = best["val/loss"][1]
    if rates:
        found["rate"] = statistics.median(rates[1:] or rates)  # the first interval includes warm-up
    return found
