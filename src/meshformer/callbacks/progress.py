"""The progress bar on the terminal, refreshed by time instead of by step."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from meshformer.printing import say


class ProgressBar(Callback):
    """On a terminal a Rich bar, refreshed about once a second; elsewhere (a log file) a plain line after each tenth of the run. State: none.

    It shows the numbers of the last metrics row, so it needs no host sync.
    """

    REFRESH_SECONDS = 1.0

    def __init__(self, rows: Any):
        self.rows = rows
        self.bar: Progress | None = None
        self._next_refresh, self._next_line_step = 0.0, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        self._next_line_step = trainer.global_step
        if sys.stderr.isatty():
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}"), TimeElapsedColumn(), TextColumn("<"))
            self.bar = Progress(
                TextColumn("{task.description}"), *columns, TimeRemainingColumn(), console=Console(stderr=True), auto_refresh=False
            )
            self.task_id = self.bar.add_task("training", total=trainer.max_steps, completed=trainer.global_step, numbers="")
            self.bar.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = time.monotonic()
        if now < self._next_refresh or not trainer.is_global_zero:
            return
        self._next_refresh = now + self.REFRESH_SECONDS
        self._show(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero and trainer.state.fn == "fit":
            self._show(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self._show(trainer)
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _numbers(self) -> str:
        """The last numbers, for example `loss 1.712  val 1.803 (step 400)  tok/s 41,000`. The validation's are named with their step."""
        latest = self.rows.latest
        validated = f"val {{:.3f}} (step {self.rows.validated_step})"
        shown = [("train/loss", "loss {:.3f}"), ("val/loss", validated), ("train/tokens_per_second", "tok/s {:,.0f}")]
        return "  ".join(form.format(latest[key]) for key, form in shown if key in latest)

    def _show(self, trainer: pl.Trainer) -> None:
        step, total = trainer.global_step, trainer.max_steps
        if self.bar is not None:
            self.bar.update(self.task_id, completed=step, numbers=self._numbers(), refresh=True)
        elif step >= self._next_line_step and self._numbers():
            self._next_line_step = step + max(1, total // 10) - step % max(1, total // 10)
            say(f"step {step}/{total}  {self._numbers()}", error=True)
