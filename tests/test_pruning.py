"""A run of a search that does worse than others did at its step is ended by its own callback, on every rank; other runs are left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness import run_ranks
from jobs import text_file, tiny_config
from meshformer.job.train import train
from meshformer.record.metrics_csv import read_metrics

optuna = pytest.importorskip("optuna")


def study_of(folder: Path, losses: float) -> Path:
    """A study of five finished trials that had this loss at steps 2 and 4, and one, number 5, that runs."""
    file = folder / "study.db"
    study = optuna.create_study(storage=f"sqlite:///{file}", study_name="sweep")
    for _ in range(5):
        trial = study.ask()
        trial.report(losses, 2)
        trial.report(losses, 4)
        study.tell(trial, losses)
    study.ask()
    return file


def run(folder: Path, study: Path, *overrides: str, **changes: Any) -> None:
    callback = {"_target_": "meshformer.callbacks.Pruning", "study": str(study), "trial": 5, **changes}
    config = tiny_config(folder, "trainer.max_steps=6", "trainer.val_check_interval=2", *overrides)
    config["callbacks"]["pruning"] = callback
    (folder / "run").mkdir(exist_ok=True)
    train(config, folder / "run")


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in read_metrics(folder / "run" / "metrics.csv")]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    text_file(tmp_path)
    return tmp_path


def test_a_hopeless_run_ends_at_its_first_comparison_and_says_so_in_the_study(work: Path) -> None:
    file = study_of(work, losses=0.01)
    run(work, file)
    assert steps(work) == [1, 2]
    trial = optuna.load_study(study_name="sweep", storage=f"sqlite:///{file}").trials[5]
    assert trial.user_attrs == {"pruned_at_step": 2}
    assert trial.intermediate_values == {2: read_metrics(work / "run" / "metrics.csv")[-1]["val/loss"]}


@pytest.mark.parametrize("pruner", ["median", "hyperband"])
def test_a_good_run_goes_on(work: Path, pruner: str) -> None:
    run(work, study_of(work, losses=99.0), pruner=pruner, last_step=6)
    assert steps(work) == [1, 2, 3, 4, 5, 6]


def test_all_ranks_end_together(work: Path) -> None:
    file = study_of(work, losses=0.01)
    run_ranks(2, run, work, file, "strategy=ddp", "trainer.devices=2")
    assert steps(work) == [1, 2]


def test_without_its_study_a_run_goes_on_by_itself(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(work, work / "gone.db")
    assert steps(work) == [1, 2, 3, 4, 5, 6] and "is gone" in capsys.readouterr().err
