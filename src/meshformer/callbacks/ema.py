"""Exponential moving average of the weights, used for validation, samples and everything that loads the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from meshformer.checkpoint.read import read_into, tensor_sizes
from meshformer.checkpoint.weights import AVERAGE
from meshformer.config.errors import ConfigError
from meshformer.optim.shardwise import local_tensors

if TYPE_CHECKING:
    Share = float


class EMA(Callback):
    """Keeps the exponential moving average a ← β a + (1 − β) θ of the trained weights θ after every optimizer step (Polyak & Juditsky 1992).

    After n steps β is the smaller of `decay` and (1 + n) / (10 + n), so that the initial weights are forgotten early; `decay` null disables it.
    Training is not changed. Validation, sample texts and everything that loads weights from the checkpoints (evaluate, generate, export,
    fine-tuning) use the average; `resume` and `fork` restore both the weights and the average. It is kept in fp32, sharded like the parameters.
    State: the tensors "average.<parameter>" in the checkpoint, beside "model.<parameter>".

    The callback must come after those that use the weights in validation (Samples) and before those that save; job/build.py orders them.
    """

    def __init__(self, decay: Share | None = None):
        if decay == 1:
            raise ConfigError("such an average never moves", "callbacks.ema.decay", decay, fix="0.999 is usual.")
        self.decay = decay
        self._trained: list[Any] = []
        self._second: set[str] = set()
        self._local_weights: list[Tensor] = []  # the local tensors of the trained weights, sharing their memory
        self._averages: dict[str, Tensor] = {}  # key in a checkpoint -> average, with the parameter's shape and sharding
        self._local_averages: list[Tensor] = []  # the local tensors of the averages, sharing their memory
        self._aside: list[Tensor] | None = None  # a copy of the weights while the model holds the averages

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.decay is None:
            return
        named = {pl_module.aliases.get(name, name): p for name, p in pl_module.model.named_parameters() if p.requires_grad}
        self._second = {AVERAGE + name for name in pl_module.aliases.values()}  # tied weights that another pipeline stage saves
        self._trained = list(named.values())
        self._averages = {AVERAGE + name: p.detach().float().clone() for name, p in named.items()}
        self._local_weights, self._local_averages = self._current_weights(), local_tensors(list(self._averages.values()))
        if trainer.ckpt_path is not None:
            path = Path(trainer.ckpt_path)
            saved = tensor_sizes(path)
            read_into(path, {key: x for key, x in self._averages.items() if key in saved})

    def _current_weights(self) -> list[Tensor]:
        return local_tensors([p.detach() for p in self._trained])

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.decay is None:
            return
        n = trainer.global_step
        if self._local_averages:
            get_ema_multi_avg_fn(min(self.decay, (1 + n) / (10 + n)))(self._local_averages, [w.float() for w in self._local_weights], None)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] |= {key: x for key, x in self._averages.items() if key not in self._second}

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._swap(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._swap_back(trainer)

    def _swap(self, trainer: pl.Trainer) -> None:
        if self._averages:
            trainer.strategy.reshard()  # pyright: ignore[reportAttributeAccessIssue]
            weights = self._current_weights()  # not self._local_weights: at the end of training Lightning moves the parameters from the GPU and back
            self._aside = [w.clone() for w in weights]
            _copy(weights, self._local_averages)

    def _swap_back(self, trainer: pl.Trainer) -> None:
        if self._aside is not None:
            trainer.strategy.reshard()  # pyright: ignore[reportAttributeAccessIssue]
            _copy(self._current_weights(), self._aside)
            self._aside = None


def _copy(into: list[Tensor], values: list[Tensor]) -> None:
    for x, value in zip(into, values, strict=True):
        x.copy_(value)


@contextmanager
def averaged(trainer: pl.Trainer) -> Iterator[None]:
    """Context in which the model has the averaged weights, if the run has an EMA."""
    own = [callback for callback in trainer.callbacks if isinstance(callback, EMA)]  # pyright: ignore[reportAttributeAccessIssue]
    for ema in own:
        ema._swap(trainer)
    try:
        yield
    finally:
        for ema in own:
            ema._swap_back(trainer)
