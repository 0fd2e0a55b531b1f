"""What happens when numbers go wrong. That a gradient which is not finite changes nothing is the task's own doing, with or without this."""

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
    """A gradient or a loss was not finite, and the run was not told to go on."""


class NonFinite(Callback):
    """At a row, tells of the first step since the last one whose gradient or loss was not finite; then `stop`s the run, or goes on (`skip`).

    The update of a step whose gradient is not finite is never made; `train/skipped_steps` counts them. A run that stops is saved first, unless
    the loss alone was not finite, when the weights may be at fault; resumed, it goes on behind the row. Under 16-mixed, gradients that overflow
    are how the loss scale is found: they are counted only. State: none.
    """

    def __init__(self, action: Literal["stop", "skip"] = "stop"):
        if action not in ("stop", "skip"):
            raise ConfigError("unknown action", "callbacks.nonfinite.action", action, fix="Use stop or skip.")
        self.action = action
        self._error: NonFiniteError | None = None

    def measure(self, trainer: pl.Trainer, pl_module: Any) -> dict[str, float]:
        trouble = pl_module.trouble
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if trouble is None or (scaled and not trouble.loss_ranks):
            return {}
        if self.action == "stop":  # once the row is written, and whatever else is due at this step
            self._error = NonFiniteError(f"{told(trouble)} {advice(trainer)}")
            self._save = trouble.gradient
        elif trainer.is_global_zero:
            say(f"warning: {told(trouble)}", error=True)
        return {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._stop(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._stop(trainer, pl_module)

    def _stop(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._error is None:
            return
        error, self._error = self._error, None
        pl_module.guard.reset()  # already reported: the extra row of the last step must not report it again
        for saver in trainer.callbacks if self._save else ():  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(saver, Checkpoint) and saver.saved_step != trainer.global_step:
                saver.save(trainer)
        raise error


def advice(trainer: pl.Trainer) -> str:
    """What may help, without what the run has already."""
    tries = ["a lower optimizer.lr", "a longer warm-up"]
    if not trainer.lightning_module.gradient_clip_val:  # pyright: ignore[reportOptionalMemberAccess]
        tries.append("trainer.gradient_clip_val=1")
    if trainer.precision != "32-true":
        tries.append("trainer.precision=32-true")
    return f"Try {', '.join(tries[:-1])} or {tries[-1]}; callbacks.nonfinite.action=skip goes on without such steps."


def told(trouble: Any) -> str:
    """The trouble in words: `step 7: the gradient of norm.weight is not finite (rank 1, learning rate 0.002). …`."""
    rate = f"learning rate {trouble.learning_rate:.3g}"
    if not trouble.gradient:
        return f"step {trouble.step}: the loss is not finite ({_ranks(trouble.loss_ranks)}, {rate}), though its gradient is."
    where = _ranks(trouble.loss_ranks or trouble.ranks) + (", where the loss is not finite either" if trouble.loss_ranks else "")
    what = "the gradients' common norm overflows"
    if trouble.parameter is not None:
        more = f" and of {trouble.parameters - 1} more" if trouble.parameters > 1 else ""
        what = f"the gradient of {trouble.parameter}{more} is not finite"
    place = f"{where}, {rate}" if where else rate
    return f"step {trouble.step}: {what} ({place}). The update was not made: weights and optimizer state are as before it."


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}" if ranks else ""


class Spike(Callback):
    """Skips the update of a step whose gradient norm is above `threshold` times the median of the last `window` steps' norms. Null: off.

    The norm is the global one before clipping; the median is the lower of the two middle values, and nothing is judged before half a window is
    known. Norms of skipped steps enter the window too, but for those not finite, so that a lasting rise is taken for the new normal after half a
    window. Chowdhery et al. 2022, section 5.1 (PaLM), train again without the batches around a spike; skipping inside the step, against running
    statistics, is what OLMo-core's SkipStepOptimizer does with mean and deviation, which a spike, unlike the median, drags along.
    State: the norms, on the device; in checkpoints, so that a resumed run judges alike. `train/skipped_steps` counts.
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
            pl_module.refuses = self._refuses

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.refuses = None

    def _refuses(self, norm: torch.Tensor, bad: torch.Tensor, step: int) -> torch.Tensor:
        """A flag on the device. The window is a ring: the place of a step is `step % window`."""
        assert self._norms is not None and self.threshold is not None
        refused = norm > self.threshold * self._norms.median()
        place = self._norms[step % self.window]
        torch.where(bad, place, norm, out=place)
        return refused

    def state_dict(self) -> dict[str, Any]:
        return {} if self._norms is None else {"norms": self._norms.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict.get("norms", [])
