"""Write a self-contained HTML page about a run or a folder of runs: figures, results, settings. It loads nothing."""

from __future__ import annotations

import math
import warnings
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from meshformer.config.errors import ConfigError
from meshformer.config.paths import leads_out
from meshformer.record import atomic_write_text
from meshformer.runs.figures import all_figures
from meshformer.runs.frames import compare, load_metrics, load_runs, plain, setting_columns
from meshformer.runs.page import CSS, PAGE, POLICY, SCRIPT
from meshformer.runs.panels import data_url, panels
from meshformer.runs.profile import CAPTIONS, recorded
from meshformer.runs.table import heading, shown

LISTED = 200  # runs in the table; larger sweeps are for notebooks


def write_report(source: Path | str, output: Path | str) -> None:
    """Write a page about the run `source`, or about all runs below it, to the file `output`, atomically.

    Raises RunNotFound if there is no run, OSError if the file cannot be written.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runs = load_runs(source)
        metrics = load_metrics(runs)
        figures = list(all_figures(runs, metrics))
    problems = [str(warning.message) for warning in caught if warning.category is UserWarning]
    profile = None
    if len(runs) == 1:
        try:
            profile = _profile(Path(runs.iloc[0]["folder"]))
        except ConfigError as error:
            problems.append(str(error))
    atomic_write_text(output, page(Path(source), runs, figures, problems, profile))


def page(source: Path, runs: pd.DataFrame, figures: list[Any], problems: list[str], profile: dict[str, Any] | None = None) -> str:
    single = len(runs) == 1
    commits = sorted({str(commit)[:10] for commit in runs["commit"].dropna()})
    done = runs[runs["state"] == "finished"]
    results = None
    if single:
        row = {str(key): plain(value) for key, value in runs.iloc[0].items()}
        results = _table([{"": heading(key), " ": shown(value, key)} for key, value in row.items() if shown(value, key)])
    elif "val/loss" in done and done["val/loss"].notna().any():
        results = _frame(compare(runs))
    columns = ["run", "state", "started", "duration_s", "layout", *setting_columns(runs), "step", "val/loss", "best/val/loss", "error"]
    listed = runs[[column for column in dict.fromkeys(columns) if column in runs]]
    return PAGE.render(
        css=CSS,
        policy=Markup(POLICY),
        script=Markup(SCRIPT),
        title=f"{'Run' if single else 'Runs of'} {source.resolve().name}",
        source=source.resolve(),
        states=", ".join(f"{count} {state}" for state, count in runs["state"].value_counts().items()),
        commits=", ".join(commits) or "unknown",
        now=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        problems=problems,
        single=single,
        results=results,
        figures=[{"caption": caption, "panels": panels(figure)} for caption, figure in figures],
        profile=profile,
        runs=None if single else _frame(listed.tail(LISTED)),
        more=f"The latest {LISTED} of {len(runs)}." if len(runs) > LISTED else "",
        latest=runs.iloc[-1]["run"],
        settings=_settings(Path(runs.iloc[-1]["folder"]), single),
    )


def _profile(folder: Path) -> dict[str, Any] | None:
    """The section about a run's recorded steps; None without. The pictures are drawn anew from the tables, so no foreign file is shown."""
    found = recorded(folder)
    if found is None:
        return None
    return {
        "steps": ", ".join(map(str, found.steps)),
        "table": _table([{column: row[column] for column in found.columns} for row in found.rows]),
        "told": found.told,
        "figures": [{"caption": CAPTIONS[name], "data": data_url(svg.encode())} for name, svg in found.pictures.items()],
    }


def _settings(folder: Path, single: bool) -> list[dict[str, Any]]:
    """Return the settings files of one run, which for a folder is the latest, and for a single run also its newest sample."""
    samples = sorted((folder / "samples").glob("*.txt"))[-1:] if single else []
    found = []
    for file in (folder / "overrides.txt", folder / "config.yaml", *samples):
        if leads_out(file, folder):
            continue
        try:
            text = file.read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            continue
        if text:
            found.append({"name": file.relative_to(folder), "text": text, "open": file.name == "overrides.txt"})
    return found


def _frame(frame: pd.DataFrame) -> dict[str, Any]:
    rows = [{str(key): plain(value) for key, value in row.items()} for row in frame.to_dict("records")]
    kept = [column for column in map(str, frame.columns) if any(row[column] is not None for row in rows)]
    return _table([{column: row[column] for column in kept} for row in rows])


def _table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    def number(value: Any) -> Any:
        """`value` if it is a finite number, for sorting; else None."""
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return value if is_number and math.isfinite(value) else None

    columns = list(rows[0]) if rows else []
    cells = [[{"text": shown(row[column], column), "number": number(row[column])} for column in columns] for row in rows]
    return {"columns": list(map(heading, columns)), "rows": cells}
