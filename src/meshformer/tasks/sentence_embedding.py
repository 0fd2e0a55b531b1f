"""Sentence embeddings: texts with similar meaning get vectors with a high cosine similarity.

Shapes: B batch (rows 2i and 2i + 1 are a pair), T time, C channels, G pairs in a group, N texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from .classification import mean_over_text
from .evaluation import IGNORED, SUMMED_HERE, Evaluated


class SentenceEmbedding(Evaluated):
    """Contrastive learning from pairs: InfoNCE with in-batch negatives (van den Oord et al. 2018; Reimers & Gurevych 2019).

    A text's embedding is the normalised mean of its tokens' outputs. Each text is classified among the texts of its group, by cosine similarity /
    `temperature`, with its partner as the target. A group is `group` consecutive pairs of a step's samples, which makes the loss independent of
    the layout; a micro-batch must hold a multiple of it. Logs val/loss and val/accuracy, the share of texts whose nearest text is the partner.
    """

    hub_tag = "sentence-similarity"
    learns_from = ("texts",)
    needs_column = "pair_column"
    own_head = True
    pooled = True
    objective = "pairs"

    def __init__(self, *args: Any, temperature: float = 0.05, group: int = 16, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.temperature, self.group = temperature, group

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        return {"tokens_BT": batch["tokens"], "documents_BT": batch["documents"]}

    def score(self, output: Tensor, batch: dict[str, Tensor], phase: str) -> tuple[Tensor, Tensor]:
        """output: (B, T, C); batch: documents (B, T). The count is the number of texts. ValueError for a batch that is no multiple of the group."""
        documents_BT = batch["documents"]
        e_BC = F.normalize(mean_over_text(output, documents_BT), dim=-1)
        real_B = (documents_BT >= 0).any(dim=1)
        pairs, G = len(e_BC) // 2, self.group
        if pairs % G:
            raise ValueError(f"{pairs} pairs at a time are no multiple of task.group={G}")
        left, right = e_BC.view(-1, G, 2, e_BC.shape[-1]).unbind(2)
        real = real_B.view(-1, G, 2)[..., 0]  # pairs that only pad the batch are masked
        scores = left @ right.transpose(1, 2) / self.temperature
        rows = torch.cat((scores, scores.transpose(1, 2)), dim=1).masked_fill(~real[:, None, :], -1e4)
        own = torch.arange(G, device=e_BC.device).repeat(2).expand(len(rows), -1)
        target = own.masked_fill(~real.repeat(1, 2), IGNORED).flatten()
        logits = rows.flatten(0, 1)
        if phase != "train":
            self.update_metrics(phase, logits.argmax(-1), target, self.group)
        return F.cross_entropy(logits, target, ignore_index=IGNORED, reduction="sum"), (target != IGNORED).sum()

    def metrics(self, outputs: int) -> MetricCollection:
        return MetricCollection({"accuracy": MulticlassAccuracy(outputs, average="micro", **SUMMED_HERE)})

    def outputs_of(self, data: Any) -> int | None:
        return self.group


@torch.no_grad()
def embed(model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int = 32) -> Tensor:
    """(N, C): a unit vector for each text, the normalised mean of the model's outputs over its tokens. Dot products are cosine similarities.

    `model` is a Transformer that returns hidden states (`head=False`) or embeddings; texts are truncated to its context length. Special tokens
    that a pretrained tokenizer adds are included in the mean.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    found = []
    for first in range(0, len(texts), batch_size):
        ids = [_ids(tokenizer, text, model.context_length) for text in texts[first : first + batch_size]]
        width = max(map(len, ids))
        tokens_BT = torch.tensor([own + [0] * (width - len(own)) for own in ids], device=device)
        documents_BT = torch.tensor([[0] * len(own) + [-1] * (width - len(own)) for own in ids], device=device)
        found.append(F.normalize(mean_over_text(model(tokens_BT, documents_BT=documents_BT), documents_BT), dim=-1))
    model.train(was_training)
    return torch.cat(found)


def _ids(tokenizer: Any, text: str, longest: int) -> list[int]:
    marked = hasattr(tokenizer, "special_ids")
    ids = list(map(int, tokenizer.model.encode(text).ids if marked else tokenizer.encode(text))) or [0]
    return ids if len(ids) <= longest else [*ids[: longest - 1], ids[-1]] if marked else ids[:longest]
