"""debug=: Lightning's own arguments that work with this program's steps, checkpoints and order of samples; the others are refused in a sentence."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

import jobs
from harness import run_ranks
from meshformer.cli import main
from meshformer.command.compose import compose
from meshformer.config import schema
from meshformer.config.trainer_keys import INSTEAD
from meshformer.tasks import LanguageModelling


def test_every_argument_of_the_trainer_is_decided_on() -> None:
    arguments = set(inspect.signature(pl.Trainer.__init__).parameters) - {"self"}
    settings = {spec.name for spec in fields(schema.Trainer)}
    assert arguments - settings <= INSTEAD.keys() <= arguments - settings


@pytest.mark.parametrize("form", ["trainer.limit_train_batches=3", "+trainer.limit_train_batches=3", "++trainer.fast_dev_run=true"])
def test_an_argument_that_is_no_setting_is_answered(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", form]) == 2
    told = capsys.readouterr().err
    assert "is an argument of Lightning's that is no setting here" in told and told.count("\n") == 1
    assert ("trainer.max_steps" if "limit" in form else "debug=fast") in told


@pytest.mark.parametrize("option", ["fast", "limit", "overfit", "profiler", "default"])
def test_a_debug_run_goes_to_a_folder_of_its_own_and_saves_nothing(option: str) -> None:
    config = compose([f"debug={option}"])
    assert config["experiment"] == "debug" and config["callbacks"]["checkpoint"]["every_n_steps"] is None
    assert compose([f"debug={option}", "callbacks.checkpoint.every_n_steps=5"])["callbacks"]["checkpoint"]["every_n_steps"] == 5
    assert config["trainer"]["detect_anomaly"] and config["trainer"]["compile"] is False


def test_overfitting_repeats_the_first_batches_and_resumes_exactly(tmp_path: Path) -> None:
    settings = ["trainer.overfit_batches=2", "optimizer.lr=0.02", "callbacks.checkpoint.every_n_steps=5"]
    whole = jobs.run_tiny(tmp_path, "whole", "trainer.max_steps=40", *settings)
    plain = jobs.run_tiny(tmp_path, "plain", "trainer.max_steps=2", *settings[1:])
    assert [row["train/loss"] for row in whole[:2]] == pytest.approx([row["train/loss"] for row in plain[:2]])
    assert whole[-1]["train/loss"] < whole[0]["train/loss"] / 2
    jobs.run_tiny(tmp_path, "half", "trainer.max_steps=5", "schedule=constant", *settings)
    resumed = jobs.run_tiny(tmp_path, "half", "trainer.max_steps=9", "schedule=constant", *settings, resume=True)
    straight = jobs.run_tiny(tmp_path, "straight", "trainer.max_steps=9", "schedule=constant", *settings)
    assert [row["train/loss"] for row in resumed] == [row["train/loss"] for row in straight]


def test_the_profiler_writes_and_no_checkpoint_is_kept(tmp_path: Path) -> None:
    jobs.run_tiny(tmp_path, "run", "trainer.max_steps=2", "trainer.profiler=simple", "callbacks.checkpoint.every_n_steps=null")
    assert "run_training_batch" in (tmp_path / "run" / "fit-hooks.txt").read_text()
    assert not (tmp_path / "run" / "checkpoints").exists()


def searched(folder: Path, layout: str) -> list[bool]:
    """Whether autograd searches for NaNs, for each loss of the training steps."""
    seen, scored = [], LanguageModelling.scored

    def watching(self: Any, *arguments: Any) -> Any:
        if torch.is_grad_enabled():
            seen.append(torch.is_anomaly_check_nan_enabled())
        return scored(self, *arguments)

    LanguageModelling.scored = watching
    steps = ["trainer.max_steps=3", "~callbacks.checkpoint", *["strategy.microbatches=2"] * (layout == "pipeline")]
    jobs.run_tiny(folder, layout, f"strategy={layout}", "trainer.devices=2", "trainer.detect_anomaly=true", *steps)
    return seen


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "tensor", "context", "pipeline"])
def test_every_layout_trains_while_anomalies_are_searched(tmp_path: Path, layout: str) -> None:
    """torch finds a pipeline's shapes by passes over uninitialised memory, in which there may be NaNs: no step but that one is left out."""
    last = run_ranks(2, searched, tmp_path, layout)[1]
    assert last[-2:] == [True, True]
