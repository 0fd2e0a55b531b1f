"""Lightning's own callbacks and loggers: right, or one sentence before a folder is made."""

from __future__ import annotations

import importlib.util

import lightning.pytorch as pl
import lightning.pytorch.callbacks as stock
import pytest

import jobs
from meshformer.command.stock import NEED_LOGGER, REFUSED
from meshformer.config.errors import ConfigError
from meshformer.job.build import build_callbacks, build_data, build_task, build_trainer
from meshformer.job.train import total_steps

# Those that train as if they were not there, with what they must be given.
WORK = {
    "BasePredictionWriter": [], "Callback": [], "LambdaCallback": [], "ModelSummary": [], "RichModelSummary": [], "SpikeDetection": [], "Timer": [],
    "EarlyStopping": ["+callbacks.stock.monitor=val/loss"],
    "LearningRateMonitor": ["logger=tensorboard"],
    "DeviceStatsMonitor": ["logger=tensorboard"],
}  # fmt: skip
STEPS = "trainer.max_steps=3"


def target(name: str) -> str:
    return f"+callbacks.stock._target_=lightning.pytorch.callbacks.{name}"


def test_every_callback_of_lightning_is_decided_on():
    assert set(stock.__all__) == WORK.keys() | REFUSED.keys() and set(NEED_LOGGER) <= WORK.keys()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return jobs.run_tiny(tmp_path_factory.mktemp("alone"), "run", STEPS)


@pytest.mark.parametrize("name", WORK)
def test_a_callback_that_works_changes_nothing(name, alone, tmp_path):
    rows = jobs.run_tiny(tmp_path, "run", STEPS, target(name), *WORK[name])
    for key in ("train/loss", "train/grad_norm", "val/loss"):
        assert [row.get(key) for row in rows] == [row.get(key) for row in alone], key


@pytest.mark.parametrize("name", REFUSED)
def test_a_callback_that_cannot_work_is_refused_with_what_to_use(name, tmp_path):
    with pytest.raises(ConfigError, match=rf"callbacks\.stock\._target_=lightning\.pytorch\.callbacks\.{name}: .+\. \S.+"):
        jobs.tiny_config(tmp_path, target(name))


@pytest.mark.parametrize("name", NEED_LOGGER)
def test_what_writes_to_a_logger_asks_for_one(name, tmp_path):
    with pytest.raises(ConfigError, match="logger=tensorboard"):
        jobs.tiny_config(tmp_path, target(name))


def test_a_logger_without_its_package_is_refused(tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == "wandb" else real(name, *more))
    with pytest.raises(ConfigError, match=r"logger\.w\._target_=.*wandb, which is not installed\. Install it: pip install 'meshformer\[wandb\]'"):
        jobs.tiny_config(tmp_path, "+logger.w._target_=lightning.pytorch.loggers.WandbLogger")


def fit(folder, callback, *overrides):
    config = jobs.tiny_config(folder, STEPS, *overrides)
    data = build_data(config)
    data.prepare_data()
    config["model"]["vocab_size"] = data.vocab_size
    callbacks = [*build_callbacks(config, folder, data.steps_per_epoch), callback]
    trainer = build_trainer(config, folder, total_steps(config, data.steps_per_epoch), callbacks, [])
    task = build_task(config, 3)
    return trainer, task, data


def test_accumulation_changed_during_training_changes_nothing(tmp_path):
    class Changes(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            trainer.accumulate_grad_batches = 2

    losses = []
    for name, callback in (("changed", Changes()), ("plain", pl.Callback())):
        (tmp_path / name).mkdir()
        trainer, task, data = fit(tmp_path / name, callback)
        trainer.fit(task, datamodule=data)
        losses.append([row["train/loss"] for row in jobs.read_metrics(tmp_path / name / "metrics.csv")])
    assert losses[0] == losses[1]


def test_a_training_metric_can_be_monitored(tmp_path):
    stop = stock.EarlyStopping("train/loss", min_delta=1e9, patience=1, check_on_train_epoch_end=False)
    trainer, task, data = fit(tmp_path, stop, "trainer.max_steps=12", "trainer.val_check_interval=2")
    trainer.fit(task, datamodule=data)
    assert trainer.global_step == 4  # no improvement of 1e9 at the second validation


def test_a_checkpoint_can_be_saved_after_validation_alone(tmp_path):
    trainer, task, data = fit(tmp_path, pl.Callback())
    trainer.validate(task, datamodule=data, verbose=False)
    trainer.save_checkpoint(tmp_path / "saved", weights_only=False)
    assert (tmp_path / "saved").exists()


def test_validation_sees_the_same_samples_whatever_the_accumulation(tmp_path):
    rows = [
        jobs.run_tiny(tmp_path, f"run{accumulation}", STEPS, "trainer.limit_val_batches=1", f"trainer.accumulate_grad_batches={accumulation}")
        for accumulation in (1, 4)
    ]
    first, second = (next(row["val/loss"] for row in reversed(one) if row.get("val/loss") is not None) for one in rows)
    assert abs(first - second) < 5e-6
    whole = jobs.run_tiny(tmp_path, "whole", STEPS)
    assert abs(whole[-1]["val/loss"] - first) > 1e-4  # one batch is not all of them
