"""What a run is called, and what it prints at its end: commands that run as printed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs import TINY
from meshformer.callbacks.progress import ProgressBar
from meshformer.cli import main
from meshformer.command.compose import compose

CHINESE = "我们的 中文 语料 在 这里。你好 世界，今天 天气 很好。\n" * 60


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "shakespeare_char"),
        (["model=micro"], "shakespeare_char"),
        (["experiment=vit_digits"], "vit_digits"),
        (["data=kjv"], "kjv"),
        (["data=kjv", "experiment=shakespeare_bpe"], "shakespeare_bpe"),
        (["data=text", "data.files=texts/war and peace.txt"], "war_and_peace"),
        (["data=text", "data.files=[texts/a.txt,texts/b.txt]"], "a"),
        (["data=text", "data.files=texts/*.txt"], "text"),
        (["data=csv", "data.file=reviews.csv", "task=sequence_classification", "data.label_column=label"], "reviews"),
    ],
)
def test_a_run_is_named_by_what_it_trains_on(overrides: list[str], name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for file in ("war and peace.txt", "a.txt", "b.txt"):
        (tmp_path / "texts" / file).write_text(CHINESE, encoding="utf-8")
    (tmp_path / "reviews.csv").write_text("text,label\ngood,1\nbad,0\n" * 20)
    assert compose(overrides)["experiment"] == name


@pytest.fixture
def run(tmp_path: Path, monkeypatch: Any, capfd: Any) -> str:
    """The end of what a run on Chinese characters prints, in the folder where it ran."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zh.txt").write_text(CHINESE, encoding="utf-8")
    assert main(["train", *TINY, "data.files=zh.txt", f"paths.data={tmp_path}/cache", "trainer.max_steps=2"]) == 0
    return capfd.readouterr().out


def test_the_commands_at_the_end_of_a_run_work_as_printed(run: str, capfd: Any) -> None:
    assert "nats a character" in run and "ROMEO" not in run
    commands = dict(re.findall(r"^  (\w+) +meshformer (.*)$", run, re.MULTILINE))
    assert commands.keys() == {"continue", "evaluate", "generate"} and "resume=last trainer.max_steps=4" in commands["continue"]
    for name in ("evaluate", "generate", "continue"):
        assert main([*shlex.split(commands[name]), *(["max_tokens=4"] if name == "generate" else [])]) == 0, name
        capfd.readouterr()


def test_the_path_is_printed_where_last_would_mean_another_run(tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zh.txt").write_text(CHINESE, encoding="utf-8")
    command = [*TINY, "data.files=zh.txt", f"paths.data={tmp_path}/cache", "trainer.max_steps=2", "paths.runs=elsewhere"]
    assert main(["train", *command]) == 0
    assert re.search(rf"evaluate  meshformer evaluate run={tmp_path}/elsewhere/zh/", capfd.readouterr().out)


def test_the_progress_line_says_of_which_step_the_validation_is() -> None:
    latest = {"train/loss": 1.25, "val/loss": 2.5, "train/tokens_per_second": 1234.0}
    rows = SimpleNamespace(latest=latest, validated_step=400)
    assert ProgressBar(rows)._numbers() == "loss 1.250  val 2.500 (step 400)  tok/s 1,234"
