"""Writes metrics.csv and feeds the loggers: one row per logged step, numbered by completed optimizer steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from meshformer.printing import say
from meshformer.record.metrics_csv import MetricsCsv, read_metrics


class Rows(Callback):
    """A row every `every_n_steps` optimizer steps and at the last one; validation metrics go into the row of their step.

    `step` counts completed optimizer steps from 1. Another callback adds columns with a method `measure(trainer, task) -> dict[str, float]`, which
    is called on every rank at the same steps; values that the task logs with `self.log` become columns too. State: none, it is in the file.
    """

    def __init__(self, folder: Path, every_n_steps: int):
        self.folder, self.every_n_steps = Path(folder), every_n_steps
        self.validated_step = -1
        self.csv: MetricsCsv | None = None  # on rank 0 only
        self.latest: dict[str, float] = {}
        self._lr, self._epoch_samples = 0.0, 0
        self.tolerant = False  # set by job/build.py: callbacks.checkpoint.on_failure=warn
        self._unwritten: list[tuple[int, dict[str, Any]]] = []
        self._failure_reported = False
        self._exported: set[str] = set()  # our metrics that were added to trainer.callback_metrics

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.begin(trainer)  # not in on_fit_start, where the step is not restored yet

    def begin(self, trainer: pl.Trainer) -> None:
        """Opens metrics.csv at the trainer's step. job/train.py calls it for a resumed run that only has its last validation left to do."""
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        self._epoch_samples = data.steps_per_epoch * data.batch_size  # computed once, since it opens the token file
        if trainer.is_global_zero:
            self.csv = MetricsCsv(self.folder / "metrics.csv")
            self.csv.truncate_after(trainer.global_step)  # drops rows after the checkpoint that this run resumes from
            rows = read_metrics(self.csv.path)
            if rows and rows[-1]["step"] == trainer.global_step:
                self.latest = {name: value for name, value in rows[-1].items() if "/" in name and isinstance(value, float)}

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self._lr = optimizer.param_groups[0]["lr"]  # recorded here, since on_train_batch_end comes after the scheduler step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step % self.every_n_steps and step != trainer.max_steps:
            return
        # An extra row at the last step does not reset the sums, so a run that is resumed to train longer gets the rows of an uninterrupted one.
        values: dict[str, float] = pl_module.running_metrics(reset=step % self.every_n_steps == 0)
        values["train/lr"] = self._lr
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            if hasattr(callback, "measure"):
                values.update(callback.measure(trainer, pl_module))
        own = {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith(("val/", "test/")) and k not in self._exported}
        # Lightning's callbacks (EarlyStopping) look up metrics by name, and Lightning itself only adds those logged with self.log.
        trainer.callback_metrics.update({k: torch.tensor(v) for k, v in values.items()})
        self._exported.update(values)
        values.update(own)
        self._write(trainer, step, values)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.validated_step = trainer.global_step
            self._write(trainer, trainer.global_step, {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")})

    def _write(self, trainer: pl.Trainer, step: int, values: dict[str, float]) -> None:
        self.latest.update(values)
        if self.csv is None:
            return
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        samples = data.samples
        self._unwritten.append((step, {"epoch": max(0, samples - 1) // self._epoch_samples, "samples": samples, **values}))
        self._flush()
        for logger in trainer.loggers:
            logger.log_metrics({**values, "samples": samples}, step)

    def _flush(self) -> None:
        """Writes the pending rows. If that fails (a full disk), raises, or with `tolerant` warns once and keeps the rows for the next attempt."""
        assert self.csv is not None
        try:
            while self._unwritten:
                self.csv.row(self._unwritten[0][0], **self._unwritten[0][1])
                self.csv.flush()
                self._unwritten.pop(0)
            self.csv.flush()
            self._failure_reported = False
        except OSError as error:
            if not self.tolerant:
                raise
            if not self._failure_reported:
                self._failure_reported = True
                say(f"warning: metrics.csv could not be written ({error.strerror}); training goes on, and the next row tries again", error=True)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self.csv is not None:
            self._flush()

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if self.csv is not None:
            self._flush()
