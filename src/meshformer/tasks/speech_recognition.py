"""Speech recognition: recordings to text, by connectionist temporal classification (CTC).

Shapes: B batch, F frames, M mel bands, T tokens of the encoder, K classes (characters and the blank), S target characters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.text import CharErrorRate, WordErrorRate

from meshformer.data import CharTokenizer
from meshformer.model.ctc import beam_search, ctc_loss, greedy

from .evaluation import IGNORED, Evaluated

SHOWN = 10  # transcripts in a sample file
LONGEST_SAMPLE = 8192  # bytes of a sample file that a pipeline's last stage sends


class SpeechRecognition(Evaluated):
    """CTC over characters or pieces of words, in nats each. Logs val/loss, val/cer and val/wer, the error rates of characters and words:
    substitutions, insertions and deletions, divided by what was said.

    `decoding`: `greedy`, the likeliest class of each token; `beam`, the likeliest of `beam_width` texts over all their alignments, slower.
    """

    hub_tag = "automatic-speech-recognition"
    learns_from = ("speech",)
    own_head = True

    def __init__(self, *args: Any, decoding: Literal["greedy", "beam"] = "greedy", beam_width: int = 8, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if decoding not in ("greedy", "beam"):
            raise ValueError(f"decoding must be 'greedy' or 'beam', not {decoding!r}")
        if beam_width < 1:
            raise ValueError(f"beam_width must be at least 1, not {beam_width}")
        self.decoding, self.beam_width = decoding, beam_width
        self.transcripts: list[tuple[str, str]] = []  # (reference, hypothesis) of the first clips of a validation

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        return {"features": batch["features"], "documents_BT": batch["documents"]}

    def score(self, output: Tensor, batch: dict[str, Tensor], phase: str) -> tuple[Tensor, Tensor]:
        """output: logits (B, T, K); batch: documents (B, T), negative for padding, and targets (B, S), IGNORED behind the transcript."""
        real_BT = batch["documents"] >= 0
        if phase != "train":
            self._transcribe(output, batch["targets"], real_BT)
        return ctc_loss(output, batch["targets"], real_BT)

    def _transcribe(self, logits_BTK: Tensor, targets_BS: Tensor, real_BT: Tensor) -> None:
        tokenizer: Any = self.trainer.datamodule.tokenizer  # pyright: ignore[reportAttributeAccessIssue]
        if not self._metrics:
            self._metrics.append(self.metrics(0).to(logits_BTK.device))
        rows = [row for row, length in enumerate(real_BT.sum(1).tolist()) if length]
        said = [tokenizer.decode([k for k in targets_BS[row].tolist() if k != IGNORED]) for row in rows]
        heard = [self.text_of(logits_BTK[row][real_BT[row]], tokenizer) for row in rows]
        if rows:
            self._metrics[0].update(heard, said)
        self.transcripts += list(zip(said, heard, strict=True))[: SHOWN - len(self.transcripts)]

    def text_of(self, logits_TK: Tensor, tokenizer: Any) -> str:
        ids = greedy(logits_TK) if self.decoding == "greedy" else beam_search(logits_TK.cpu(), self.beam_width)
        return " ".join(tokenizer.decode(ids).split())

    def metrics(self, outputs: int) -> MetricCollection:
        made: dict[str, Any] = {"cer": CharErrorRate(sync_on_compute=False), "wer": WordErrorRate(sync_on_compute=False)}
        return MetricCollection(made, compute_groups=False)

    def outputs_of(self, data: Any) -> int | None:
        return 0

    def on_validation_epoch_start(self) -> None:
        self.transcripts = []

    def headline(self, final: dict[str, float]) -> str:
        tokenizer = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        unit = "character" if isinstance(tokenizer, CharTokenizer) else "piece"
        rates = f"characters wrong {final['val/cer']:.3f}, words {final['val/wer']:.3f}"
        return f"validation {rates}, loss {final['val/loss']:.4f} nats a {unit}"

    def sample_text(self) -> str | None:
        """Reference above hypothesis, for the first clips of the last validation on this rank."""
        text = "\n\n".join(f"said   {said}\nheard  {heard}" for said, heard in self.transcripts)
        if self.pipeline is None:
            return text or None
        # Only the last stage has seen the outputs.
        encoded = torch.zeros(LONGEST_SAMPLE, dtype=torch.uint8, device=self.device)
        own = text.encode()[:LONGEST_SAMPLE]
        encoded[: len(own)] = torch.tensor(list(own), dtype=torch.uint8)
        strategy: Any = self.trainer.strategy
        return bytes(strategy.from_last_stage(encoded).tolist()).rstrip(b"\0").decode(errors="ignore") or None


@torch.no_grad()
def transcribe(task: SpeechRecognition, model: Any, tokenizer: Any, features: Sequence[Tensor], frames_per_token: int) -> list[str]:
    """The text of each recording's features (F, M), one at a time; F is cut to a multiple of `frames_per_token`."""
    texts = []
    for x_FM in features:
        whole = x_FM[: len(x_FM) // frames_per_token * frames_per_token]
        texts.append(task.text_of(model(whole[None])[0], tokenizer))
    return texts
