"""`meshformer runs` lists the runs of a folder, shows one or compares two; `meshformer report` writes their figures to an HTML page."""

from __future__ import annotations

import argparse
import csv
import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meshformer.config.errors import ConfigError
from meshformer.printing import csv_cell, say, visible
from meshformer.record import RunNotFound, find_run, read_run
from meshformer.runs.scan import UNREADABLE, Run, scan
from meshformer.runs.table import (
    METRICS,
    Row,
    distinguishing,
    find_key,
    is_setting,
    ordered,
    parse_filter,
    row_of,
    settings,
    shown,
    text_table,
    varying,
)  # fmt: skip

DEFAULT = ("run", "state", "started", "duration_s", "layout")
AFTER = ("step", "tokens_per_second", "val/loss", "best/val/loss")
NOT_IN_SETTINGS = ("strategy", "experiment")  # shown already by the columns `layout` and `run`


def run_records(command: str, argv: Sequence[str]) -> int:
    """Run `runs` or `report` with its arguments; return the exit code."""
    lists = command == "runs" and argv[:1] not in (["show"], ["diff"])
    # As the other commands name the folder of the runs.
    argv = [("" if lists else "--runs=") + word.partition("=")[2] if word.startswith("paths.runs=") else word for word in argv]
    try:
        if command == "report":
            return _report(argv)
        if argv and argv[0] == "show":
            return _show(argv[1:])
        if argv and argv[0] == "diff":
            return _diff(argv[1:])
        return _list(argv)
    except RunNotFound as error:
        raise ConfigError(str(error)) from None


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"meshformer {command}", add_help=False, allow_abbrev=False)

    def refuse(message: str) -> Any:
        raise ConfigError(message, fix=f"`meshformer {command.partition(' ')[0]} --help` shows how.")

    parser.error = refuse
    return parser


def _list(argv: Sequence[str]) -> int:
    parser = _parser("runs")
    parser.add_argument("words", nargs="*")
    parser.add_argument("--sort")
    parser.add_argument("--columns")
    parser.add_argument("--csv", action="store_true")
    parser.add_argument("--limit", type=int)
    options = parser.parse_intermixed_args(list(argv))
    if options.limit is not None and options.limit < 1:
        raise ConfigError("expected a whole number of at least 1", "--limit", options.limit)
    folders = [word for word in options.words if Path(word).expanduser().is_dir()]
    if len(folders) > 1:
        raise ConfigError(f"{len(folders)} folders are given", fix="Name one of them; runs are found however deep they lie.")
    filters = [word for word in options.words if word not in folders]
    if unclear := next((word for word in filters if not any(sign in word for sign in "=<>")), None):
        fix = "Did you mean `meshformer runs show last`?" if unclear == "last" else "Write key=value, or 'key<value' in quotes."
        raise ConfigError(f"{unclear!r} is neither a folder nor a filter", fix=fix)
    runs = _scan(Path(folders[0] if folders else "runs"))
    rows = {run.name: row_of(run) for run in runs}
    known = list(dict.fromkeys(key for row in rows.values() for key in row))
    for passes in [parse_filter(text, known) for text in filters]:
        rows = {name: row for name, row in rows.items() if passes(row)}
    chosen = list(rows.values())
    if options.sort:
        descending, key = options.sort.startswith("-"), find_key(options.sort.lstrip("-"), known)
        chosen = ordered(chosen, key, descending)
    if options.limit is not None:
        # Unsorted rows are in order of start, so --limit keeps the latest; sorted rows keep the first.
        chosen = chosen[: options.limit] if options.sort else chosen[-options.limit :]
    if options.columns:
        columns = [find_key(column.strip(), known) for column in options.columns.split(",")]
    elif options.csv:
        columns = _all_columns([run for run in runs if run.name in rows], known)
    else:
        columns = _columns([run for run in runs if run.name in rows], chosen)
    if options.csv:
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(map(csv_cell, columns))
        table.writerows([[csv_cell(row.get(column)) for column in columns] for row in chosen])
        say(text.getvalue(), end="")
    elif chosen:
        say(text_table(chosen, columns))
    else:
        say("no run" + (" passes the filters" if filters else ""))
    return 0


def _scan(folder: Path) -> list[Run]:
    if not folder.expanduser().is_dir():
        raise ConfigError(f"there is no folder {folder}", fix="Name the folder that holds the runs: meshformer runs FOLDER")
    runs, problems = scan(folder)
    for problem in problems:
        say(f"warning: {problem}", error=True)
    if not runs:
        raise ConfigError(f"{folder} holds no run yet", fix="`meshformer train` makes one.")
    return runs


def _columns(runs: Sequence[Run], rows: Sequence[Row]) -> list[str]:
    """Columns of the table on the terminal: the settings that distinguish the runs, and the metrics that any run has."""
    own = [{key: value for key, value in settings(run).items() if key not in NOT_IN_SETTINGS} for run in runs]
    figures = [key for key in AFTER if any(row.get(key) is not None for row in rows)]
    if figures[-2:] == ["val/loss", "best/val/loss"] and all(row.get("val/loss") == row.get("best/val/loss") for row in rows):
        figures.pop()
    return [*DEFAULT, *distinguishing(own, varying(own)), *figures, *(["error"] if any(row.get("error") for row in rows) else [])]


def _all_columns(runs: Sequence[Run], known: Sequence[str]) -> list[str]:
    """Columns of --csv: everything except settings that are the same in all runs."""
    differing = set(varying([settings(run) for run in runs]))
    return [key for key in known if not is_setting(key) or key in differing]


def _find(spec: str, root: Path | str) -> Run:
    folder = find_run(spec, root)
    runs, problems = scan(folder)
    for problem in problems:
        say(f"warning: {problem}", error=True)
    if not runs:
        raise ConfigError("the run cannot be read", "run", spec)
    return runs[0]


def _show(argv: Sequence[str]) -> int:
    parser = _parser("runs show")
    parser.add_argument("run")
    parser.add_argument("--runs", default="runs")
    options = parser.parse_args(list(argv))
    run = _find(options.run, options.runs)
    row, folder = row_of(run), Path(run.folder)
    say(folder, one_line=True)
    for key, text in _about(row, folder).items():
        if text:
            say(f"  {visible(key, lines=False):<20}{text}", one_line=True)
    figures = [{"metric": key, "final": row[key], "best": row.get(f"best/{key}")} for key in row if key.startswith(METRICS[:3])]
    if figures:
        say("\n" + text_table(figures, ["metric", "final", "best"]))
    for title, file in (("overrides", "overrides.txt"), ("config.yaml", "config.yaml")):
        if text := _read_text(folder / file):
            say(f"\n{title}\n" + "\n".join(f"  {line}" for line in text.splitlines()))
    return 0


def _about(row: Row, folder: Path) -> dict[str, str]:
    """Facts about the run other than its settings and metrics."""
    try:
        fields = read_run(folder) if (folder / "run.json").is_file() else {}
        device, versions, segments = fields.get("device") or {}, fields.get("versions") or {}, fields.get("segments") or []
        earlier = ", ".join(f"{part.get('state')} {shown(part.get('started'), 'started')}" for part in segments)
        used = ", ".join(f"{name} {version}" for name, version in versions.items())
        on = device if isinstance(device, str) else ", ".join(map(str, device.values()))
    except UNREADABLE as error:
        raise ConfigError(f"{folder / 'run.json'} is damaged ({error})", fix="Restore it from a copy.") from None
    own = {key: shown(row[key], key) for key in row if not is_setting(key) and not key.startswith(METRICS) and key not in ("run", "folder")}
    return {**own, "device": on, "versions": used, "earlier starts": earlier}


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _diff(argv: Sequence[str]) -> int:
    parser = _parser("runs diff")
    parser.add_argument("first")
    parser.add_argument("second")
    parser.add_argument("--runs", default="runs")
    options = parser.parse_args(list(argv))
    pair = [_find(spec, options.runs) for spec in (options.first, options.second)]
    a, b = [settings(run) for run in pair]
    rows = [{"setting": key, "A": _cell(a.get(key)), "B": _cell(b.get(key))} for key in varying([a, b])]
    say("\n".join(f"{letter}  {run.folder}" for letter, run in zip("AB", pair, strict=True)) + "\n")
    say(text_table(rows, ["setting", "A", "B"]) if rows else "their settings are the same")
    a, b = [row_of(run, ()) for run in pair]
    keys = [
        key
        for key in dict.fromkeys([*a, *b])
        if key.startswith(METRICS) or key in ("layout", "step", "tokens", "training_s", "parameters", "commit")
    ]
    figures = []
    for key in keys:
        left, right = a.get(key), b.get(key)
        off = float(right) - float(left) if isinstance(left, (int, float)) and isinstance(right, (int, float)) else None
        if left != right:
            figures.append({"figure": key, "A": shown(left, key), "B": shown(right, key), "B − A": "" if off is None else f"{off:+.4g}"})
    say("\n" + text_table(figures, ["figure", "A", "B", "B − A"]) if figures else "\ntheir figures are the same")
    return 0


def _cell(value: Any) -> str:
    return "null" if value is None else json.dumps(value) if isinstance(value, (bool, str)) and value != str(value).strip() else str(value)


def _report(argv: Sequence[str]) -> int:
    parser = _parser("report")
    parser.add_argument("run")
    parser.add_argument("--output", "-o")
    parser.add_argument("--runs", default="runs")
    options = parser.parse_args(list(argv))
    source = Path(options.run).expanduser()
    folder = source if source.is_dir() else find_run(options.run, options.runs)
    output = Path(options.output).expanduser() if options.output else folder / "report.html"
    if output.is_dir() or not output.parent.is_dir():
        raise ConfigError("no file can be written there", "--output", str(output), fix="Name a file in a folder that is there.")
    start = time.perf_counter()
    try:
        from meshformer.runs import write_report
    except ImportError as error:
        raise ConfigError(str(error)) from None
    try:
        write_report(folder, output)
    except OSError as error:
        raise ConfigError(
            f"the page cannot be written ({error.strerror})", "--output", str(output), fix="Name another with --output."
        ) from None
    say(f"{output}  ({output.stat().st_size / 1024:.0f} KiB, {time.perf_counter() - start:.1f} s)")
    return 0
