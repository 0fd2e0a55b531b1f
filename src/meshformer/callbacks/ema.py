"""An average of the weights over the training steps, which is what is validated, written with and loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from meshformer.checkpoint.folder import read_into, tensor_sizes
from meshformer.checkpoint.weights import AVERAGE
from meshformer.compat.torch import foreach_lerp_
from meshformer.config.errors import ConfigError
from meshformer.optim.shardwise import local_tensors

if TYPE_CHECKING:
    Share = float


class EMA(Callback):
    """Keeps the exponential moving average a ← β a + (1 − β) θ of the trained weights θ after every optimizer step (Polyak & Juditsky 1992).

    β is `decay`, or (1 + n) / (10 + n) after n steps where that is less, so that the first weights are soon forgotten; with `decay` null nothing
    is done. Training itself is not changed. Validation, sample texts, and all that loads weights from the run's checkpoints (evaluate, generate,
    export, fine-tuning) use the average; `resume` and `fork` go on from the weights, and with the average. It is kept in fp32, cut as the
    parameters are. State: "average.<parameter>", tensors beside the checkpoint's "model.<parameter>".

    Comes after what looks at weights in validation (Samples) and before what saves: job/build.py sees to it.
    """

    def __init__(self, decay: Share | None = None):
        if decay == 1:
            raise ConfigError("such an average never moves", "callbacks.ema.decay", decay, fix="0.999 is usual.")
        self.decay = decay
        self._trained: list[Any] = []
        self._second: set[str] = set()
        self._weights: list[Tensor] = []  # what this rank holds of them; sharing memory
        self._averages: dict[str, Tensor] = {}  # key in a checkpoint -> of the parameter's shape and layout
        self._held: list[Tensor] = []  # what this rank holds of those; sharing memory
        self._aside: list[Tensor] | None = None  # the weights while the model has the averages

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.decay is None:
            return
        named = {pl_module.aliases.get(name, name): p for name, p in pl_module.model.named_parameters() if p.requires_grad}
        self._second = {AVERAGE + name for name in pl_module.aliases.values()}  # another rank saves them
        self._trained = list(named.values())
        self._averages = {AVERAGE + name: p.detach().float().clone() for name, p in named.items()}
        self._weights, self._held = self._local_weights(), local_tensors(list(self._averages.values()))
        if trainer.ckpt_path is not None:
            path = Path(trainer.ckpt_path)
            saved = tensor_sizes(path)
            read_into(path, {key: x for key, x in self._averages.items() if key in saved})

    def _local_weights(self) -> list[Tensor]:
        return local_tensors([p.detach() for p in self._trained])

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.decay is None:
            return
        n = trainer.global_step
        foreach_lerp_(self._held, [w.float() for w in self._weights], 1 - min(self.decay, (1 + n) / (10 + n)))

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] |= {key: x for key, x in self._averages.items() if key not in self._second}

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._swap(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._swap_back(trainer)

    def _swap(self, trainer: pl.Trainer) -> None:
        if self._averages:
            trainer.strategy.reshard()  # pyright: ignore[reportAttributeAccessIssue]
            weights = self._local_weights()  # not those of training: when it ends, Lightning moves a GPU's parameters away and back
            self._aside = [w.clone() for w in weights]
            _copy(weights, self._held)

    def _swap_back(self, trainer: pl.Trainer) -> None:
        if self._aside is not None:
            trainer.strategy.reshard()  # pyright: ignore[reportAttributeAccessIssue]
            _copy(self._local_weights(), self._aside)
            self._aside = None


def _copy(into: list[Tensor], values: list[Tensor]) -> None:
    for x, value in zip(into, values, strict=True):
        x.copy_(value)


@contextmanager
def averaged(trainer: pl.Trainer) -> Iterator[None]:
    """Until this is left the trained model has for weights what its EMA, if it keeps one, has made of them."""
    own = [callback for callback in trainer.callbacks if isinstance(callback, EMA)]  # pyright: ignore[reportAttributeAccessIssue]
    for ema in own:
        ema._swap(trainer)
    try:
        yield
    finally:
        for ema in own:
            ema._swap_back(trainer)
