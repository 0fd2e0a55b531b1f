"""What a run of speech recognition heard in the recordings of a split, for a notebook."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meshformer.job.build import build_data
from meshformer.runs.models import load_model, read_settings


@dataclass(frozen=True)
class Heard:
    """One recording: its log-mel features (F, M), the model's logits (T, K), and two texts. `pieces` are those of the transcript, an id each."""

    name: str
    said: str
    heard: str
    features_FM: Tensor
    logits_TK: Tensor
    ids: list[int]
    pieces: list[str]

    @property
    def wrong(self) -> float:
        """The share of characters that are wrong."""
        from torchmetrics.functional.text import char_error_rate

        return float(char_error_rate([self.heard], [self.said]))


@torch.no_grad()
def transcripts(run: Path | str, split: str = "val", count: int | None = None, allow: Sequence[str] = ()) -> list[Heard]:
    """The first `count` recordings of a split, as the run's newest checkpoint hears them."""
    task: Any = load_model(run, allow)
    data: Any = build_data(read_settings(run, allow), task.tokenizer)
    part, found = data.part(split), []
    for sample, (name, said) in enumerate(part.names[:count]):
        features_FM = torch.tensor(part.features_of(sample).astype("float32"))
        logits_TK = task.model(features_FM[None])[0]
        ids = part.target_of(sample).tolist()
        pieces = [task.tokenizer.decode([i]) for i in ids]
        found.append(Heard(name, said, task.text_of(logits_TK, task.tokenizer), features_FM, logits_TK, ids, pieces))
    return found


def confusions(found: Sequence[Heard]) -> Counter[tuple[str, str]]:
    """(said, heard) -> how often, for the stretches of text in which the two differ; "" for what was left out or added."""
    counted: Counter[tuple[str, str]] = Counter()
    for one in found:
        for kind, a, b, c, d in SequenceMatcher(None, one.said, one.heard, autojunk=False).get_opcodes():
            if kind != "equal":
                counted[one.said[a:b], one.heard[c:d]] += 1
    return counted
