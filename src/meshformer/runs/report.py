"""Write a self-contained HTML page about a run or a folder of runs: figures, results, settings. It has no scripts and loads nothing."""

from __future__ import annotations

import base64
import io
import math
import warnings
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from meshformer.config.errors import ConfigError
from meshformer.config.paths import leads_out
from meshformer.printing import visible
from meshformer.record import atomic_write_text
from meshformer.runs.figures import STYLE, all_figures
from meshformer.runs.frames import compare, load_metrics, load_runs, plain, setting_columns
from meshformer.runs.profile import CAPTIONS, recorded
from meshformer.runs.table import shown

CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; } figure { margin: 1rem 0; } img { max-width: 100%; }
figcaption, .note { color: #555; font-size: .87rem; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap; } td.n { text-align: right; }
pre { background: #f6f6f6; padding: .7rem; overflow-x: auto; font-size: .8rem; } summary { cursor: pointer; }
"""


def _shown(value: Any) -> Any:
    return value if isinstance(value, Markup) else visible(value)  # the output of a macro is escaped already


# A run's files are untrusted. All text from them enters through this template, which escapes every value, and the Content-Security-Policy keeps the
# browser from loading anything.
PAGE = Environment(autoescape=True, finalize=_shown, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
    """<!doctype html>
{% macro draw(table) %}
<div class="wide"><table><tr>{% for column in table.columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in table.rows %}
<tr>{% for cell in row %}<td{% if cell.number %} class="n"{% endif %}>{{ cell.text }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endmacro %}
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title><style>{{ css }}</style></head>
<body>
<h1>{{ title }}</h1>
<p class="note">{{ source }}<br>{{ states }}; commit {{ commits }}; written {{ now }}</p>
{% if problems %}
<h2>Left out</h2><ul>{% for text in problems %}<li>{{ text }}</li>{% endfor %}</ul>
{% endif %}
{% if results %}
<h2>Results</h2>
{% if not single %}
<p class="note">Finished runs, best first; ± is the deviation over seeds.</p>
{% endif %}
{{ draw(results) }}
{% endif %}
<h2>Figures</h2>
{% for figure in figures %}
<figure><img alt="{{ figure.caption }}" src="{{ figure.data }}"><figcaption>{{ figure.caption }}</figcaption></figure>
{% endfor %}
{% if profile %}
<h2>Recorded steps</h2>
<p class="note">Milliseconds of a step, the mean of steps {{ profile.steps }}.</p>
{{ draw(profile.table) }}
<ul>{% for text in profile.told %}<li>{{ text }}</li>{% endfor %}</ul>
{% for figure in profile.figures %}
<figure><img alt="{{ figure.caption }}" src="{{ figure.data }}"><figcaption>{{ figure.caption }}</figcaption></figure>
{% endfor %}
{% endif %}
{% if runs %}
<h2>Runs</h2>
{% if more %}
<p class="note">{{ more }}</p>
{% endif %}
{{ draw(runs) }}
{% endif %}
<h2>Settings</h2>
{% if not single %}
<p class="note">Of the latest, {{ latest }}; the others differ by what the table shows.</p>
{% endif %}
{% for part in settings %}
<details{% if part.open %} open{% endif %}><summary>{{ part.name }}</summary><pre>{{ part.text }}</pre></details>
{% endfor %}
</body></html>
"""
)
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
        results = _table([{"": key, " ": shown(value, key)} for key, value in row.items() if shown(value, key)])
    elif "val/loss" in done and done["val/loss"].notna().any():
        results = _frame(compare(runs))
    columns = ["run", "state", "started", "duration_s", "layout", *setting_columns(runs), "step", "val/loss", "best/val/loss", "error"]
    listed = runs[[column for column in dict.fromkeys(columns) if column in runs]]
    return PAGE.render(
        css=CSS,
        title=f"{'Run' if single else 'Runs of'} {source.resolve().name}",
        source=source.resolve(),
        states=", ".join(f"{count} {state}" for state, count in runs["state"].value_counts().items()),
        commits=", ".join(commits) or "unknown",
        now=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        problems=problems,
        single=single,
        results=results,
        figures=[{"caption": caption, "data": _data(figure)} for caption, figure in figures],
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
        "figures": [{"caption": CAPTIONS[name], "data": _data_url(svg.encode())} for name, svg in found.pictures.items()],
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
    def is_number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and not (isinstance(value, float) and math.isnan(value))

    columns = list(rows[0]) if rows else []
    cells = [[{"text": shown(row[column], column), "number": is_number(row[column])} for column in columns] for row in rows]
    return {"columns": columns, "rows": cells}


def _data(figure: Any) -> str:
    """Return the figure as an SVG data URL. As an <img> it has its own scope, so ids of different figures do not clash."""
    out = io.BytesIO()
    with plt.rc_context(STYLE):
        figure.savefig(out, format="svg", bbox_inches="tight", metadata={"Date": None})
    return _data_url(out.getvalue())


def _data_url(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
