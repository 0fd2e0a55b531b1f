"""Load runs and their metrics as pandas frames, for notebooks."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pandas as pd

from meshformer.record import RunNotFound, read_metrics
from meshformer.runs.scan import UNREADABLE, scan, with_axes
from meshformer.runs.table import HEAD, distinguishing, is_setting, row_of, settings, varying

Source = pd.DataFrame | Path | str
AXES = ("step", "tokens", "training_s")


def load_runs(path: Path | str = "runs", cache: bool = True) -> pd.DataFrame:
    """Return one row per run at or below `path` (a run, a sweep folder, a folder of sweeps), the latest last.

    Columns: `run` (its path below `path`), `state`, `started`, `duration_s` (wall clock of all segments, s), `layout`; each setting that
    differs between runs (`optimizer.lr`, `model/position`, `seed`); `parameters`, `step`, `tokens`, `training_s` (s in training steps),
    `tokens_per_second` (median of the rows); final metrics (`val/loss`), the best of every validation metric (`best/val/loss`) and
    `best_step`; `commit`, `dirty`, `error`, `folder`. A damaged or half-written file is skipped with a warning that names it.

    Raises RunNotFound if `path` is not a folder or holds no run. `cache=False` reads every file again.
    """
    runs, problems = scan(path, cache)
    for problem in problems:
        warnings.warn(problem, stacklevel=2)
    if not runs:
        raise RunNotFound(f"{path} holds no run that can be read.")
    keys = varying([settings(run) for run in runs])
    frame = pd.DataFrame([row_of(run, keys) for run in runs])
    frame["started"] = pd.to_datetime(frame["started"], utc=True, errors="coerce")
    return frame


def load_metrics(runs: Source) -> pd.DataFrame:
    """Every number in the runs' metrics.csv, in long format: `run`, the settings that differ, `step`, `tokens`, `training_s`, `metric`, `value`.

    `runs` is a frame of `load_runs`, possibly filtered, or a path. Text and empty cells are left out.
    """
    frame = _frame(runs)
    tables = []
    for row in frame.to_dict("records"):
        file = Path(row["folder"]) / "metrics.csv"
        try:
            rows = list(with_axes(read_metrics(file), int(row["context_length"]))) if file.is_file() else []
        except UNREADABLE as error:
            warnings.warn(f"{file}: {error}; the run has no metrics", stacklevel=2)
            rows = []
        if rows:
            tables.append(pd.DataFrame(rows).assign(run=row["run"]))
    columns = setting_columns(frame)
    if not tables:
        return pd.DataFrame(columns=["run", *columns, *AXES, "metric", "value"])
    wide = pd.concat(tables, ignore_index=True)
    axes = [axis for axis in AXES if axis in wide]
    figures = [column for column in wide.columns if "/" in str(column)]
    wide[figures] = wide[figures].apply(pd.to_numeric, errors="coerce")
    wide = wide.merge(frame[["run", *columns]], on="run")
    long = wide.melt(id_vars=["run", *columns, *axes], value_vars=figures, var_name="metric")
    return long.dropna(subset=["value"]).reset_index(drop=True)


def compare(runs: Source, metric: str = "val/loss", higher_is_better: bool = False) -> pd.DataFrame:
    """Group finished runs by their settings without the seed, best first: `seeds`, mean and deviation of `metric`, mean of its best, and speed.

    `metric ±` is the sample standard deviation (n − 1), empty for one seed. Only the settings needed to distinguish the rows get a column.
    """
    frame = _frame(runs)
    if metric not in frame:
        raise KeyError(f"no run has {metric!r}; there are {', '.join(c for c in frame.columns if '/' in c and not is_setting(c))}")
    done: Any = frame[(frame["state"] == "finished") & frame[metric].notna()]
    by = distinguishing_columns(done)
    wanted = {"seeds": (metric, "size"), metric: (metric, "mean"), f"{metric} ±": (metric, "std")}
    means = [f"best/{metric}", "tokens_per_second", "training_s", "parameters"]
    wanted |= {name: (name, "mean") for name in means if name in done and done[name].notna().any()}
    # If all settings are the same, a constant key puts every run into one group.
    groups: Any = done.groupby(by, dropna=False, sort=False) if by else done.groupby(lambda _: "all")
    return groups.agg(**wanted).reset_index(drop=not by).sort_values(metric, ascending=not higher_is_better, ignore_index=True)


def setting_columns(frame: pd.DataFrame) -> list[str]:
    """Return the columns that are settings of the runs."""
    return [column for column in frame.columns if is_setting(column) and column not in ("metric", "value", "flops")]


def distinguishing_columns(frame: pd.DataFrame, leave_out: tuple[str, ...] = ("seed",)) -> list[str]:
    """Return a minimal set of setting columns, without the seed, that distinguishes all combinations of settings."""
    columns = [column for column in setting_columns(frame) if column not in leave_out]
    distinct: Any = frame[columns].drop_duplicates()
    rows = distinct.to_dict("records")
    return distinguishing([{str(key): plain(value) for key, value in row.items()} for row in rows], columns)


def labels(frame: pd.DataFrame) -> pd.Series:
    """Return a short name for each row from the settings that distinguish the rows: `ddp`, `lr 0.03`, `alibi, d_model 64`."""
    columns = distinguishing_columns(frame)
    if not columns:
        return pd.Series("all runs" if frame["run"].nunique() > 1 else frame["run"].astype(str), index=frame.index)

    def part(column: str, value: Any) -> str:
        value, short = plain(value), column.rpartition(".")[2]
        return str(value) if "." not in column else f"{short} {value:g}" if isinstance(value, (int, float)) else f"{short} {value}"

    rows = frame[columns].itertuples(index=False, name=None)
    return pd.Series([", ".join(map(part, columns, row)) for row in rows], index=frame.index)


def plain(value: Any) -> Any:
    """Convert to a Python scalar; NaN becomes None."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and value != value else value


def _frame(runs: Source) -> pd.DataFrame:
    if not isinstance(runs, pd.DataFrame):
        return load_runs(runs)
    if missing := [column for column in (*HEAD[:2], "folder", "context_length") if column not in runs]:
        raise KeyError(f"not a frame of load_runs: it lacks {', '.join(missing)}")
    return runs
