"""What goes on around a step: when gradients are freed, which hooks are called, and that it is the step of a loop written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, LambdaCallback

from jobs import TINY, ForeignOptimizer, OwnStep, Short, Watching, text_file
from meshformer.command.compose import compose
from meshformer.config.errors import ConfigError
from meshformer.data import TextData
from meshformer.job.build import build_callbacks, build_data, build_task, build_trainer
from meshformer.record.metrics_csv import read_metrics
from meshformer.tasks import Task
from meshformer.tasks.base import NOT_CALLED
from meshformer.tasks.check import CALLS

STEPS = 6
STEP_HOOKS = (
    "on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end",
)  # fmt: skip
TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class Counting(Callback):
    """Overrides every hook of a step."""

    def __init__(self) -> None:
        self.calls: list[str] = []


for _hook in STEP_HOOKS:
    setattr(Counting, _hook, lambda self, *_, hook=_hook: self.calls.append(hook))


def configured(folder: Path, kind: type[Any], *more: str) -> tuple[dict[str, Any], Any]:
    settings = [
        *TINY,
        f"data.files={text_file(folder)}",
        f"trainer.max_steps={STEPS}",
        "trainer.log_every_n_steps=2",
        "~callbacks.checkpoint",
    ]
    config = compose([*settings, *more, f"task._target_=jobs.{kind.__name__}", "allow=[jobs]"])
    data = build_data(config)
    data.prepare_data()
    config["model"]["vocab_size"] = data.vocab_size
    return config, data


def fitted(folder: Path, kind: type[Any], *callbacks: Callback, more: tuple[str, ...] = ()) -> tuple[Any, pl.Trainer]:
    config, data = configured(folder, kind, *more)
    task = build_task(config, STEPS)
    trainer = build_trainer(config, folder, STEPS, [*build_callbacks(config, folder, data.steps_per_epoch), *callbacks], [])
    trainer.fit(task, datamodule=data)
    return task, trainer


@pytest.mark.parametrize("accumulation", [1, 4])
def test_old_gradients_are_gone_before_the_forward_pass(tmp_path: Path, accumulation: int):
    task, _ = fitted(tmp_path, Watching, more=(f"trainer.accumulate_grad_batches={accumulation}",))
    assert task.seen == [micro > 0 for _ in range(STEPS) for micro in range(accumulation)]


@pytest.mark.parametrize("kind", [Watching, ForeignOptimizer, OwnStep])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("clip", [0.2, 100.0])
def test_steps_are_those_of_a_loop_written_out(tmp_path: Path, kind: type[Any], accumulation: int, clip: float):
    exact = ("optimizer=sgd", "optimizer.lr=0.5", "schedule=constant", f"trainer.gradient_clip_val={clip}", "trainer.log_every_n_steps=1")
    task, _ = fitted(tmp_path, kind, more=(*exact, f"trainer.accumulate_grad_batches={accumulation}"))
    config, data = configured(tmp_path, kind, *exact)
    plain = build_task(config, STEPS)
    plain.configure_model()
    weights, norms = list(plain.model.parameters()), []
    for (batch,), _ in zip(data.train_dataloader(), range(STEPS), strict=False):
        loss = F.cross_entropy(plain.model(batch["tokens"]).flatten(0, 1), batch["targets"].flatten())
        gradients = torch.autograd.grad(loss, weights)
        norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())
        with torch.no_grad():
            for p, g in zip(weights, gradients, strict=True):
                p -= 0.5 * min(1.0, clip / norms[-1]) * g
    assert (max(norms) < clip) if clip > 1 else (min(norms) > clip)
    assert [row["train/grad_norm"] for row in read_metrics(tmp_path / "metrics.csv")] == pytest.approx(norms, rel=1e-4)
    for found, expected in zip(task.model.parameters(), weights, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_who_looks_at_gradients_before_they_go_sees_them(tmp_path: Path):
    seen: list[bool] = []
    look = LambdaCallback(on_before_zero_grad=lambda _, task, optimizer: seen.append(any(p.grad is not None for p in task.parameters())))
    fitted(tmp_path, Watching, look)
    assert seen == [False] + [True] * (STEPS - 1)


def test_hooks_that_are_not_empty_are_called(tmp_path: Path):
    counting, ended = Counting(), []
    fitted(tmp_path, Watching, counting, LambdaCallback(on_train_batch_end=lambda *_: ended.append(1)))
    assert sorted(counting.calls) == sorted(STEP_HOOKS * STEPS) and len(ended) == STEPS


@pytest.mark.parametrize("where", ["task", "data"])
@pytest.mark.parametrize("hook", TRANSFER_HOOKS)
def test_transfer_hooks_are_given_micro_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, hook: str):
    seen: list[int] = []

    def look(self: Any, batch: Any, *more: Any) -> Any:
        seen.append(len(batch["tokens"]))
        return batch

    monkeypatch.setattr(Watching if where == "task" else TextData, hook, look)
    fitted(tmp_path, Watching, more=("trainer.accumulate_grad_batches=2",))
    assert seen[: 2 * STEPS] == [4] * 2 * STEPS


@pytest.mark.parametrize("hook", NOT_CALLED)
def test_a_hook_that_would_never_be_called_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hook: str):
    monkeypatch.setattr(Watching, hook, lambda self, *_: None)
    with pytest.raises(ConfigError, match=f"overrides {hook}, which is not called here.*Override training_step"):
        fitted(tmp_path, Watching)


def test_a_step_returns_the_mean_loss_of_its_tokens(tmp_path: Path):
    losses: list[float] = []
    look = LambdaCallback(on_train_batch_end=lambda trainer, task, outputs, *_: losses.append(outputs["loss"].item()))
    fitted(tmp_path, Watching, look, more=("trainer.log_every_n_steps=1", "trainer.accumulate_grad_batches=2"))
    assert losses == pytest.approx([row["train/loss"] for row in read_metrics(tmp_path / "metrics.csv")], rel=1e-6)


@pytest.mark.parametrize(("interval", "steps"), [("step", STEPS), ("epoch", 1)])
def test_schedules_of_the_users_move_on_when_they_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interval: str, steps: int):
    def configure(self: Any) -> Any:
        optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": interval}}

    monkeypatch.setattr(Watching, "on_train_epoch_end", lambda self: None)  # a user's hook, without super()
    monkeypatch.setattr(Watching, "configure_optimizers", configure)
    whole = LambdaCallback(on_train_start=lambda trainer, task: setattr(trainer, "limit_train_batches", STEPS))
    _, trainer = fitted(tmp_path, Watching, whole, more=("data.batch_size=64",))
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5**steps


def test_a_schedule_that_looks_at_a_metric_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def configure(self: Any) -> Any:
        optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val/loss"}}

    monkeypatch.setattr(Watching, "configure_optimizers", configure)
    with pytest.raises(ConfigError, match="ReduceLROnPlateau has no metric"):
        fitted(tmp_path, Watching)


def test_hooks_of_the_task_that_are_not_empty_are_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    called: list[str] = []
    for hook in STEP_HOOKS:
        monkeypatch.setattr(Watching, hook, lambda self, *_, hook=hook: called.append(hook), raising=True)
    fitted(tmp_path, Watching)
    assert sorted(called) == sorted(STEP_HOOKS * STEPS)


def test_what_a_task_logs_itself_is_in_the_rows(tmp_path: Path):
    fitted(tmp_path, Watching)
    rows = [row for row in read_metrics(tmp_path / "metrics.csv") if row.get("train/mine") not in (None, "")]
    assert [(int(row["step"]), float(row["train/mine"])) for row in rows] == [(2, 1.0), (4, 3.0), (6, 5.0)]


def test_a_training_step_without_the_number_of_the_batch(tmp_path: Path):
    assert fitted(tmp_path, Short)[0].batches == STEPS


@pytest.mark.parametrize(("accumulation", "interval"), [(1, 4), (2, 3), (1, 1)])
def test_validation_comes_when_it_is_due(tmp_path: Path, accumulation: int, interval: int):
    at: list[int] = []
    validated = LambdaCallback(on_validation_end=lambda trainer, _: at.append(trainer.global_step))
    more = (f"trainer.accumulate_grad_batches={accumulation}", f"trainer.val_check_interval={interval}")
    fitted(tmp_path, Watching, validated, more=more)
    assert at == [step for step in range(1, STEPS + 1) if step % interval == 0]


def test_the_methods_that_decide_how_a_model_is_called_are_those_of_a_task() -> None:
    assert all(hasattr(Task, name) for name in CALLS)
