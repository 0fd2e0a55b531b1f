"""An average of the weights over the training steps, which is what is validated, written with and loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from meshformer.checkpoint.folder import read_into, tensor_sizes
from meshformer.checkpoint.weights import AVERAGE
from meshformer.config.errors import ConfigError
from meshformer.optim.shardwise import pieces

if TYPE_CHECKING:
    Share = float


class EMA(Callback):
    """Keeps the exponential moving average a ← β a + (1 − β) θ of the weights θ after every optimizer step (Polyak & Juditsky 1992).

    β is `decay`, or (1 + n) / (10 + n) after n steps where that is less, so that the first weights are soon forgotten; with `decay` null nothing
    is done. Training itself is not changed. Validation, sample texts, and all that loads weights from the run's checkpoints (evaluate, generate,
    export, fine-tuning) use the average; `resume` and `fork` go on from the weights, and with the average. It is kept in fp32, cut as the
    parameters are. State: "average.<parameter>", tensors beside the checkpoint's "model.<parameter>".
    """

    def __init__(self, decay: Share | None = None):
        if decay == 1:
            raise ConfigError("such an average never moves", "callbacks.ema.decay", decay, fix="0.999 is usual.")
        self.decay = decay
        self._names: list[str] = []
        self._weights: list[Tensor] = []  # of the parameters
        self._averages: list[Tensor] = []
        self._swapped: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.decay is None:
            return
        named = [(pl_module.aliases.get(name, name), p) for name, p in pl_module.model.named_parameters()]
        averages = [p.detach().float().clone() for _, p in named]
        self._names, self._weights, self._averages = [name for name, _ in named], pieces([p.detach() for _, p in named]), pieces(averages)
        self._shaped = dict(zip((AVERAGE + name for name in self._names), averages, strict=True))
        self._own = [name for name, _ in pl_module.model.named_parameters() if name not in pl_module.aliases]
        if trainer.ckpt_path is not None:
            path = Path(trainer.ckpt_path)
            saved = tensor_sizes(path)
            read_into(path, {key: x for key, x in self._shaped.items() if key in saved})

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.decay is None or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        n = trainer.global_step
        torch._foreach_lerp_(self._averages, [w.float() for w in self._weights], 1 - min(self.decay, (1 + n) / (10 + n)))

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self._names:
            checkpoint["state_dict"] |= {AVERAGE + name: self._shaped[AVERAGE + name] for name in self._own}

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._swapped = self.averaged(trainer)
        self._swapped.__enter__()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._swapped is not None:
            self._swapped.__exit__(None, None, None)
            self._swapped = None

    @contextmanager
    def averaged(self, trainer: pl.Trainer) -> Iterator[None]:
        """The model has the averages for weights until this is left."""
        if not self._names:
            yield
            return
        give_back = getattr(trainer.strategy, "give_back", lambda: None)  # FSDP may keep whole copies of what is changed here
        give_back()
        weights = [w.clone() for w in self._weights]
        torch._foreach_copy_(self._weights, self._averages)
        try:
            yield
        finally:
            give_back()
            torch._foreach_copy_(self._weights, weights)
