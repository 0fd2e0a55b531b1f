"""When checkpoints are saved, which of them are kept, and how Lightning's loops are restored."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from meshformer.checkpoint.find import Damaged, checkpoint_name, checkpoints, read_manifest, step_of
from meshformer.checkpoint.lightning_io import FolderCheckpointIO
from meshformer.checkpoint.write import tidy
from meshformer.printing import say

if TYPE_CHECKING:
    PositiveInt = Count = int


class Checkpoint(Callback):
    """Saves RUN/checkpoints/step-… every `every_n_steps` optimizer steps and at the end; null saves nothing, by job/build.py.

    Kept are the `keep_last` newest (0: all), the `keep_best` with the lowest `monitor` among those whose step was validated, and those of every
    `keep_every_n_steps`-th step; single files are never removed. `asynchronous`: training continues while the checkpoint is written from a copy
    in host memory; an error is raised at the next save or at the end of training. `on_failure`: whether a failed save (for example a full disk)
    ends the run or is a warning. A step that is also validated is saved after its validation, so that a resumed run neither repeats nor skips it.
    State: none. The validation metrics of the saved step are in the checkpoint's manifest, where `keep_best` reads them.
    """

    def __init__(
        self,
        every_n_steps: PositiveInt | None = 500,
        keep_last: Count = 3,
        keep_best: Count = 0,
        monitor: str = "val/loss",
        keep_every_n_steps: PositiveInt | None = None,
        asynchronous: bool = False,
        on_failure: Literal["stop", "warn"] = "stop",
    ):
        self.every_n_steps, self.asynchronous, self.on_failure = every_n_steps, asynchronous, on_failure
        self.keep_last, self.keep_best, self.monitor, self.keep_every_n_steps = keep_last, keep_best, monitor, keep_every_n_steps
        self.folder: Path | None = None  # set by job/build.py: RUN/checkpoints
        self.saved_step = self.validated_step = -1

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        io = self._io(trainer)
        io.asynchronous, io.then, io.tolerant = self.asynchronous, self._remove_old, self.on_failure == "warn"

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.saved_step = trainer.global_step  # the starting point is on disk already, or is the untrained model
        if trainer.is_global_zero and self.folder is not None:
            tidy(self.folder)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self.validated_step == trainer.global_step:
            checkpoint["metrics"] = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if self._due(step) and step != self.saved_step and not self.validates_now(trainer):
            self.save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        step = trainer.global_step
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self.validated_step = step
        if step and self._due(step) and step != self.saved_step:
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.global_step != self.saved_step or self.lost(trainer):
            self.save(trainer)

    def lost(self, trainer: pl.Trainer) -> bool:
        """Whether the last save failed and only gave a warning. Rank 0 broadcasts the answer: a collective."""
        if self.on_failure == "stop":
            return False
        io = self._io(trainer)
        io.wait()
        return bool(trainer.strategy.broadcast(io.failed))

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        # If training ends normally, Lightning's teardown of the CheckpointIO waits for the save and raises its error.
        try:
            self._io(trainer).wait()
        except Exception as error:  # the exception that ended the run must be the one that is raised
            if trainer.is_global_zero:
                say(f"a checkpoint was lost: {error}", error=True)

    def validates_now(self, trainer: pl.Trainer) -> bool:
        """Whether the step that has just finished will also be validated."""
        every = trainer.val_check_batch
        return bool(trainer.enable_validation and every and trainer.global_step % every == 0)

    def _io(self, trainer: pl.Trainer) -> FolderCheckpointIO:
        io = trainer.strategy.checkpoint_io
        assert isinstance(io, FolderCheckpointIO), "job/build.py gives the Trainer a FolderCheckpointIO"
        return io

    def save(self, trainer: pl.Trainer) -> None:
        assert self.folder is not None, "job/build.py sets Checkpoint.folder"
        self.saved_step = trainer.global_step
        trainer.save_checkpoint(self.folder / checkpoint_name(self.saved_step))

    def _due(self, step: int) -> bool:
        return self.every_n_steps is not None and step % self.every_n_steps == 0

    def _remove_old(self, new: Path) -> None:
        """Removes old checkpoints; called by the process that completed the checkpoint `new`. A failure is only a warning."""
        # Single files are the user's. A checkpoint of a later step is damaged, since the run did not resume from it: it is ignored here, and
        # overwritten when the run reaches that step.
        folders = [p for p in checkpoints(new.parent.parent) if p.is_dir() and step_of(p) <= step_of(new)]
        try:
            for old in sorted(set(folders) - self._kept(folders)):
                aside = old.with_name(old.name + ".tmp")  # renamed first: a kill during the removal must not leave a folder that looks complete
                shutil.rmtree(aside, ignore_errors=True)
                shutil.rmtree(old.rename(aside))
        except (OSError, Damaged) as error:
            say(f"warning: an old checkpoint could not be removed: {error}", error=True)

    def _kept(self, folders: Sequence[Path]) -> set[Path]:
        """The checkpoints to keep; `folders` are complete checkpoints, oldest first."""
        if not self.keep_last:
            return set(folders)
        kept = set(folders[-self.keep_last :])
        if self.keep_best:
            values = [(read_manifest(p).metrics.get(self.monitor, float("nan")), -step_of(p), p) for p in folders]
            kept |= {p for *_, p in sorted(found for found in values if found[0] == found[0])[: self.keep_best]}  # without NaNs
        if self.keep_every_n_steps:
            kept |= {p for p in folders if step_of(p) % self.keep_every_n_steps == 0}
        return kept


class ExactResume(Callback):
    """Restores Lightning's loop counters from the number of optimizer steps and of consumed samples.

    Lightning's saved counters count batches of the run that wrote the checkpoint. In a fork with another batch size these are different samples;
    the optimizer step and the sample number are independent of the batch size. State: {"step"}; the data module saves {"samples"}, which this
    callback updates.
    """

    def __init__(self, steps_per_epoch: int):
        self.steps_per_epoch = steps_per_epoch

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["step"] = trainer.global_step

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        self._samples_before = data.samples - trainer.global_step * data.batch_size

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        data.samples = self._samples_before + trainer.global_step * data.batch_size

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        step = checkpoint["step"]
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        epoch, samples_inside = divmod(data.samples, self.steps_per_epoch * data.batch_size)  # the data module is restored before the callbacks
        steps_inside = samples_inside // data.batch_size
        checkpoint["epoch"] = epoch
        fit = trainer.fit_loop.state_dict()
        epochs = dict(ready=epoch + (steps_inside > 0), started=epoch + (steps_inside > 0), processed=epoch, completed=epoch)
        fit["epoch_progress"] |= {"total": epochs, "current": dict(epochs)}
        for name in ("epoch_loop.batch_progress", "epoch_loop.scheduler_progress", "epoch_loop.manual_optimization.optim_step_progress"):
            fit[name]["total"] = dict.fromkeys(fit[name]["total"], step)
            fit[name]["current"] = dict.fromkeys(fit[name]["current"], steps_inside)
        checkpoint["loops"]["fit_loop"] = fit
