"""One self-contained page about a run or a folder of runs: the figures, the results, the settings. No script, nothing fetched from anywhere."""

from __future__ import annotations

import base64
import io
import math
import warnings
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from meshformer.record import atomic_write_text
from meshformer.runs.figures import STYLE, all_figures
from meshformer.runs.frames import compare, load_metrics, load_runs, plain, setting_columns
from meshformer.runs.table import shown

CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; } figure { margin: 1rem 0; } img { max-width: 100%; }
figcaption, .note { color: #555; font-size: .87rem; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap; } td.n { text-align: right; }
pre { background: #f6f6f6; padding: .7rem; overflow-x: auto; font-size: .8rem; } summary { cursor: pointer; }
"""
LISTED = 200  # runs in the table; a sweep of thousands is read in a notebook


def write_report(source: Path | str, output: Path | str) -> None:
    """Write a page about the run `source`, or about all runs below it, to the file `output`, atomically.

    Raises RunNotFound where there is none, OSError where the file cannot be written.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runs = load_runs(source)
        metrics = load_metrics(runs)
        figures = list(all_figures(runs, metrics))
    problems = [str(warning.message) for warning in caught if warning.category is UserWarning]
    atomic_write_text(output, page(Path(source), runs, figures, problems))


def page(source: Path, runs: pd.DataFrame, figures: list[Any], problems: list[str]) -> str:
    single = len(runs) == 1
    title = f"{'Run' if single else 'Runs of'} {source.resolve().name}"
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    states = ", ".join(f"{count} {state}" for state, count in runs["state"].value_counts().items())
    commits = sorted({str(commit)[:10] for commit in runs["commit"].dropna()})
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="note">{escape(str(source.resolve()))}<br>{states}; commit {escape(", ".join(commits) or "unknown")}; written {now}</p>',
    ]
    if problems:
        parts.append("<h2>Left out</h2><ul>" + "".join(f"<li>{escape(text)}</li>" for text in problems) + "</ul>")
    done = runs[runs["state"] == "finished"]
    if single:
        row = {key: plain(value) for key, value in runs.iloc[0].items()}
        parts += [
            "<h2>Results</h2>",
            _table([{"": key, " ": shown(value, str(key))} for key, value in row.items() if shown(value, str(key))]),
        ]
    elif "val/loss" in done and done["val/loss"].notna().any():
        parts += [
            "<h2>Results</h2>",
            '<p class="note">Finished runs, best first; ± is the deviation over seeds.</p>',
            _frame(compare(runs)),
        ]
    parts.append("<h2>Figures</h2>")
    parts += [
        f'<figure><img alt="{escape(caption)}" src="{_data(figure)}"><figcaption>{escape(caption)}</figcaption></figure>'
        for caption, figure in figures
    ]
    if not single:
        columns = ["run", "state", "started", "duration_s", "layout", *setting_columns(runs), "step", "val/loss", "best/val/loss", "error"]
        table = runs[[column for column in dict.fromkeys(columns) if column in runs]]
        more = f'<p class="note">The latest {LISTED} of {len(runs)}.</p>' if len(runs) > LISTED else ""
        parts += ["<h2>Runs</h2>", more, _frame(table.tail(LISTED))]
    parts += ["<h2>Settings</h2>", *_settings(runs)]
    # The policy lets a browser load nothing: whatever a run's texts say, the page fetches and runs nothing.
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{CSS}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _settings(runs: pd.DataFrame) -> list[str]:
    """The configuration of one run: its own, or the latest's, from which the others differ by the columns above."""
    latest = runs.iloc[-1]
    note = (
        ""
        if len(runs) == 1
        else f'<p class="note">Of the latest, {escape(str(latest["run"]))}; the others differ by what the table shows.</p>'
    )
    parts = [note]
    for name in ("overrides.txt", "config.yaml"):
        try:
            text = (Path(latest["folder"]) / name).read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            continue
        if text:
            parts.append(
                f"<details{' open' if name == 'overrides.txt' else ''}><summary>{name}</summary><pre>{escape(text)}</pre></details>"
            )
    samples = sorted((Path(latest["folder"]) / "samples").glob("*.txt"))
    if len(runs) == 1 and samples:
        text = samples[-1].read_text(encoding="utf-8", errors="replace").strip()
        parts.append(f"<details><summary>samples/{escape(samples[-1].name)}</summary><pre>{escape(text)}</pre></details>")
    return parts


def _frame(frame: pd.DataFrame) -> str:
    rows = [{str(key): plain(value) for key, value in row.items()} for row in frame.to_dict("records")]
    kept = [column for column in map(str, frame.columns) if any(row[column] is not None for row in rows)]
    return _table([{column: row[column] for column in kept} for row in rows])


def _table(rows: list[dict[str, Any]]) -> str:
    def cell(value: Any, key: str) -> str:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and not (isinstance(value, float) and math.isnan(value))
        return f'<td class="n">{shown(value, key)}</td>' if number else f"<td>{escape(shown(value, key))}</td>"

    columns = list(rows[0]) if rows else []
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(cell(row[column], column) for column in columns) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _data(figure: Any) -> str:
    """The figure as SVG in a data address. An image of its own: names inside it cannot meet those of another figure."""
    out = io.BytesIO()
    with plt.rc_context(STYLE):
        figure.savefig(out, format="svg", bbox_inches="tight", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()
