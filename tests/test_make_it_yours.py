"""The pages of docs/make_it_yours, executed: their files are written, their commands train a few steps, in every layout that they name to one
process's loss. (The page about models is the matter of test_own_model.py.)"""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from harness import run_ranks
from jobs import TINY, labelled_file, text_file
from meshformer.command.compose import compose
from meshformer.job.train import train
from meshformer.record.metrics_csv import read_metrics

PAGES = Path(__file__).parents[1] / "docs" / "make_it_yours"
SHORT = [
    *(setting for setting in TINY if not setting.startswith("data")), "optimizer=sgd", "optimizer.lr=0.3", "schedule=constant",
    "trainer.max_steps=3", "data.batch_size=8", "model.zero_init=false", "paths.data=cache", "~callbacks.checkpoint",
]  # fmt: skip
ON_TEXT = ["data=text", "data.files=[text.txt]", "data.context_length=16"]
LIMIT = 90  # lines of a page


def files_of(page: str) -> Iterator[tuple[str, str]]:
    """The name and the text of every file that a page shows: a block behind a line that names it."""
    text = (PAGES / page).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LIMIT
    yield from re.findall(r"^`([\w/]+\.(?:py|yaml))`[^`]*?:?\n\n```(?:python|yaml)\n(.*?)```", text, re.MULTILINE | re.DOTALL)


def commands_of(page: str) -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", (PAGES / page).read_text(encoding="utf-8"), re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line.startswith("meshformer train")]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder in which the reader of a page works."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    text_file(tmp_path)
    (tmp_path / "texts").mkdir()
    text_file(tmp_path / "texts", words=3000)
    table = labelled_file(tmp_path).read_text().splitlines()
    (tmp_path / "mails.csv").write_text("\n".join([table[0].replace("label", "folder"), *table[1:]]) + "\n")
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


def write_files(page: str, work: Path) -> None:
    for name, text in files_of(page):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(text, encoding="utf-8")


def rows_of(command: list[str], work: Path, name: str, *more: str) -> list[dict[str, Any]]:
    """What the command logs, with a smaller model and fewer steps, on as many forked ranks as it asks for."""
    words = command[2:]
    folder = words.pop(words.index("--config-dir") + 1) if "--config-dir" in words else None
    words = [word for word in words if word != "--config-dir"]
    config = compose([*words, *SHORT, *more], config_dir=folder)
    return run_ranks(config["trainer"]["devices"], _train, config, work / name)[0]


def _train(config: dict[str, Any], run: Path) -> list[dict[str, Any]]:
    run.mkdir(exist_ok=True)
    train(deepcopy(config), run)
    return read_metrics(run / "metrics.csv") if (run / "metrics.csv").is_file() else []


def layouts_agree(command: list[str], in_parallel: list[str], work: Path, *more: str) -> list[dict[str, Any]]:
    """The first command of a page learns, and the second, which adds a strategy, does the same."""
    assert [word for word in in_parallel if not word.startswith(("strategy=", "trainer.devices="))] == command
    first = rows_of(command, work, "first", *more)
    assert first[-1]["train/loss"] < first[0]["train/loss"]
    for a, b in zip(first, rows_of(in_parallel, work, "parallel", *more), strict=True):
        assert abs(a["train/loss"] - b["train/loss"]) < 5e-6
        assert abs(a["train/grad_norm"] / b["train/grad_norm"] - 1) < 5e-6
    return first


def test_attention(work: Path) -> None:
    write_files("attention.md", work)
    first, second = commands_of("attention.md")
    capped = layouts_agree(first, second, work, *ON_TEXT, "model.qk_norm=false")
    wide = rows_of(first, work, "wide", *ON_TEXT, "model.qk_norm=false", "model.attention.cap=1e6")
    plain = rows_of(["meshformer", "train"], work, "plain", *ON_TEXT, "model.qk_norm=false", "model/attention=reference")
    assert [row["train/loss"] for row in capped] != [row["train/loss"] for row in plain]
    assert wide[-1]["train/loss"] == pytest.approx(plain[-1]["train/loss"], abs=1e-4)


def test_position(work: Path) -> None:
    write_files("position.md", work)
    first, second, sweep = commands_of("position.md")
    layouts_agree(first, second, work, *ON_TEXT)
    assert "model/position=rotary,alibi,log_distance" in sweep


def test_data(work: Path) -> None:
    write_files("data.md", work)
    files, subwords, table, sums, parallel = commands_of("data.md")
    assert rows_of(files, work, "files", "data.context_length=16")
    assert rows_of(subwords, work, "subwords", "data.context_length=16", "data.vocab_size=300")
    assert rows_of(table, work, "table", "data.context_length=16")
    layouts_agree(sums, parallel, work)
    source = importlib.import_module("my_data").Sums(lines=50)
    assert source.text() == source.text() and all(eval(line.replace("=", "==")) for line in source.text().splitlines())


def test_task(work: Path) -> None:
    write_files("task.md", work)
    first, second, own_schedule, step = commands_of("task.md")
    with_z = layouts_agree(first, second, work, *ON_TEXT, "task.z=0.1")
    plain = rows_of(["meshformer", "train"], work, "plain", *ON_TEXT)
    assert with_z[0]["train/loss"] > plain[0]["train/loss"] + 0.1
    assert rows_of(own_schedule, work, "restarts", *ON_TEXT, "schedule=restarts", "+schedule.eta_min=0.01")[-1]["train/lr"] < 0.3
    assert rows_of(step, work, "step", *ON_TEXT, "schedule=step", "schedule.step_size=2")[-1]["train/lr"] == pytest.approx(0.15)


def test_lightning(work: Path) -> None:
    write_files("lightning.md", work)
    alone, parallel, sweep = commands_of("lightning.md")
    assert [word for word in parallel if not word.startswith(("strategy=", "trainer.devices="))] == alone and "-m" in sweep
    quiet = [word for word in SHORT if word.startswith(("trainer.", "~", "paths.", "logger"))]

    def rows(command: list[str], name: str) -> list[dict[str, Any]]:
        config = compose([*(word for word in command[4:]), *quiet], config_dir=command[3])
        return run_ranks(config["trainer"]["devices"], _train, config, work / name)[0]

    one, two = rows(alone, "one"), rows(parallel, "two")
    assert len(one) == 3 and one[-1]["val/loss"] > 0
    for a, b in zip(one, two, strict=True):
        assert abs(a["train/loss"] - b["train/loss"]) < 5e-6
