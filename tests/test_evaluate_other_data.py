"""`meshformer evaluate data=…`: another option than the run's brings its own settings, and those of the run's option go."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jobs import TINY, text_file
from meshformer.cli import main
from meshformer.command.jobs import _evaluated_config
from meshformer.command.recorded import without_option
from meshformer.config.paths import conf_dir

HUB = {"_target_": "meshformer.data.HubText", "split": "train", "column": "text"}
SRC = Path(__file__).parent.parent / "src/meshformer"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other_data")
    text_file(folder)
    rows = [f"{word} is {kind},{kind}" for word in ("the cat", "a dog", "it", "the sea") for kind in ("good", "bad")]
    (folder / "texts.csv").write_text("\n".join(["text,label", *rows * 4]) + "\n")
    words = [*TINY, "data=text", f"data.files=[{folder}/text.txt]", "data.tokenizer=bpe", "data.vocab_size=280", f"paths.data={folder}/cache"]
    assert main(["train", *words, f"hydra.run.dir={folder}/run", f"paths.runs={folder}", "trainer.max_steps=2"]) == 0
    return folder / "run"


@pytest.mark.parametrize(
    ("words", "source"),
    [
        (["data=kjv"], {"_target_": "meshformer.data.KingJames"}),
        (["data=shakespeare"], {"_target_": "meshformer.data.Shakespeare"}),
        (["data=hub", "data.source.path=a/b", "data.source.name=c"], {**HUB, "path": "a/b", "name": "c"}),
    ],
)
def test_another_data_option_takes_its_own_source(run: Path, words: list[str], source: dict[str, str]) -> None:
    data = _evaluated_config(run, words, None)["data"]
    data["source"].pop("cache", None)
    assert data["source"] == source
    assert not data.get("files")
    assert (data["batch_size"], data["tokenizer"]) == (8, "bpe"), "settings that every option has stay the run's"


def test_a_run_on_text_files_is_evaluated_on_a_csv_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", f"run={run}", f"paths.runs={run.parent}", "data=csv", f"data.file={run.parent}/texts.csv"]) == 0
    assert "val/loss" in capsys.readouterr().out


def test_the_same_option_keeps_its_settings(run: Path) -> None:
    assert _evaluated_config(run, ["data=text"], None)["data"]["files"] == [f"{run.parent}/text.txt"]


@pytest.mark.parametrize("word", ["task=masked_language_modelling", "model.n_layers=3", "optimizer=adamw", "resume=last"])
def test_evaluate_names_what_it_cannot_change(run: Path, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", f"run={run}", f"paths.runs={run.parent}", word]) == 2
    assert f"error: {word}: evaluate takes it from the run. Leave it out." in capsys.readouterr().err


def test_a_fork_with_another_optimizer_drops_the_old_ones_settings() -> None:
    words = ["paths.runs=x", "optimizer.adamw_lr=0.003", "+optimizer.extra=1", "model.n_layers=1", "optimizer=muon"]
    assert without_option(words, "optimizer", [conf_dir() / "optimizer/muon.yaml"]) == ["paths.runs=x", "model.n_layers=1", "optimizer=muon"]


def test_a_subgroups_settings_stay_with_another_option_above() -> None:
    words = ["model/position=rotary", "model.position.base=500", "model.n_layers=1"]
    assert without_option(words, "model", [conf_dir() / "model/nano.yaml"]) == words[:2]


def test_every_fix_is_a_sentence() -> None:
    wrong = [
        f"{file.name}: {text}"
        for file in SRC.rglob("*.py")
        for text in re.findall(r"fix=f?[\"']([a-z][^\"'=]*)", file.read_text(encoding="utf-8"))
    ]
    assert not wrong
