"""When checkpoints are saved and which are kept; and how a run finds its place again from two numbers."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from meshformer.checkpoint.find import checkpoint_name, checkpoints, step_of
from meshformer.checkpoint.folder import tidy
from meshformer.checkpoint.lightning_io import FolderCheckpointIO
from meshformer.checkpoint.manifest import Damaged, read_manifest
from meshformer.printing import say

if TYPE_CHECKING:
    PositiveInt = Count = int


class Checkpoint(Callback):
    """Saves RUN/checkpoints/step-… every `every_n_steps` optimizer steps and at the end.

    Kept are the `keep_last` newest (0: all), the `keep_best` with the lowest `monitor` among those whose step was validated, and those of every
    `keep_every_n_steps`-th step; single files always. `asynchronous`: training goes on while the checkpoint is written, from a copy in the
    host's memory; what fails then shows at the next save or at the end. `on_failure`: whether a save that fails (a full disk, say) ends the run
    or is a warning, after which the next save tries again. Where a step is also validated, the save comes after the validation, so that a
    resumed run neither repeats nor misses it. State: none; `metrics`, what validation gave at the step that is saved, is in the checkpoint for
    `keep_best`, which reads it from the manifests.
    """

    def __init__(
        self,
        every_n_steps: PositiveInt = 500,
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
        self.saved_step = trainer.global_step  # what we start from is on disk already, or is the untrained model
        if trainer.is_global_zero and self.folder is not None:
            tidy(self.folder)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self.validated_step == trainer.global_step:
            checkpoint["metrics"] = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step % self.every_n_steps == 0 and step != self.saved_step and not self.validates_now(trainer):
            self.save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        step = trainer.global_step
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self.validated_step = step
        if step and step % self.every_n_steps == 0 and step != self.saved_step:
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.global_step != self.saved_step or self.lost(trainer):
            self.save(trainer)

    def lost(self, trainer: pl.Trainer) -> bool:
        """Whether the save before failed, and was a warning. The same on all ranks, of which the first alone may know."""
        if self.on_failure == "stop":
            return False
        io = self._io(trainer)
        io.wait()
        return bool(trainer.strategy.broadcast(io.failed))

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        # (Where training ends well, Lightning's teardown of the CheckpointIO waits, and raises.)
        try:
            self._io(trainer).wait()
        except Exception as error:  # the exception that ends the run is the one to be raised
            if trainer.is_global_zero:
                say(f"a checkpoint was lost: {error}", error=True)

    def validates_now(self, trainer: pl.Trainer) -> bool:
        """Whether the step that has just been made is also to be validated."""
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

    def _remove_old(self, new: Path) -> None:
        """Called by the process that has completed the checkpoint `new`. What cannot be removed is told: no reason to end a training."""
        # Single files were put there by hand. Later steps than this one are damaged, or the run would have gone on from them: they count for
        # nothing, and are replaced when the run comes there.
        folders = [p for p in checkpoints(new.parent.parent) if p.is_dir() and step_of(p) <= step_of(new)]
        try:
            for old in sorted(set(folders) - self._kept(folders)):
                aside = old.with_name(old.name + ".tmp")  # a kill in the middle must not leave a folder that looks complete
                shutil.rmtree(aside, ignore_errors=True)
                shutil.rmtree(old.rename(aside))
        except (OSError, Damaged) as error:
            say(f"warning: an old checkpoint could not be removed: {error}", error=True)

    def _kept(self, folders: Sequence[Path]) -> set[Path]:
        """Of complete checkpoints, oldest first."""
        if not self.keep_last:
            return set(folders)
        kept = set(folders[-self.keep_last :])
        if self.keep_best:
            values = [(read_manifest(p).metrics.get(self.monitor, float("nan")), -step_of(p), p) for p in folders]
            kept |= {p for *_, p in sorted(found for found in values if found[0] == found[0])[: self.keep_best]}  # not the nan ones
        if self.keep_every_n_steps:
            kept |= {p for p in folders if step_of(p) % self.keep_every_n_steps == 0}
        return kept


class ExactResume(Callback):
    """Puts Lightning's loops where the run's steps and samples leave them.

    Lightning's own counters in a checkpoint are those of the run that wrote it: in a fork with another batch size, or from a version that
    counted micro-batches, they mean other samples. The optimizer step and the samples consumed mean the same everywhere. State: {"step"} here,
    {"samples"} in the data module, which this callback keeps up to date.
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
        epoch, samples_inside = divmod(data.samples, self.steps_per_epoch * data.batch_size)  # restored before callbacks are
        steps_inside = samples_inside // data.batch_size
        checkpoint["epoch"] = epoch
        fit = trainer.fit_loop.state_dict()
        epochs = dict(ready=epoch + (steps_inside > 0), started=epoch + (steps_inside > 0), processed=epoch, completed=epoch)
        fit["epoch_progress"] |= {"total": epochs, "current": dict(epochs)}
        for name in ("epoch_loop.batch_progress", "epoch_loop.scheduler_progress", "epoch_loop.manual_optimization.optim_step_progress"):
            fit[name]["total"] = dict.fromkeys(fit[name]["total"], step)
            fit[name]["current"] = dict.fromkeys(fit[name]["current"], steps_inside)
        checkpoint["loops"]["fit_loop"] = fit
