"""Every recipe under conf/experiment trains: two steps on its own corpus, through the same code as the command."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from meshformer.command.compose import compose
from meshformer.config.paths import conf_dir
from meshformer.job.train import train
from meshformer.record.metrics_csv import read_metrics
from spoken import prompts_folder, tiny_whisper

EXPERIMENTS = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))
FROM_A_RUN = ("kjv_finetune", "mlm_then_classify", "mlm_pretrain_then_classify")  # weights from outside come with the recipe
SHORT = [
    "trainer.max_steps=2",
    "trainer.limit_val_batches=2",
    "trainer.log_every_n_steps=1",
    "trainer.progress=false",
    "trainer.threads=1",
]
CACHE = Path(os.environ.get("MESHFORMER_DATA", "~/.cache/meshformer")).expanduser()


def train_two_steps(folder: Path, experiment: str, *overrides: str) -> list[dict]:
    folder.mkdir()
    train(compose([f"experiment={experiment}", f"paths.data={CACHE}", *SHORT, *overrides]), folder)
    return read_metrics(folder / "metrics.csv")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiments") / "pretrained"
    train_two_steps(folder, "shakespeare_char")
    return folder


def test_there_are_experiments() -> None:
    assert {"shakespeare_char", "shakespeare_bpe", "kjv_finetune", "shakespeare_speedrun"} <= set(EXPERIMENTS)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_trains_two_steps(experiment: str, pretrained: Path, tmp_path: Path) -> None:
    start = [f"stage.init_from={pretrained}", "stage.pretrain=null"] if experiment in FROM_A_RUN else []
    if experiment.startswith("speech"):  # apt-get may be missing here, and the weights are 140 MB
        start = [f"data.folder={prompts_folder(tmp_path / 'prompts')}", f"paths.data={tmp_path}"]
    if experiment == "speech_from_whisper":
        start.append(f"stage.init_from={tiny_whisper(tmp_path / 'whisper')}")
    rows = train_two_steps(tmp_path / "run", experiment, *start)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["train/loss"]) for row in rows)
    assert math.isfinite(rows[-1]["val/loss"])
    assert (tmp_path / "run" / "checkpoints" / "step-00000002" / ".metadata").is_file()
