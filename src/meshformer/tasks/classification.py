"""One class for a text, a token or an image.

Shapes: B batch, T time, C channels, K classes.
"""

from __future__ import annotations

import csv
import io
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score

from .evaluation import IGNORED, SUMMED_HERE, Evaluated


class Classification(Evaluated):
    """Cross-entropy of a class; labels of −100 are ignored and not counted.

    Logs val/loss, val/accuracy and val/f1 (the mean of the classes' F1), and keeps the confusion matrix of the last validation, which ends up
    in the run folder. `label_smoothing` is the share of the target that is spread over all classes in training (Szegedy et al. 2016).
    """

    objective = "label"
    own_head = True

    def __init__(self, *args: Any, label_smoothing: float = 0.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.label_smoothing = label_smoothing
        self.confusion: Tensor | None = None  # (K, K), true class by guessed class

    def judged(self, logits_NK: Tensor, labels_N: Tensor, phase: str) -> tuple[Tensor, Tensor]:
        """Summed loss and number of labels, both scalars."""
        smoothing = self.label_smoothing if phase == "train" else 0.0
        loss_sum = F.cross_entropy(logits_NK.float(), labels_N, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)
        if phase != "train":
            self.update_metrics(phase, logits_NK.argmax(-1), labels_N, logits_NK.shape[-1])
        return loss_sum, (labels_N != IGNORED).sum()

    def metrics(self, outputs: int) -> MetricCollection:
        K = outputs
        made = {
            "accuracy": MulticlassAccuracy(K, average="micro", **SUMMED_HERE),
            "f1": MulticlassF1Score(K, average="macro", **SUMMED_HERE),
            "confusion": MulticlassConfusionMatrix(K, **SUMMED_HERE),
        }
        return MetricCollection(made, compute_groups=False)

    def outputs_of(self, data: Any) -> int | None:
        return len(data.classes) if getattr(data, "classes", None) else None

    def figures(self, phase: str, loss: Tensor, computed: dict[str, Tensor]) -> dict[str, Tensor]:
        self.confusion = computed.pop("confusion")
        return {"loss": loss, **computed}

    def headline(self, final: dict[str, float]) -> str:
        return f"validation accuracy {final['val/accuracy']:.4f}, F1 {final['val/f1']:.4f}, loss {final['val/loss']:.4f} nats"

    def results(self, data: Any) -> dict[str, str]:
        """confusion_matrix.csv: a row for each true class, a column for each that was guessed."""
        if self.confusion is None:
            return {}
        names = getattr(data, "classes", None) or [str(k) for k in range(len(self.confusion))]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["true / guessed", *names])
        writer.writerows([name, *row] for name, row in zip(names, self.confusion.tolist(), strict=True))
        return {"confusion_matrix.csv": text.getvalue()}


class SequenceClassification(Classification):
    """A class for a text, from the mean of its tokens' logits or from those of its first token.

    The head is linear, so the mean of logits is the logits of the mean; pooling after the head leaves every layout as it is.
    """

    learns_from = ("texts",)
    needs_column = "label_column"
    pooled = True

    def __init__(self, *args: Any, pooling: Literal["mean", "first"] = "mean", **kwargs: Any):
        super().__init__(*args, **kwargs)
        if pooling not in ("mean", "first"):
            raise ValueError(f"pooling must be 'mean' or 'first', not {pooling!r}")
        self.pooling = pooling

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """batch: tokens and documents (B, T), below 0 where there is padding."""
        return {"tokens_BT": batch["tokens"], "documents_BT": batch["documents"]}

    def score(self, output: Tensor, batch: dict[str, Tensor], phase: str) -> tuple[Tensor, Tensor]:
        """output: logits (B, T, K); batch: labels (B,)."""
        logits_BK = output[:, 0] if self.pooling == "first" else mean_over_text(output, batch["documents"])
        return self.judged(logits_BK, batch["labels"], phase)


class TokenClassification(Classification):
    """A class for each labelled token, as for names in a text; accuracy and F1 count tokens."""

    learns_from = ("texts",)
    needs_column = "label_column"
    objective = "tags"

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        return {"tokens_BT": batch["tokens"], "positions_BT": batch.get("positions"), "documents_BT": batch["documents"]}

    def score(self, output: Tensor, batch: dict[str, Tensor], phase: str) -> tuple[Tensor, Tensor]:
        """output: logits (B, T, K); batch: targets (B, T)."""
        return self.judged(output.flatten(0, 1), batch["targets"].flatten(), phase)


class ImageClassification(Classification):
    """A class for an image, by a model that returns logits (B, K) for images, such as VisionTransformer."""

    learns_from = ("images",)

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        return {"images": batch["images"]}

    def score(self, output: Tensor, batch: dict[str, Tensor], phase: str) -> tuple[Tensor, Tensor]:
        """output: logits (B, K); batch: labels (B,)."""
        return self.judged(output, batch["labels"], phase)


def mean_over_text(x_BTC: Tensor, documents_BT: Tensor) -> Tensor:
    """(B, C): the mean over the tokens that are no padding, in single precision."""
    real_BT1 = (documents_BT >= 0).unsqueeze(-1)
    return torch.where(real_BT1, x_BTC.float(), 0.0).sum(dim=1) / real_BT1.sum(dim=1).clamp(min=1)
