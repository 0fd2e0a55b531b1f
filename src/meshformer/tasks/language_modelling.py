"""Next-token prediction and masked language modelling."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from meshformer.data.tokenizer import CharTokenizer
from meshformer.model import Head

from .evaluation import IGNORED, SUMMED_HERE, Evaluated


def summed_cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """The sum of −log p(target), computed in fp32, over targets that are not ignored. A scalar."""
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=IGNORED, reduction="sum")


class LanguageModelling(Evaluated):
    """Cross-entropy of the next token, in nats: −log p(target). Targets of −100 are ignored and not counted.

    Logs val/loss (mean over every target token of the split), val/perplexity = exp(loss), and val/bits_per_byte = loss / ln 2 / (bytes of text
    a token), which compares models with different tokenizers.
    """

    learns_from = ("corpus", "texts")
    writes_text = True
    hub_tag = "text-generation"
    large = 2**26  # from so many logits (256 MiB in fp32) on, the head computes the loss in chunks (model/head.py)

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """batch: tokens (B, T); positions (B, T), only for slices of a sequence and packed texts; documents (B, T), only for packed texts and
        padding."""
        return {"tokens_BT": batch["tokens"], "positions_BT": batch.get("positions"), "documents_BT": batch.get("documents")}

    def phase_inputs(self, batch: dict[str, Tensor], phase: str) -> dict[str, Any]:
        """`inputs`, plus the targets if the head shall compute the loss: for many logits that nothing else needs."""
        head, targets_BT = getattr(self.model, "head", None), batch["targets"]
        own = type(self).score in (LanguageModelling.score, MaskedLanguageModelling.score)
        many = isinstance(head, Head) and targets_BT.numel() * head.out_features >= self.large
        # The forward of a user's model may have no `targets_BT`.
        sums = many and own and not self.looks_at_logits(phase) and "targets_BT" in self._forward_signature[0]
        return {**self.inputs(batch), "targets_BT": targets_BT} if sums else self.inputs(batch)

    def looks_at_logits(self, phase: str) -> bool:
        """Whether `score` needs the logits for more than the loss."""
        return False

    def score(self, output: Tensor, batch: dict[str, Tensor], phase: str) -> tuple[Tensor, Tensor]:
        """output: logits (B, T, V), or the summed loss from the head; batch: targets (B, T). Returns (summed loss, number of counted targets),
        both scalars."""
        targets_BT = batch["targets"]
        return summed_cross_entropy(output, targets_BT) if output.ndim else output, (targets_BT != IGNORED).sum()

    def figures(self, phase: str, loss: Tensor, computed: dict[str, Tensor]) -> dict[str, Tensor]:
        values = {"loss": loss, "perplexity": loss.exp()}
        bytes_per_token = getattr(getattr(self.trainer, "datamodule", None), "bytes_per_token", None)
        size = bytes_per_token(phase) if bytes_per_token is not None else None
        if size is not None:  # None for ids without a text
            values["bits_per_byte"] = loss / math.log(2) / size
        return values

    def headline(self, final: dict[str, float]) -> str:
        bits = final.get("val/bits_per_byte")
        tokenizer = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        unit = "character" if isinstance(tokenizer, CharTokenizer) else "token"
        return f"validation loss {final['val/loss']:.4f} nats a {unit}" + (f" ({bits:.3f} bits a byte)" if bits is not None else "")


class MaskedLanguageModelling(LanguageModelling):
    """Masked language modelling: cross-entropy of masked tokens (BERT, Devlin et al. 2019). data/masking.py chooses which tokens are masked.

    Logs val/loss and val/perplexity per masked token, and val/accuracy, the share of masked tokens that are predicted exactly.
    """

    writes_text = False
    hub_tag = "fill-mask"
    objective = "mask"

    def looks_at_logits(self, phase: str) -> bool:
        return phase != "train"

    def score(self, output: Tensor, batch: dict[str, Tensor], phase: str) -> tuple[Tensor, Tensor]:
        if self.looks_at_logits(phase):
            self.update_metrics(phase, output.argmax(-1).flatten(), batch["targets"].flatten(), output.shape[-1])
        return super().score(output, batch, phase)

    def metrics(self, outputs: int) -> MetricCollection:
        return MetricCollection({"accuracy": MulticlassAccuracy(outputs, average="micro", **SUMMED_HERE)})

    def outputs_of(self, data: Any) -> int | None:
        return getattr(data, "vocab_size", None)

    def figures(self, phase: str, loss: Tensor, computed: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": loss, "perplexity": loss.exp(), **computed}

    def headline(self, final: dict[str, float]) -> str:
        return f"validation loss {final['val/loss']:.4f} nats a hidden token, {final['val/accuracy']:.1%} of them guessed"
