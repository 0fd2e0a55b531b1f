"""A user's LightningDataModule and LightningModule: the same steps in each layout that splits samples, a sentence elsewhere; torch's schedules."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import run_ranks
from jobs import run_tiny
from meshformer.cli import main
from meshformer.command.compose import compose
from meshformer.config.errors import ConfigError
from meshformer.data.own import cut, rows_of
from meshformer.job.train import train
from meshformer.record.metrics_csv import read_metrics

MODULE = "lightning_parts_for_test"
SOURCE = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

class Pairs(LightningDataModule):
    def __init__(self, rows: int = 90, batch_size: int = 8):
        super().__init__()
        self.rows, self.batch_size = rows, batch_size
    def setup(self, stage):
        x = torch.randn(self.rows, 8, generator=torch.Generator().manual_seed(0))
        self.train, self.val = TensorDataset(x, x.sum(1, keepdim=True)), TensorDataset(x[:27], x[:27].sum(1, keepdim=True))
    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)
    def val_dataloader(self):
        return DataLoader(self.val, batch_size=9)

class Fixed(Pairs):
    def __init__(self):
        super().__init__(batch_size=4)

class Sampled(Pairs):
    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.batch_size, sampler=DistributedSampler(self.train, 2, 0))

class Tokens(Pairs):
    def setup(self, stage):
        ids = torch.randint(12, (self.rows, 16), generator=torch.Generator().manual_seed(0))
        self.train = [{"tokens": row, "targets": row.roll(-1)} for row in ids]
        self.val = self.train[:27]

class Nothing:
    def __init__(self, rows: int = 90):
        pass

class Regression(LightningModule):
    def __init__(self, lr: float = 0.1):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
        self.epochs = 0
    def forward(self, x):
        return self.net(x)
    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self(x), y)
        self.log("train_mse", loss)
        return loss
    def validation_step(self, batch):
        x, y = batch
        self.log("val_loss", nn.functional.mse_loss(self(x), y))
    def on_train_epoch_start(self):
        self.epochs += 1
    def on_validation_epoch_end(self):
        self.log("val/epochs", float(self.epochs))
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

class Manual(Regression):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

class Clipping(Regression):
    def on_after_backward(self):
        pass

class Two(Regression):
    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), 0.1), torch.optim.SGD(self.parameters(), 0.1)]

class Lossless(Regression):
    def training_step(self, batch, batch_idx):
        pass

class Stepless(LightningModule):
    pass
"""
QUIET = [
    f"allow=[{MODULE}]", "trainer.progress=false", "trainer.precision=32-true", "trainer.threads=1", "trainer.log_every_n_steps=1",
    "trainer.val_check_interval=1000", "logger=csv", "~callbacks.samples", "~callbacks.throughput",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the module and `mine/`, whose options are named as the classes in small letters."""
    folder = tmp_path_factory.mktemp("own")
    (folder / f"{MODULE}.py").write_text(SOURCE, encoding="utf-8")
    options = {"data": ("Pairs", "Fixed", "Sampled", "Tokens", "Nothing"),
               "task": ("Regression", "Manual", "Clipping", "Two", "Lossless", "Stepless")}  # fmt: skip
    for group, names in options.items():
        (folder / "mine" / group).mkdir(parents=True)
        for name in names:
            settings = "rows: 90\n" if name in ("Pairs", "Sampled", "Tokens", "Nothing") else ""
            (folder / "mine" / group / f"{name.lower()}.yaml").write_text(f"# Pick it here.\n_target_: {MODULE}.{name}\n{settings}")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop(MODULE, None)


def composed(place: Path, *overrides: str) -> dict[str, Any]:
    return compose([*QUIET, f"paths.data={place}/cache", f"paths.runs={place}/runs", *overrides], config_dir=str(place / "mine"))


def run(place: Path, name: str, *overrides: str, resume: bool = False) -> list[dict[str, Any]]:
    config, folder = composed(place, *overrides), place / name
    folder.mkdir(exist_ok=True)
    config["resume"] = str(folder) if resume else None
    train(config, folder)
    return read_metrics(folder / "metrics.csv")


OWN = ["data=pairs", "task=regression", "data.batch_size=8", "trainer.max_steps=14"]


@pytest.fixture(scope="module")
def alone(place: Path) -> list[dict[str, Any]]:
    return run(place, "alone", *OWN)


def assert_same(rows: list[dict[str, Any]], others: list[dict[str, Any]], key: str = "train/loss") -> None:
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for one, other in zip(rows, others, strict=True):
        assert abs(one[key] - other[key]) < 5e-6, (one["step"], one[key], other[key])


def test_a_lightning_module_learns_from_a_data_module_with_its_own_optimizer(alone: list[dict[str, Any]]) -> None:
    assert [row["step"] for row in alone] == list(range(1, 15)) and alone[-1]["epoch"] == 1  # 11 full batches of 90 rows an epoch
    assert alone[-1]["train/loss"] < 0.7 * alone[0]["train/loss"]
    assert [row["train/lr"] for row in alone] == [0.1] * 5 + [0.05] * 5 + [0.025] * 4
    assert abs(alone[0]["train_mse"] - alone[0]["train/loss"]) < 1e-6
    assert alone[-1]["val/loss"] > 0 and alone[-1]["val/epochs"] == 2


@pytest.mark.parametrize("layout", [["strategy=ddp", "trainer.accumulate_grad_batches=2"], ["strategy=fsdp"]], ids=["ddp", "fsdp"])
def test_each_layout_that_splits_samples_makes_the_same_steps(place: Path, alone: list[dict[str, Any]], layout: list[str]) -> None:
    rows = run_ranks(2, run, place, layout[0], *OWN, *layout, "trainer.devices=2")[0]
    assert_same(alone, rows)
    assert_same(alone, rows, "train/grad_norm")
    assert abs(rows[-1]["val/loss"] - alone[-1]["val/loss"]) < 0.05  # batches of 9 rows: on two ranks the last row counts twice


def test_a_resumed_epoch_goes_on_with_the_next_batch(place: Path, alone: list[dict[str, Any]]) -> None:
    run(place, "stopped", *OWN[:-1], "trainer.max_steps=7")
    assert_same(alone, run(place, "stopped", *OWN, resume=True))


def test_tasks_of_the_program_read_a_data_module_of_dicts(place: Path) -> None:
    small = ["data=tokens", "data.batch_size=8", "data.context_length=16", "model.vocab_size=12", "model.n_layers=1", "model.d_model=16",
             "trainer.max_steps=4"]  # fmt: skip
    one, two = run(place, "one", *small), run_ranks(2, run, place, "two", *small, "strategy=ddp", "trainer.devices=2")[0]
    assert_same(one, two)
    assert abs(one[-1]["val/loss"] - two[-1]["val/loss"]) < 5e-6  # 27 rows in batches of 9: repeated rows do not count


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*OWN, "strategy=tensor"], "strategy.tensor=2: a LightningModule computes its steps whole .* Use strategy=single, ddp, fsdp or hsdp"),
        (["data=tokens", "model.vocab_size=12", "strategy=context"], "strategy.context=2: a LightningDataModule gives each process its own rows"),
        (["data=tokens"], "model.vocab_size: needs a value: the tokens come from .*Tokens"),
        ([*OWN, "optimizer=adamw"], "optimizer=adamw: .*Regression brings its own optimizers"),
        ([*OWN, "model.n_layers=2"], "model.n_layers=2: .*Regression brings its own network"),
        ([*OWN, "stage=finetune"], "stage=finetune: scales learning rates .* Use fork=RUN"),
        (["task=stepless"], "is neither a task of this program nor a LightningModule with a training_step"),
        (["data=nothing"], "is no LightningDataModule: it has no train_dataloader"),
        ([*OWN, "+data.colour=red"], "data.colour: Pairs takes no such argument"),
        ([*OWN, "+task.momentum=1"], "task.momentum: Regression takes no such argument"),
    ],
)
def test_what_cannot_work_is_refused_before_the_start(place: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        composed(place, *overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=regression", "data=fixed"], "data.batch_size=16: counts the samples of an optimizer step, and a batch of .*Fixed has 4"),
        (["task=regression", "data=sampled"], "train_dataloader has a DistributedSampler"),
        (["data=pairs", "model.vocab_size=12"], "gives batches that are list, and the tasks of this program read dicts of tensors"),
        (["data=pairs", "task=manual"], "sets automatic_optimization=False"),
        (["data=pairs", "task=clipping"], "overrides on_after_backward, which is not called here"),
        (["data=pairs", "task=two"], "configure_optimizers gives 2 of them, and a step has one optimizer"),
        (["data=pairs", "task=lossless"], "training_step gives nothing, and a step needs a loss"),
    ],
)
def test_what_only_the_objects_tell_is_a_sentence_too(place: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(composed(place, *overrides, "trainer.max_steps=2"), tmp_path)


def test_generate_says_that_there_is_no_text(place: Path, alone: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    (place / "alone" / "config.yaml").exists() or pytest.fail("the run has no record")
    assert main(["generate", f"run={place}/alone", f"allow=[{MODULE}]"]) == 2
    assert "cannot generate text" in capsys.readouterr().err


def test_rows_are_cut_from_everything_that_has_them() -> None:
    x = torch.arange(6)
    batch = {"x": x, "names": list("abcdef"), "pair": [x, x + 1], "scale": torch.tensor(2.0), "note": "text"}
    assert rows_of(batch) == 6
    part = cut(batch, 6, slice(2, 4))
    assert part["x"].tolist() == [2, 3] and part["names"] == ["c", "d"] and part["pair"][1].tolist() == [3, 4]
    assert part["scale"] == 2 and part["note"] == "text"
    assert cut(batch, 6, torch.tensor([5, 5]))["names"] == ["f", "f"]


def test_a_schedule_of_torch_steps_and_is_restored(tmp_path: Path) -> None:
    words = ["optimizer=sgd", "optimizer.lr=1.0", "schedule=step", "schedule.step_size=2", "schedule.gamma=0.5"]
    rows = run_tiny(tmp_path, "whole", *words, "trainer.max_steps=6")
    assert [row["train/lr"] for row in rows] == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    run_tiny(tmp_path, "parts", *words, "trainer.max_steps=3")
    again = run_tiny(tmp_path, "parts", *words, "trainer.max_steps=6", resume=True)
    assert [row["train/lr"] for row in again] == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    assert_same(rows, again)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("schedule._target_=torch.optim.lr_scheduler.ReduceLROnPlateau", "ReduceLROnPlateau: steps on a metric"),
        ("+schedule.optimizer=adamw", "schedule.optimizer: is the run's own optimizer"),
    ],
)
def test_a_schedule_that_cannot_work_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(["schedule=step", "~schedule.step_size", "~schedule.gamma", override])
