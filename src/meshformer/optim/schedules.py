"""Learning-rate schedules as multipliers of each group's own learning rate, for `torch.optim.lr_scheduler.LambdaLR`.

Each function returns a picklable callable `step -> multiplier`, where `step` counts completed optimizer steps: the k-th update, k = 1 …
max_steps, uses the multiplier of step k − 1. Warm-up is linear and starts at 1/warmup_steps, not 0; a run with `max_steps` < `warmup_steps` ends
during warm-up. The callables are `functools.partial`s because LambdaLR saves the attributes of callable objects and would restore them from a
checkpoint: a run resumed with another `trainer.max_steps` has to follow the new value.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

from meshformer.config.errors import ConfigError

Schedule = Callable[[int], float]
SHAPES = ("linear", "sqrt", "cosine")


def cosine(max_steps: int, warmup_steps: int = 0, min_ratio: float = 0.0) -> Schedule:
    """Half a cosine from 1 at the end of warm-up to `min_ratio` at `max_steps` (Loshchilov & Hutter 2017, without restarts)."""
    _check(max_steps, warmup_steps, min_ratio)
    return partial(
        _decay_after_warmup, max_steps=max_steps, warmup_steps=warmup_steps, decay_from=warmup_steps, min_ratio=min_ratio, shape="cosine"
    )


def linear(max_steps: int, warmup_steps: int = 0, min_ratio: float = 0.0) -> Schedule:
    """A straight line from 1 at the end of warm-up to `min_ratio` at `max_steps`."""
    _check(max_steps, warmup_steps, min_ratio)
    return partial(
        _decay_after_warmup, max_steps=max_steps, warmup_steps=warmup_steps, decay_from=warmup_steps, min_ratio=min_ratio, shape="linear"
    )


def wsd(
    max_steps: int,
    warmup_steps: int = 0,
    decay_fraction: float = 0.2,
    min_ratio: float = 0.0,
    shape: Literal["linear", "sqrt", "cosine"] = "linear",
) -> Schedule:
    """Warm-up, stable, decay: 1 until the last `decay_fraction` of `max_steps`, then down to `min_ratio`.

    `shape` of the decay, with x from 0 to 1 over its steps: `linear` 1 − x, `sqrt` 1 − √x (Hägele et al. 2024), `cosine` (1 + cos πx)/2.
    """
    _check(max_steps, warmup_steps, min_ratio)
    if not 0 <= decay_fraction <= 1:
        raise ConfigError("must be a fraction of the run, from 0 to 1", "schedule.decay_fraction", decay_fraction, "0.2 is usual.")
    if shape not in SHAPES:
        raise ConfigError("unknown shape of the decay", "schedule.shape", shape, f"Use one of {', '.join(SHAPES)}.")
    decay_from = max(warmup_steps, max_steps - round(decay_fraction * max_steps))
    return partial(
        _decay_after_warmup, max_steps=max_steps, warmup_steps=warmup_steps, decay_from=decay_from, min_ratio=min_ratio, shape=shape
    )


def constant(max_steps: int | None = None, warmup_steps: int = 0) -> Schedule:
    """1 after warm-up. `max_steps` is ignored; it is accepted because every schedule is called with it."""
    _check(1 if max_steps is None else max_steps, warmup_steps, 0.0)
    return partial(_decay_after_warmup, max_steps=None, warmup_steps=warmup_steps, decay_from=0, min_ratio=1.0, shape="linear")


def of_the_module(*_: object, **__: object) -> None:
    """Stands in config.yaml for the optimizer and the schedule that a LightningModule of the user's makes in configure_optimizers. Never called."""
    raise RuntimeError("the LightningModule makes its optimizer itself")


def _decay_after_warmup(step: int, *, max_steps: int | None, warmup_steps: int, decay_from: int, min_ratio: float, shape: str) -> float:
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if max_steps is None or step < decay_from:
        return 1.0
    done = min(1.0, (step - decay_from) / max(1, max_steps - decay_from))
    left = {"linear": 1 - done, "sqrt": 1 - math.sqrt(done), "cosine": 0.5 * (1 + math.cos(math.pi * done))}[shape]
    return min_ratio + (1 - min_ratio) * left


def _check(max_steps: int, warmup_steps: int, min_ratio: float) -> None:
    if max_steps is None or max_steps < 1:
        raise ConfigError("the schedule needs the length of the run", "trainer.max_steps", max_steps, "Give at least 1 step.")
    if warmup_steps < 0:
        raise ConfigError("warm-up cannot be negative", "schedule.warmup_steps", warmup_steps, "Use 0 for none.")
    if not 0 <= min_ratio <= 1:
        raise ConfigError("must be a fraction of the highest learning rate", "schedule.min_ratio", min_ratio, "Use a number from 0 to 1.")
