"""A LightningModule of the user's as a task: its training_step gives the loss, training/step.py makes the step."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from meshformer.config.errors import ConfigError
from meshformer.data.own import rows_of

from .base import Task

STEPS = {"train": "training_step", "val": "validation_step", "test": "test_step"}
FORWARDED = (
    "on_fit_start", "on_fit_end", "on_train_end", "on_train_epoch_start", "on_train_epoch_end", "on_before_zero_grad", "on_validation_start",
    "on_validation_end", "on_validation_epoch_start", "on_validation_epoch_end", "on_test_start", "on_test_end", "on_test_epoch_start",
    "on_test_epoch_end",
)  # fmt: skip
# Hooks that would have to change the step, the transfer or the checkpoint, which are this program's.
REFUSED = (
    "backward", "configure_callbacks", "configure_gradient_clipping", "lr_scheduler_step", "on_after_backward", "on_after_batch_transfer",
    "on_before_backward", "on_before_batch_transfer", "on_before_optimizer_step", "on_load_checkpoint", "on_save_checkpoint",
    "on_train_batch_end", "on_train_batch_start", "on_validation_batch_end", "on_validation_batch_start", "optimizer_step",
    "optimizer_zero_grad", "train_dataloader", "transfer_batch_to_device", "val_dataloader",
)  # fmt: skip


class Hosted(nn.Module):
    """The user's module, called through a forward of its own: FSDP gathers parameters at a forward, and the steps are other methods."""

    def __init__(self, module: pl.LightningModule) -> None:
        super().__init__()
        self.module = module
        module.configure_model()

    def forward(self, batch: Any, number: int, phase: str) -> Any:
        step = getattr(self.module, STEPS[phase])
        return step(batch, number) if len(inspect.signature(step).parameters) > 1 else step(batch)


class PlainTask(Task):
    """Runs `model`, a `Hosted` LightningModule: its steps, its optimizer with its schedule, what it logs, and its hooks at epochs and at the ends.

    Its loss is the mean over the rows of a batch, so the mean over a step is weighted by rows. Other hooks are refused by name.
    """

    calls_steps = True

    @property
    def own(self) -> Any:
        """The user's LightningModule."""
        return self.model.module

    def configure_model(self) -> None:
        fresh = self.model is None
        super().configure_model()
        if not fresh:
            return
        kind = type(self.own)
        name = f"{kind.__module__}.{kind.__qualname__}"
        if not self.own.automatic_optimization:
            message = "sets automatic_optimization=False, and the step is made here (training/step.py)"
            raise ConfigError(message, "task._target_", name, fix="Leave it out, or write a task: docs/make_it_yours/task.md.")
        for hook in REFUSED:
            if is_overridden(hook, self.own, pl.LightningModule):
                fix = "Leave it out: docs/make_it_yours/lightning.md."
                raise ConfigError(f"overrides {hook}, which is not called here", "task._target_", name, fix=fix)
        self._rows, self._phase = 1, "train"
        self.own.log, self.own.log_dict = self._log, self._log_dict

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.own.trainer = self.trainer
        self.own.setup(stage)

    def teardown(self, stage: str) -> None:
        self.own.teardown(stage)

    def on_train_start(self) -> None:
        super().on_train_start()
        self.own.on_train_start()

    def configure_optimizers(self) -> Any:
        found = self.own.configure_optimizers()
        optimizers = found["optimizer"] if isinstance(found, dict) else found
        if isinstance(found, list | tuple):
            optimizers = found[0] if isinstance(found[0], list | tuple) else found
        if isinstance(optimizers, list | tuple) and len(optimizers) == 1 and not isinstance(optimizers[0], dict):
            optimizers = optimizers[0]
        if not isinstance(optimizers, torch.optim.Optimizer):
            message = f"configure_optimizers gives {_named(optimizers)}, and a step has one optimizer"
            raise ConfigError(message, "task._target_", type(self.own).__name__, fix="Return one, with a schedule if you like.")
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for group in optimizers.param_groups:  # checkpoints hold the optimizer's state by name
            group["param_names"] = [names[id(parameter)] for parameter in group["params"]]
        return found

    def losses(self, batch: Any, phase: str) -> tuple[Tensor, Tensor]:
        loss = self._step(batch, self.trainer.global_step, phase)
        loss = loss.get("loss") if isinstance(loss, dict) else loss
        if not isinstance(loss, Tensor):
            message = f"training_step gives {_named(loss)}, and a step needs a loss"
            raise ConfigError(message, "task._target_", type(self.own).__name__, fix="Return a tensor, or a dict with `loss`.")
        return loss * self._rows, torch.tensor(float(self._rows), device=loss.device)

    def _step(self, batch: Any, number: int, phase: str) -> Any:
        self._rows, self._phase = rows_of(batch), phase
        return self.model(batch, number, phase)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("val", batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("test", batch, batch_idx)

    def _evaluate(self, phase: str, batch: Any, batch_idx: int) -> None:
        if is_overridden(STEPS[phase], self.own, pl.LightningModule):
            self._step(batch, batch_idx, phase)

    def _log(self, name: str, value: Any, **_: Any) -> None:
        """What the user's module calls as `self.log`: a column of metrics.csv, averaged over the rows and ranks of an evaluation."""
        phase = "train" if self.trainer.training else "test" if self.trainer.testing else "val"
        if phase == "train":
            if name not in ("train/loss", "train/lr", "train/grad_norm"):  # columns that every run has
                self.log(name, value, on_step=True, on_epoch=False, logger=False, batch_size=self._rows)
            return
        name = f"{phase}/{name.removeprefix(phase).lstrip('/_')}"  # val_loss is the column val/loss
        self.log(name, value, on_step=False, on_epoch=True, logger=False, batch_size=self._rows, sync_dist=True)

    def _log_dict(self, values: Any, **_: Any) -> None:
        for name, value in values.items():
            self._log(name, value)

    def headline(self, final: dict[str, float]) -> str:
        """The result of the run in one line: what was logged at the last validation, else the last training loss."""
        shown = {name: value for name, value in final.items() if name.startswith("val/")}
        shown = shown or {"training loss": final.get("train/loss", float("nan"))}
        return ", ".join(f"{name.replace('val/', 'validation ')} {value:.4f}" for name, value in shown.items())


def _forwarding(hook: str) -> Callable[..., None]:
    def forwarded(self: PlainTask, *arguments: Any) -> None:
        getattr(self.own, hook)(*arguments)

    forwarded.__name__ = hook
    return forwarded


for _hook in FORWARDED:
    setattr(PlainTask, _hook, _forwarding(_hook))


def _named(value: Any) -> str:
    return "nothing" if value is None else f"{len(value)} of them" if isinstance(value, list | tuple) else type(value).__name__
