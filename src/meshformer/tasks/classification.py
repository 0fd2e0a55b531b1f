"""Classification of texts, tokens and images.

Shapes: B batch, T time, C channels, K classes.
"""

from __future__ import annotations

import csv
import io
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score

from .evaluation import IGNORED, SUMMED_HERE, Evaluated


class Classification(Evaluated):
    """Cross-entropy over K classes, in nats; labels of −100 are ignored.

    Logs val/loss, val/accuracy and val/f1 (macro F1), and writes the confusion matrix of the last validation into the run folder.
    `label_smoothing`: share of the target distribution that is spread evenly over all classes in training (Szegedy et al. 2016).
    """

    objective = "label"
    own_head = True

    def __init__(self, *args: Any, label_smoothing: float = 0.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.label_smoothing = label_smoothing
        self.confusion: Tensor | None = None  # (K, K): rows are true classes, columns predicted ones

    def judged(self, logits_NK: Tensor, labels_N: Tensor, phase: str) -> tuple[Tensor, Tensor]:
        """(summed loss, number of labels), both scalars; outside of training also updates the metrics."""
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
        """confusion_matrix.csv: a row for each true class, a column for each predicted class."""
        if self.confusion is None:
            return {}
        names = self._names(data)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["true / guessed", *names])
        writer.writerows([name, *row] for name, row in zip(names, self.confusion.tolist(), strict=True))
        return {"confusion_matrix.csv": text.getvalue()}

    def drawings(self, data: Any) -> dict[str, Any]:
        """The confusion matrix, shaded by the share of the true class; numbers in the cells of up to 20 classes."""
        if self.confusion is None or find_spec("matplotlib") is None:
            return {}
        from matplotlib.figure import Figure  # pyplot would keep every figure, and may look for a screen

        counts, names = self.confusion.cpu().double(), self._names(data)
        K = len(names)
        inches = 2 + min(K, 20) * 0.5
        figure = Figure(figsize=(inches, inches), layout="constrained")
        axes = figure.subplots()
        axes.imshow((counts / counts.sum(dim=1, keepdim=True).clamp(min=1)).numpy(), cmap="Blues", vmin=0, vmax=1)
        if K <= 20:
            axes.set_xticks(range(K), names, rotation=90)
            axes.set_yticks(range(K), names)
            for row, column in ((r, c) for r in range(K) for c in range(K)):
                axes.text(column, row, f"{counts[row, column]:.0f}", ha="center", va="center", fontsize=7)
        axes.set(xlabel="guessed", ylabel="true")
        return {"confusion_matrix": figure}

    def _names(self, data: Any) -> list[str]:
        assert self.confusion is not None
        return getattr(data, "classes", None) or [str(k) for k in range(len(self.confusion))]


class SequenceClassification(Classification):
    """Classifies a text by the mean of its tokens' logits or by the logits of its first token (`pooling`).

    The head is linear, so pooling the logits equals pooling the hidden states, and it works in every layout without changes.
    """

    hub_tag = "text-classification"
    learns_from = ("texts",)
    needs_column = "label_column"
    pooled = True

    def __init__(self, *args: Any, pooling: Literal["mean", "first"] = "mean", **kwargs: Any):
        super().__init__(*args, **kwargs)
        if pooling not in ("mean", "first"):
            raise ValueError(f"pooling must be 'mean' or 'first', not {pooling!r}")
        self.pooling = pooling

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """batch: tokens (B, T) and documents (B, T), which are negative for padding."""
        return {"tokens_BT": batch["tokens"], "documents_BT": batch["documents"]}

    def score(self, output: Tensor, batch: dict[str, Tensor], phase: str) -> tuple[Tensor, Tensor]:
        """output: logits (B, T, K), or (B, K) of a model that pools by itself; batch: labels (B,)."""
        if output.ndim == 2:
            return self.judged(output, batch["labels"], phase)
        logits_BK = output[:, 0] if self.pooling == "first" else mean_over_text(output, batch["documents"])
        return self.judged(logits_BK, batch["labels"], phase)


class TokenClassification(Classification):
    """Classifies each labelled token, for example to find names in a text; accuracy and F1 are over tokens."""

    hub_tag = "token-classification"
    learns_from = ("texts",)
    needs_column = "label_column"
    objective = "tags"

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        return {"tokens_BT": batch["tokens"], "positions_BT": batch.get("positions"), "documents_BT": batch["documents"]}

    def score(self, output: Tensor, batch: dict[str, Tensor], phase: str) -> tuple[Tensor, Tensor]:
        """output: logits (B, T, K); batch: targets (B, T)."""
        return self.judged(output.flatten(0, 1), batch["targets"].flatten(), phase)


class ImageClassification(Classification):
    """Classifies an image with a model that maps images to logits (B, K), such as VisionTransformer."""

    hub_tag = "image-classification"
    learns_from = ("images",)

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        return {"images": batch["images"]}

    def score(self, output: Tensor, batch: dict[str, Tensor], phase: str) -> tuple[Tensor, Tensor]:
        """output: logits (B, K); batch: labels (B,)."""
        return self.judged(output, batch["labels"], phase)


def mean_over_text(x_BTC: Tensor, documents_BT: Tensor) -> Tensor:
    """(B, C): the mean over the tokens that are not padding, in fp32. `documents_BT` is negative for padding."""
    real_BT1 = (documents_BT >= 0).unsqueeze(-1)
    return torch.where(real_BT1, x_BTC.float(), 0.0).sum(dim=1) / real_BT1.sum(dim=1).clamp(min=1)
