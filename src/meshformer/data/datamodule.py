"""Running text as a LightningDataModule. One process tokenizes it; every rank reads its samples from the memory-mapped token files."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from meshformer.data.base import SampledData
from meshformer.data.corpus import Corpus
from meshformer.data.masking import MaskedEvaluation, MaskedWindows, Numbered, masking_of
from meshformer.data.prepared import Prepared, prepare
from meshformer.data.tokenizer import Tokenizer, Unknown
from meshformer.data.windows import EpochOrder, EvalBatches, Order, WindowDataset


class TextData(SampledData):
    """Batches ``{"tokens": (B, T), "targets": (B, T)}`` (int64, ignored targets -100) for language modelling.

    Args (the others are ``SampledData``'s):
        source: a corpus, see ``corpus.py``.
        context_length: T, tokens in a sample.
        tokenizer: ``char`` or ``bpe``; ``vocab_size`` is for ``bpe``.
        cache: folder for what is downloaded and prepared.
        fixed_tokenizer: the pretrained run's tokenizer, for fine-tuning.
        unknown: what happens to characters outside the vocabulary of a fixed character tokenizer: ``error`` or ``replace``.
        masked: batches for masked language modelling instead of next-token prediction.
    """

    def __init__(
        self,
        source: Corpus,
        batch_size: int,
        context_length: int,
        tokenizer: str,
        vocab_size: int,
        cache: str | Path,
        seed: int,
        eval_batch_size: int | None = None,
        workers: int = 0,
        accumulation: int = 1,
        fixed_tokenizer: Tokenizer | None = None,
        unknown: Unknown = "error",
        masked: bool = False,
    ) -> None:
        super().__init__(batch_size, seed, eval_batch_size, workers, accumulation)
        self.source = source
        self.context_length = context_length
        self.masked = masked
        self._settings: dict[str, Any] = {"tokenizer": tokenizer, "vocab_size": vocab_size, "cache": cache}
        self._settings |= {"fixed_tokenizer": fixed_tokenizer, "unknown": unknown, "mask": masked}

    @cached_property
    def prepared(self) -> Prepared:
        """The token files, prepared at first use; of several processes, the first to get the lock prepares them."""
        return prepare(self.source, **self._settings)

    @property
    def tokenizer(self) -> Tokenizer:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.prepared.tokenizer

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def bytes_per_token(self, split: str) -> float | None:
        """Mean UTF-8 bytes of text in a token. Bits per byte = nats per token / ln 2 / bytes per token. None for ids without a text."""
        return self.prepared.bytes_per_token(split)

    def prepare_data(self) -> None:
        """Download and tokenize, unless it is in the cache. Needs neither a trainer nor a model."""
        _ = self.prepared

    def setup(self, stage: str | None = None) -> None:
        _ = self.prepared

    @property
    def identity(self) -> str:
        return self.prepared.identity

    @property
    def mean_length(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.context_length

    def model_settings(self) -> dict[str, int]:
        return {"vocab_size": self.vocab_size}

    def order(self) -> Order:
        order = EpochOrder(len(self.prepared.tokens("train")), self.context_length, self.seed)
        return Numbered(order) if self.masked else order

    def training_set(self) -> Any:
        windows = WindowDataset(self.prepared.tokens("train"), self.context_length, self.vocab_size)
        return MaskedWindows(windows, masking_of(self.tokenizer, self.seed, self.context_length)) if self.masked else windows

    def eval_batches(self, split: str, batch_size: int, data_rank: int, data_world: int) -> Any:
        batches = EvalBatches(self.prepared.tokens(split), self.context_length, batch_size, data_rank, data_world, self.vocab_size)
        # A fixed seed, so that all runs are evaluated on the same masked tokens.
        return MaskedEvaluation(batches, masking_of(self.tokenizer, 0, self.context_length)) if self.masked else batches
