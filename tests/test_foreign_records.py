"""What a stranger's run or sweep folder says of itself is shown as text, in HTML, CSV and on a terminal; its checkpoints stay in their folders."""

from __future__ import annotations

import ast
import csv
import io
import json
import pickle
import shutil
import warnings
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import meshformer
from meshformer.checkpoint.find import MANIFEST, METADATA, latest_checkpoint, read_manifest, write_manifest
from meshformer.checkpoint.read import read_metadata, read_tensors
from meshformer.checkpoint.write import write_folder
from meshformer.cli import main
from meshformer.command.sweep.record import Point, SweepRecord
from meshformer.config import ConfigError
from meshformer.printing import csv_cell, visible
from meshformer.runs import load_metrics, load_runs
from meshformer.runs.page import POLICY
from planted import FORMULA, KINDS, MARKUP, Dumper, Plants, Watch, places, planted, refuse_raw
from run_folders import write_run


class Page(HTMLParser):
    """The elements of a page, with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, list[str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, [f"{name}={value}" for name, value in attrs if name not in ("src", "alt", "class", "open")]))


OWN = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "h1",
    "h2",
    "p",
    "br",
    "ul",
    "li",
    "div",
    "table",
    "tr",
    "th",
    "td",
    "figure",
    "img",
}
OWN |= {"figcaption", "details", "summary", "pre", "script"}


@pytest.fixture
def plants(tmp_path: Path) -> Plants:
    return Plants(tmp_path)


@pytest.fixture(autouse=True)
def _without_figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A figure takes half a second; one test draws them."""
    monkeypatch.setenv("MESHFORMER_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr("meshformer.runs.report.all_figures", lambda *_: [])


def show(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every way to look at runs, none of which may do more than show text."""
    text = ""
    for words in (["runs", str(folder)], ["runs", "show", str(folder / "a")], ["runs", "diff", str(folder / "a"), str(folder / "b")]):
        assert main(words) in (0, 2), words
    out, err = capsys.readouterr()
    refuse_raw(out + err)
    assert "Traceback" not in err, err
    if main(["runs", str(folder), "--csv"]) == 0:
        text = capsys.readouterr().out
        refuse_raw(text)
        for cell in (cell for row in csv.reader(io.StringIO(text)) for cell in row):
            assert cell[:1] not in ("=", "@", "\t") and (cell[:1] not in ("+", "-") or float(cell) is not None), cell
    page = folder / "page.html"
    page.unlink(missing_ok=True)
    if main(["report", str(folder), f"--output={page}"]) == 0:
        text = page.read_text()
        found = Page(text).found
        assert {tag for tag, _ in found} <= OWN, text
        assert POLICY.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-") and text.count("<script") == 1
        assert [attributes for tag, attributes in found if tag == "meta"] == [
            ["charset=utf-8"],
            ["name=viewport", "content=width=device-width"],
            ["http-equiv=Content-Security-Policy", f"content={POLICY}"],
        ]
        refuse_raw(text)
    out, err = capsys.readouterr()
    refuse_raw(out + err)
    assert "Traceback" not in err, err


def two_runs(folder: Path) -> tuple[Path, Path]:
    lines = ["seed=1", "model=nano"]
    return (
        write_run(folder / "runs" / "a", overrides="\n".join(lines)),
        write_run(folder / "runs" / "b", overrides="\n".join(lines), lr=0.2, strategy="ddp"),
    )


def fields(name: str, run: Path) -> Any:
    text = (run / name).read_text()
    return (
        json.loads(text)
        if name == "run.json"
        else yaml.safe_load(text)
        if name == "config.yaml"
        else [x.split(",") for x in text.splitlines()]
    )


def put(name: str, run: Path, made: Any) -> None:
    if name == "run.json":
        (run / name).write_text(json.dumps(made))
    elif name == "config.yaml":
        (run / name).write_text(yaml.dump(made, Dumper=Dumper))
    else:
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows(made)
        (run / name).write_text(out.getvalue())


@pytest.mark.parametrize("kind", [*KINDS, "formula"])
@pytest.mark.parametrize("name", ["run.json", "config.yaml", "metrics.csv"])
def test_what_a_record_says_is_shown_as_text(
    name: str, kind: str, tmp_path: Path, plants: Plants, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = two_runs(tmp_path)
    whole = fields(name, run)
    value = FORMULA if kind == "formula" else plants.value(kind)
    for place in places(whole):
        if name == "metrics.csv" and len(place) < 2:
            continue
        made = list(planted(whole, place, value))
        for one in made[:1] if name == "metrics.csv" else made[:2]:
            put(name, run, one)
            with Watch(plants.outside) as opened:
                show(tmp_path / "runs", capsys)
            assert not opened, place
            plants.check()


@pytest.mark.parametrize("kind", [*KINDS, "formula"])
def test_lines_of_the_overrides_and_names_of_folders_are_shown_as_text(
    kind: str, tmp_path: Path, plants: Plants, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = two_runs(tmp_path)
    value = str(FORMULA if kind == "formula" else plants.value(kind))
    (run / "overrides.txt").write_text(f"{value}\nseed={value}\nmodel/position={value}\n")
    run.rename(run.with_name(value.replace("/", ":")[:80]))
    (run / "samples").mkdir(parents=True)
    write_run(run.parent / "c")
    (run.parent / "c" / "samples").mkdir()
    (run.parent / "c" / "samples" / "step-1.txt").write_text(value)
    show(run.parent, capsys)
    assert main(["report", str(run.parent / "c")]) == 0
    assert {tag for tag, _ in Page((run.parent / "c" / "report.html").read_text()).found} <= OWN
    for words in (["train", f"resume={run.parent}/{value}"], ["evaluate", f"run='{value}'"], ["runs", "show", value], ["report", value]):
        assert main(words) == 2
        out, err = capsys.readouterr()
        refuse_raw(out + err)
        assert len(err.strip().splitlines()) == 1, err


def test_figures_take_names_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from meshformer.runs.figures import all_figures

    monkeypatch.setattr("meshformer.runs.report.all_figures", all_figures)
    run, other = two_runs(tmp_path)
    for folder in (run, other):
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["model"]["norm"] = f"$\\frac{{{folder.name}$ {MARKUP}"
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["report", str(run.parent)]) == 0
        frame = load_runs(run.parent)
    assert len(frame) == 2 and len(load_metrics(frame))
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("text", ["-1.5", "+3", "1e-5", "-inf", "nan", "0", ".5", "-2."])
def test_numbers_stay_numbers_in_a_csv(text: str) -> None:
    assert csv_cell(text) == text and csv_cell(float(text)) == pytest.approx(float(text), nan_ok=True)


@pytest.mark.parametrize("text", ["=1+1", "+cmd", "-1+1", "@sum", "\t=1", "\r=1", "\n=1", "-", "+1_000"])
def test_no_cell_is_a_formula(text: str) -> None:
    assert csv_cell(text).startswith("'")


def test_what_a_terminal_would_obey_is_written_out() -> None:
    assert visible("a\x1b[31mb\r\nc\x9b\u202e\udc9b\x00") == "a\\x1b[31mb\nc\\x9b\\u202e\\udc9b\\x00"
    assert visible("a\nb", lines=False) == "a\\nb" and visible("löss ± ½ 日本") == "löss ± ½ 日本"


def test_the_program_prints_in_one_place() -> None:
    root = Path(meshformer.__file__).parent
    found = []
    for file in root.rglob("*.py"):
        if {"bench", "on_device"} & set(file.parts) or file.name == "printing.py":  # on_device: scripts that run without this package
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write"):
                found.append(f"{file.relative_to(root)}:{node.lineno}")
    assert not found, "meshformer.printing.say makes what it prints visible"


# --- checkpoints


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "checkpoints" / "step-00000002"
    write_folder(folder, {"model.x": torch.arange(6.0)}, {"step": 2})
    return folder


def sign(checkpoint: Path, changed: str) -> None:
    """The manifest that a stranger writes for what was changed."""
    manifest, file = read_manifest(checkpoint), checkpoint / changed
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint, manifest.files | {changed: (file.stat().st_size, zlib.crc32(file.read_bytes()))}, manifest.metrics)


@pytest.mark.parametrize(
    "path", ["../elsewhere.distcp", "/OUTSIDE/elsewhere.distcp", "a/../../elsewhere.distcp", "..", "", "link.distcp", "/dev/zero"]
)
def test_the_metadata_of_a_checkpoint_points_nowhere_else(path: str, checkpoint: Path, plants: Plants) -> None:
    shutil.copy(next(checkpoint.glob("*.distcp")), plants.outside.parent / "elsewhere.distcp")
    (checkpoint / "link.distcp").symlink_to(plants.outside / "secret.txt")
    metadata = read_metadata(checkpoint)
    for storage in metadata.storage_data.values():
        storage.relative_path = path.replace("/OUTSIDE", str(plants.outside))
    (checkpoint / METADATA).write_bytes(pickle.dumps(metadata))
    sign(checkpoint, METADATA)
    with Watch(plants.outside) as opened, pytest.raises(ConfigError, match="no file of the checkpoint"):
        read_tensors(latest_checkpoint(checkpoint.parent.parent))
    assert not opened


@pytest.mark.parametrize("kind", KINDS)
def test_no_field_of_a_manifest_reaches_outside(kind: str, checkpoint: Path, plants: Plants, capsys: pytest.CaptureFixture[str]) -> None:
    whole = json.loads((checkpoint / MANIFEST).read_text())
    run = checkpoint.parent.parent
    for place in places(whole):
        for made in planted(whole, place, plants.value(kind)):
            made["crc32"] = f"{zlib.crc32(json.dumps({k: v for k, v in made.items() if k != 'crc32'}, sort_keys=True).encode()):08x}"
            (checkpoint / MANIFEST).write_text(json.dumps(made))
            with Watch(plants.outside) as opened:
                try:
                    read_tensors(latest_checkpoint(run))
                except ConfigError as error:
                    refuse_raw(visible(error))
            assert not opened, place
            plants.check()
            refuse_raw(capsys.readouterr().err)


# --- sweeps


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "sweep"
    folder.mkdir()
    points = [Point(0, ["seed=1"], "done", "0", None, 1.0, {"val/loss": 2.0}), Point(1, ["seed=2"], "failed", "1", "no luck", 1.0)]
    SweepRecord(folder, ["seed=1,2"], {"config_dir": None, "config_name": None}, points).write("failed")
    yield folder


@pytest.mark.parametrize("kind", [*KINDS, "hydra", "formula", "up"])
def test_no_field_of_a_sweep_runs_or_reaches_outside(
    kind: str, sweep: Path, plants: Plants, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the record passes, nothing is left to be done in it: a queued point would be a run."""
    monkeypatch.setattr("meshformer.command.sweep.run.LocalLauncher", None)
    whole = json.loads((sweep / "sweep.json").read_text())
    hydra = f"+hydra.callbacks.x={{_target_: os.mkdir, path: {plants.canary}}}"
    value = {"hydra": hydra, "formula": FORMULA, "up": "../outside"}.get(kind) or plants.value(kind)
    codes = set[int]()
    for place in places(whole):
        for made in list(planted(whole, place, value))[:3]:
            (sweep / "sweep.json").write_text(json.dumps(made))
            with Watch(plants.outside) as opened:
                code = main(["train", "-m", f"sweep.resume={sweep}"])
            plants.check()
            out, err = capsys.readouterr()
            refuse_raw(out + err)
            assert "Traceback" not in err and not opened, (place, err)
            assert code in (0, 1, 2), place
            assert code != 2 or len(err.strip().splitlines()) == 1, err
            codes.add(code)
            if kind == "hydra" and "overrides" in place:
                assert code == 2, place
            if (sweep / "results.csv").is_file():
                for cell in (cell for row in csv.reader((sweep / "results.csv").open()) for cell in row):
                    assert cell[:1] not in "=+-@\t" or cell == "", cell
    assert 2 in codes


@pytest.mark.parametrize("folder", ["../outside", "/OUTSIDE", ".", "0/../../outside", "link"])
def test_a_point_lies_in_its_sweep(folder: str, sweep: Path, plants: Plants, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder of a point that starts anew is removed before."""
    if folder == "link":  # refused before its record is read
        (sweep / "link").symlink_to(plants.outside)
    book = json.loads((sweep / "sweep.json").read_text())
    book["points"][1] |= {"state": "queued", "folder": folder.replace("/OUTSIDE", str(plants.outside))}
    (sweep / "sweep.json").write_text(json.dumps(book))
    assert main(["train", "-m", f"sweep.resume={sweep}"]) == 2
    assert ("is a link to" if folder == "link" else "names a folder outside of it") in capsys.readouterr().err
    plants.check()


def test_what_starts_runs_is_repeated_by_the_command(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = json.loads((sweep / "sweep.json").read_text())
    for overrides, fix in (["hydra/launcher=basic"], "hydra/launcher=basic"), (["data.source.cache=x"], "data.source.cache=x"):
        (sweep / "sweep.json").write_text(json.dumps({**book, "overrides": [*overrides, *book["overrides"]]}))
        assert main(["train", "-m", f"sweep.resume={sweep}"]) == 2
        assert f"add {fix} to the command" in capsys.readouterr().err
    (sweep / "sweep.json").write_text(json.dumps({**book, "flags": {"config_dir": "/somewhere", "config_name": None}}))
    assert main(["train", "-m", f"sweep.resume={sweep}"]) == 2
    assert "add --config-dir=/somewhere to the command" in capsys.readouterr().err
