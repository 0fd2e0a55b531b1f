"""Runs as plain rows: what is read, what is kept, what is damaged, and the table on the terminal."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from meshformer.cli import main
from meshformer.config.errors import ConfigError
from meshformer.record import RunNotFound
from meshformer.runs import scan as scanning
from meshformer.runs.scan import cache_file, layout_name, scan
from meshformer.runs.table import distinguishing, ordered, parse_filter, row_of, settings, varying
from run_folders import write_run

SRC = Path(__file__).parents[2] / "src"


def rows(folder, **options):
    runs, problems = scan(folder, **options)
    assert problems == []
    return {run.name: row_of(run) for run in runs}


def test_a_row_says_what_the_folder_says(tmp_path):
    write_run(tmp_path / "sweep" / "0")
    row = rows(tmp_path)["sweep/0"]
    assert (row["state"], row["layout"], row["commit"][:6], row["parameters"]) == ("finished", "single", "c0ffee", 1000)
    assert row["duration_s"] == 120, "both segments count"
    assert (row["step"], row["tokens"], row["train/loss"], row["val/loss"]) == (3, 60, 1.0, 2.75)
    assert (row["best/val/loss"], row["best_step"]) == (2.5, 2)
    assert row["training_s"] == 20 / 10 + 20 / 20 + 20 / 20
    assert row["tokens_per_second"] == 20
    assert (row["model"], row["model/position"], row["optimizer"], row["optimizer.lr"]) == ("nano", "rotary", "muon", 0.1)


def test_what_was_typed_names_the_option(tmp_path):
    write_run(tmp_path / "0", overrides="model=micro\nmodel.n_layers=3\n+data=text\n")
    row = rows(tmp_path)["0"]
    assert (row["model"], row["data"]) == ("micro", "text")


def test_settings_that_differ_and_the_few_that_tell(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / f"a{seed}", seed=seed)
        write_run(tmp_path / f"b{seed}", seed=seed, overrides="model=micro\n", layers=6)
    own = [settings(run) for run in scan(tmp_path)[0]]
    assert sorted(varying(own)) == ["model", "model.n_layers", "seed"]
    assert distinguishing(own, ["model", "model.n_layers"]) == ["model"]
    assert distinguishing(own, ["model.n_layers", "seed"]) == ["model.n_layers", "seed"]


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ({"name": "single", "replicate": 1}, "single"),
        ({"name": "ddp", "replicate": 2}, "ddp 2"),
        ({"name": "fsdp_tensor", "shard": 2, "tensor": 2, "pipeline": 1}, "fsdp_tensor shard 2 × tensor 2"),
        ({"name": "mesh", "shard": 4}, "mesh shard 4"),
    ],
)
def test_layout_in_words(layout, name):
    assert layout_name(layout) == name


def test_only_what_changed_is_read_again(tmp_path, monkeypatch):
    for name in "abc":
        write_run(tmp_path / name)
    first = rows(tmp_path)
    read = []
    real = scanning._read
    monkeypatch.setattr(scanning, "_read", lambda folder, name: read.append(name) or real(folder, name))
    assert rows(tmp_path) == first and read == []
    with (tmp_path / "b" / "metrics.csv").open("a") as file:
        file.write("4,8,20,0.5,2.25\n")
    assert rows(tmp_path)["b"]["best/val/loss"] == 2.25 and read == ["b"]
    os.utime(tmp_path / "c" / "run.json", (1, 1))  # same size, another time
    rows(tmp_path)
    assert read == ["b", "c"]
    assert rows(tmp_path, cache=False).keys() == first.keys() and len(read) == 5


def test_the_cache_is_the_users_and_may_be_lost(tmp_path):
    write_run(tmp_path / "runs" / "a")
    before = sorted(tmp_path.rglob("*"))
    first = rows(tmp_path / "runs")
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written among the runs"
    store = cache_file((tmp_path / "runs").absolute())
    assert json.loads(store.read_text().splitlines()[0]) == {"version": scanning.VERSION}
    for damage in ("", "{", '{"version": 0}\n', store.read_text()[:-20], '{"version": 1}\n{"stamp": 1}\n', "\0\n"):
        store.write_text(damage)
        assert rows(tmp_path / "runs") == first
    store.unlink()
    store.mkdir()  # it cannot be written
    assert rows(tmp_path / "runs") == first


DAMAGE = {
    "config.yaml": ["", "a: [1", "- 1\n", "data: 3\n", "data: {context_length: much}\n", "\0\0", "a: !!python/object/apply:os.getcwd []\n"],
    "run.json": ["", '{"state": "runn', "[1]", '{"git": 3}', '{"started": "soon", "ended": "later"}', "\xff"],
    "metrics.csv": ["loss,step\n1,2\n", '"\0', "step,val/loss\n1,\xff\n"],
}


@pytest.mark.parametrize(("file", "text"), [(file, text) for file, texts in DAMAGE.items() for text in texts])
def test_a_damaged_file_costs_a_sentence_that_names_it(tmp_path, file, text):
    write_run(tmp_path / "whole")
    (write_run(tmp_path / "hurt") / file).write_bytes(text.encode("latin-1"))
    for _ in range(2):  # told again by a later call
        runs, problems = scan(tmp_path)
        if file == "metrics.csv" and not problems:
            continue  # a lone half line is what a killed process leaves, and is dropped
        assert len(problems) == 1 and f"hurt/{file}" in problems[0]
        assert {run.name for run in runs} == ({"whole", "hurt"} if file == "metrics.csv" else {"whole"})


def test_half_a_last_row_is_left_out(tmp_path):
    with (write_run(tmp_path / "a") / "metrics.csv").open("a") as file:
        file.write("4,8,20,0.5,0.0")
    assert rows(tmp_path)["a"]["step"] == 3


def test_no_folder_and_a_run_that_starts(tmp_path):
    with pytest.raises(RunNotFound, match="no folder"):
        scan(tmp_path / "absent")
    (write_run(tmp_path / "a") / "run.json").unlink()
    assert rows(tmp_path)["a"]["state"] == "starting"


@pytest.mark.parametrize(
    ("text", "passing"),
    [
        ("state=finished", "ab"),
        ("lr=0.1", "a"),
        ("optimizer.lr>0.1", "b"),
        ("val/loss<=2.75", "a"),
        ("val/loss!=2.75", "b"),
        ("run=?", "ab"),
        ("model/position=al*", "b"),
        ("started>2026-11-25", ""),
        ("error=null", "ab"),
        ("dirty=false", "ab"),
    ],
)
def test_filters(tmp_path, text, passing):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", lr=0.3, rows=["1,2,10,3.0,"], position="meshformer.model.position.Alibi")
    table = rows(tmp_path)
    passes = parse_filter(text, [key for row in table.values() for key in row])
    assert "".join(name for name in sorted(table) if passes(table[name])) == passing


def test_a_filter_that_means_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"Did you mean val/loss\?"):
        parse_filter("val/los<2", ["val/loss", "state"])
    with pytest.raises(ConfigError, match="may mean val/loss, train/loss"):
        parse_filter("loss<2", ["val/loss", "train/loss"])
    with pytest.raises(ConfigError, match="neither a folder nor a filter"):
        parse_filter("finished", ["state"])


def test_order_puts_what_is_missing_last():
    table = [{"x": None}, {"x": 2.0}, {"x": float("nan")}, {"x": 10}]
    assert [row["x"] for row in ordered(table, "x")][:2] == [2.0, 10]
    assert [row["x"] for row in ordered(table, "x", descending=True)][:2] == [10, 2.0]


def test_the_command(tmp_path, capsys):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", lr=0.3, rows=["1,2,10,3.0,1.5"], state="failed")
    (write_run(tmp_path / "c") / "run.json").write_text("{")
    assert main(["runs", str(tmp_path), "--sort", "val/loss"]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "b", "a"] and "optimizer.lr" in lines[0]
    assert "c/run.json" in shown.err
    assert main(["runs", str(tmp_path), "state=finished", "--csv"]) == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (row["run"], row["val/loss"], row["best/val/loss"]) == ("a", "2.75", "2.5")
    assert main(["runs", str(tmp_path), "--columns", "run,lr", "--sort=-lr", "--limit", "1"]) == 0
    assert capsys.readouterr().out.split() == ["run", "optimizer.lr", "b", "0.3"]
    assert main(["runs", "show", str(tmp_path / "a")]) == 0
    shown = capsys.readouterr().out
    assert "state               finished" in shown and "n_layers: 3" in shown
    assert main(["runs", "diff", "a", "b", f"paths.runs={tmp_path}"]) == 0, "as the other commands say it"
    capsys.readouterr()
    assert main(["runs", f"paths.runs={tmp_path}", "--csv"]) == 0 and len(capsys.readouterr().out.splitlines()) > 2
    assert main(["runs", "diff", "a", "b", "--runs", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "optimizer.lr  0.1  0.3" in shown and "-1.25" in shown


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("runs absent", "'absent' is neither a folder nor a filter"),
        ("runs", "there is no folder runs"),
        ("runs . ", "holds no run yet"),
        ("runs --sot x", "--sot"),
        ("runs show nothing", "No run 'nothing'"),
        ("report nothing", "No run 'nothing'"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, capsys, line, words):
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    shown = capsys.readouterr()
    assert words in shown.err and len(shown.err.splitlines()) == 1 and shown.out == ""


def test_neither_torch_nor_pandas_is_needed(tmp_path):
    write_run(tmp_path / "a")
    # fmt: off
    code = ("import sys; sys.modules.update(dict.fromkeys(['torch', 'pandas', 'matplotlib', 'lightning']))\n"
            "from meshformer.cli import main\nassert main(sys.argv[1:]) == 0\n"
            "try:\n    from meshformer.runs import load_runs\nexcept ImportError as error:\n    print(error)")
    # fmt: on
    done = subprocess.run(
        [sys.executable, "-c", code, "runs", str(tmp_path)], env={**os.environ, "PYTHONPATH": str(SRC)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "load_runs needs pandas: pip install 'meshformer[notebooks]'" in done.stdout


def test_hundreds_of_runs_come_from_the_cache_much_faster(tmp_path):
    for index in range(150):
        write_run(tmp_path / str(index))

    def seconds():
        start = time.process_time()
        assert len(scan(tmp_path)[0]) == 150
        return time.process_time() - start

    cold = seconds()
    assert min(seconds() for _ in range(3)) < cold / 3
