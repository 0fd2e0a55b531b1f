"""Predict the next token."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Task

IGNORED = -100


class LanguageModelling(Task):
    """Cross-entropy of the next token, in nats: −log p(target). Targets of −100 are ignored and not counted.

    Logs val/loss (mean over every target token of the split), val/perplexity = exp(loss), and val/bits_per_byte = loss / ln 2 / (bytes of text
    a token), which compares models with different tokenizers.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._eval_sums: Any = 0.0  # loss sum and count, this rank's; in double precision whatever the model computes in

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """batch: tokens (B, T); positions (B, T) where the sequence is a slice of a longer one."""
        return {"tokens_BT": batch["tokens"], "positions_BT": batch.get("positions")}

    def score(self, output: Tensor, batch: dict[str, Tensor], phase: str) -> tuple[Tensor, Tensor]:
        """output: logits (B, T, V); batch: targets (B, T). Returns the summed loss and the number of counted targets, both scalars."""
        targets_BT = batch["targets"]
        loss_sum = F.cross_entropy(output.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=IGNORED, reduction="sum")
        return loss_sum, (targets_BT != IGNORED).sum()

    def _evaluate(self, batch: dict[str, Tensor], phase: str) -> None:
        loss_sum, count = self.losses(batch, phase)
        self._eval_sums = self._eval_sums + torch.stack((loss_sum.detach().double(), count.double()))

    def _log_evaluation(self, phase: str) -> None:
        loss_sum, count = self.trainer.strategy.reduce(self._eval_sums, reduce_op="sum")
        loss = loss_sum / count.clamp(min=1)
        values = {f"{phase}/loss": loss, f"{phase}/perplexity": loss.exp()}
        bytes_per_token = getattr(getattr(self.trainer, "datamodule", None), "bytes_per_token", None)
        if bytes_per_token is not None:
            values[f"{phase}/bits_per_byte"] = loss / math.log(2) / bytes_per_token(phase)
        # logger=False: the run-record callback writes rows, with the step numbers that the rest of the project uses
        self.log_dict({k: v.float() for k, v in values.items()}, logger=False)
        self._eval_sums = 0.0

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")
