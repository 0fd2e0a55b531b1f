"""Reports non-finite losses and gradients, and skips gradient spikes. training/step.py skips non-finite gradients, with or without this callback."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from meshformer.config.errors import ConfigError
from meshformer.printing import say

from .checkpoint import Checkpoint

if TYPE_CHECKING:
    PositiveInt = int
    PositiveFloat = float


class NonFiniteError(ArithmeticError):
    """A gradient or a loss was not finite, and callbacks.nonfinite.action is stop."""


class NonFinite(Callback):
    """At each metrics row reports the first step since the last row with a non-finite gradient or loss, then `stop`s the run or continues (`skip`).

    A step with a non-finite gradient never updates the weights; `train/skipped_steps` counts them. A run that stops is saved first, unless only
    the loss was not finite, since then the weights may be corrupt; a resumed run continues after the row. With 16-mixed, overflowing gradients
    are part of dynamic loss scaling and are only counted. State: none.
    """

    def __init__(self, action: Literal["stop", "skip"] = "stop"):
        if action not in ("stop", "skip"):
            raise ConfigError("unknown action", "callbacks.nonfinite.action", action, fix="Use stop or skip.")
        self.action = action
        self._error: NonFiniteError | None = None

    def measure(self, trainer: pl.Trainer, pl_module: Any) -> dict[str, float]:
        failure = pl_module.failure
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if failure is None or (scaled and not failure.loss_ranks):
            return {}
        if self.action == "stop":  # raised later, after the row is written and the other callbacks of this step have run
            self._error = NonFiniteError(f"{describe_failure(failure)} {advice(trainer)}")
            self._save = failure.gradient
        elif trainer.is_global_zero:
            say(f"warning: {describe_failure(failure)}", error=True)
        return {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._stop(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._stop(trainer, pl_module)

    def _stop(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._error is None:
            return
        error, self._error = self._error, None
        pl_module.guard.reset()  # the row of the last step must not report the failure again
        for saver in trainer.callbacks if self._save else ():  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(saver, Checkpoint) and saver.saved_step != trainer.global_step:
                saver.save(trainer)
        raise error


def advice(trainer: pl.Trainer) -> str:
    """Suggestions that the run does not follow already."""
    tries = ["a lower optimizer.lr", "a longer warm-up"]
    if not trainer.lightning_module.gradient_clip_val:  # pyright: ignore[reportOptionalMemberAccess]
        tries.append("trainer.gradient_clip_val=1")
    if trainer.precision != "32-true":
        tries.append("trainer.precision=32-true")
    return f"Try {', '.join(tries[:-1])} or {tries[-1]}; callbacks.nonfinite.action=skip goes on without such steps."


def describe_failure(failure: Any) -> str:
    """A NonFiniteStep in words: `step 7: the gradient of norm.weight is not finite (rank 1, learning rate 0.002). …`."""
    rate = f"learning rate {failure.learning_rate:.3g}"
    if not failure.gradient:
        return f"step {failure.step}: the loss is not finite ({_ranks(failure.loss_ranks)}, {rate}), though its gradient is."
    where = _ranks(failure.loss_ranks or failure.ranks) + (", where the loss is not finite either" if failure.loss_ranks else "")
    what = "the gradients' common norm overflows"
    if failure.parameter is not None:
        more = f" and of {failure.parameters - 1} more" if failure.parameters > 1 else ""
        what = f"the gradient of {failure.parameter}{more} is not finite"
    place = f"{where}, {rate}" if where else rate
    return f"step {failure.step}: {what} ({place}). The update was not made: weights and optimizer state are as before it."


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}" if ranks else ""


class Spike(Callback):
    """Skips the update of a step whose gradient norm is above `threshold` times the median of the last `window` steps' norms. Null: off.

    The norm is the global one before clipping. The median is the lower of the two middle values, and no step is skipped until half the window is
    filled. Finite norms of skipped steps enter the window too, so after a lasting rise of the norm steps are skipped for half a window at most.
    PaLM (Chowdhery et al. 2022, section 5.1) restarts without the batches around a spike; OLMo-core's SkipStepOptimizer skips inside the step as
    here, but compares with mean and standard deviation, which a spike changes more than the median.
    `train/skipped_steps` counts the skipped steps. State: the window of norms, on the device, saved so that a resumed run skips the same steps.
    """

    def __init__(self, threshold: PositiveFloat | None = None, window: PositiveInt = 128):
        if threshold is not None and threshold <= 1:
            raise ConfigError("would skip about every other step", "callbacks.spike.threshold", threshold, fix="5 is a cautious start.")
        self.threshold, self.window = threshold, window
        self._norms: torch.Tensor | None = None
        self._saved: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.threshold is not None:
            norms = self._saved if len(self._saved) == self.window else [float("inf")] * self.window
            self._norms = torch.tensor(norms, device=pl_module.device)
            pl_module.should_skip = self._should_skip

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.should_skip = None

    def _should_skip(self, norm: torch.Tensor, bad: torch.Tensor, step: int) -> torch.Tensor:
        """Whether to skip, a boolean on the device; also stores the norm in the ring buffer of length `window`."""
        assert self._norms is not None and self.threshold is not None
        refused = norm > self.threshold * self._norms.median()
        place = self._norms[step % self.window]
        torch.where(bad, place, norm, out=place)
        return refused

    def state_dict(self) -> dict[str, Any]:
        return {} if self._norms is None else {"norms": self._norms.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict.get("norms", [])
