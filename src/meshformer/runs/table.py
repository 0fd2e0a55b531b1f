"""Turn runs into rows of a table, and filter, sort and print them. Plain Python, used on the terminal and by the pandas frames."""

from __future__ import annotations

import fnmatch
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from meshformer.config.errors import ConfigError
from meshformer.config.suggest import did_you_mean
from meshformer.printing import visible
from meshformer.runs.scan import Run

Row = dict[str, Any]
# Columns of every run. All other columns are settings, except those that start with a prefix in METRICS.
TIMES = ("duration_s", "training_s")  # seconds
HEAD = ("run", "state", "started", "duration_s", "layout")
FIGURES = ("processes", "device", "parameters", "step", "tokens", "training_s", "tokens_per_second")
TAIL = ("best_step", "context_length", "commit", "dirty", "error", "folder")
METRICS = ("train/", "val/", "test/", "best/")
# Keys that only say where and how a run was executed, or that duplicate a group's option.
NO_SETTING = (
    "paths", "resume", "fork", "run", "allow", "launch", "logger", "data.source", "stage.name", "strategy.name", "strategy.timeout",
    "trainer.progress", "trainer.threads",
)  # fmt: skip
FILTER = re.compile(r"\s*([\w./ -]+?)\s*(<=|>=|!=|==|=|<|>)\s*(.*?)\s*", re.DOTALL)


def settings(run: Run) -> Row:
    """Return the settings that can differ between runs: the option of every group, then every key."""
    said = {group.replace("/", ".") for group in run.choices}  # the group's option already names the node's class
    return {**run.choices, **{key: value for key, value in run.config.items() if _counts(key) and key not in said}}


@cache  # called with the same hundred keys for thousands of runs
def _counts(key: str) -> bool:
    return not any(key == prefix or key.startswith(f"{prefix}.") for prefix in NO_SETTING)


def varying(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys whose values differ between rows; a missing key counts as None."""
    keys = dict.fromkeys(itertools.chain.from_iterable(rows))
    first = rows[0] if rows else {}
    return [key for key in keys if any(row.get(key) != first.get(key) for row in rows)]


def distinguishing(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[str]:
    """Return a minimal subset of `keys` that distinguishes the rows as well as all of them, preferring early keys: `model` over its seven sizes."""

    def groups(some: Sequence[str]) -> int:
        return len({tuple(repr(row.get(key)) for key in some) for row in rows})

    wanted, chosen = groups(keys), list[str]()
    for key in keys:
        if groups(chosen) < wanted and groups([*chosen, key]) > groups(chosen):
            chosen.append(key)
    for key in list(chosen):
        if groups([other for other in chosen if other != key]) == wanted:
            chosen.remove(key)
    return chosen


def row_of(run: Run, keys: Iterable[str] | None = None) -> Row:
    """Return all columns of a run in table order, with the settings `keys` or all settings."""
    own = settings(run) if keys is None else {**run.config, **run.choices}
    last = run.metrics.get("last", {})
    figures = {key: value for key, value in {**last, **run.record.get("final", {})}.items() if key.startswith(METRICS)}
    figures |= {f"best/{key}": value for key, value in run.metrics.get("best", {}).items()}
    known = {
        **run.record,
        "run": run.name,
        "folder": run.folder,
        "context_length": run.context_length,
        **{key: last.get(key) for key in ("step", "tokens", "training_s")},
        "tokens_per_second": run.metrics.get("rate"),
        "best_step": run.metrics.get("best_step"),
    }
    return {
        **{key: known.get(key) for key in HEAD},
        **{key: own.get(key) for key in (own if keys is None else keys)},
        **{key: known.get(key) for key in FIGURES},
        **figures,
        **{key: known.get(key) for key in TAIL},
    }


def is_setting(column: str) -> bool:
    return column not in (*HEAD, *FIGURES, *TAIL) and not column.startswith(METRICS)


def parse_filter(text: str, known: Iterable[str]) -> Callable[[Row], bool]:
    """`state=finished`, `model/position!=none`, `val/loss<1.7`, `run=*char*`: parsed to a predicate on rows.

    A key may be given by its last part if that is unique (`lr`). Numbers are compared as numbers, text as patterns with `*` and `?`; a row without
    the key passes only `!=`. Raises ConfigError for an invalid filter or an unknown key.
    """
    match = FILTER.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is neither a folder nor a filter", fix="Write key=value, or 'key<value' in quotes.")
    typed, operator, wanted = match.groups()
    key, number = find_key(typed, known), _as_number(wanted)

    def passes(row: Row) -> bool:
        value: Any = row.get(key)
        if operator in ("=", "==", "!="):
            return _equal(value, wanted, number) == (operator != "!=")
        limit: Any = wanted if isinstance(value, str) else number  # times are ISO text
        if limit is None or not isinstance(value, (int, float, str)):
            return False
        return {"<": value < limit, ">": value > limit, "<=": value <= limit, ">=": value >= limit}[operator]

    return passes


def _equal(value: Any, wanted: str, number: float | None) -> bool:
    if value is None or isinstance(value, bool):
        return wanted.lower() in {True: ("true",), False: ("false",), None: ("null", "none", "")}[value]
    if number is not None and isinstance(value, (int, float)):
        return value == number
    return fnmatch.fnmatchcase(str(value), wanted)


def _as_number(text: str) -> float | None:
    try:
        return float(text.replace("_", ""))
    except ValueError:
        return None


def find_key(typed: str, known: Iterable[str]) -> str:
    """Return the column named by `typed`. Raises ConfigError with the closest one."""
    names = list(dict.fromkeys(known))
    if typed in names:
        return typed
    ends = [name for name in names if re.split(r"[./]", name)[-1] == typed]
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise ConfigError(f"{typed!r} may mean {', '.join(ends)}", fix="Write more of it.")
    raise ConfigError(f"no run has {typed!r}", fix=did_you_mean(typed, names))


def ordered(rows: Sequence[Row], key: str, descending: bool = False) -> list[Row]:
    """Sort rows by one column: numbers, then text, then rows without a value, which stay last in either direction."""

    def kind(row: Row) -> int:
        value = row.get(key)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return 2
        return 0 if isinstance(value, (int, float)) else 1

    numbers, texts, missing = ([row for row in rows if kind(row) == k] for k in range(3))
    numbers.sort(key=lambda row: row[key], reverse=descending)
    texts.sort(key=lambda row: str(row[key]), reverse=descending)
    return [*numbers, *texts, *missing]


def heading(key: str) -> str:
    """The heading of a column whose values `shown` formats: times are shown as h:mm:ss, so `duration_s` is `duration`."""
    return key.removesuffix("_s") if key in TIMES else key


def shown(value: Any, key: str = "") -> str:
    """Format a cell for display."""
    if value is None or (isinstance(value, float) and math.isnan(value) and not key.startswith(METRICS)):
        return ""
    if key == "started":
        return str(value)[:16].replace("T", " ")
    if key in TIMES and math.isfinite(value):
        minutes, seconds = divmod(round(float(value)), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
    if key == "commit":
        return str(value)[:8]
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4f}" if key.endswith(("loss", "loss ±")) else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10000:
        return f"{value:,}"
    return str(value)


def text_table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Format rows as aligned text columns, numbers right-aligned."""
    cells = [[visible(shown(row.get(column), column).replace("\n", " "), lines=False) for column in columns] for row in rows]
    heads = [visible(heading(column), lines=False) for column in columns]
    widths = [max(len(text) for text in (heads[i], *(line[i] for line in cells))) for i in range(len(columns))]
    right = [all(row.get(column) is None or isinstance(row.get(column), (int, float)) for row in rows) for column in columns]

    def line(texts: Sequence[str]) -> str:
        parts = zip(texts, widths, right, strict=True)
        return "  ".join(text.rjust(width) if flush else text.ljust(width) for text, width, flush in parts).rstrip()

    return "\n".join([line(heads), *map(line, cells)])
