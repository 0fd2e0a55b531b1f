"""Text as a LightningDataModule: prepared once, read by every rank, positioned by one integer."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from meshformer.config.errors import ConfigError
from meshformer.data.corpus import Corpus
from meshformer.data.prepared import Prepared, prepare
from meshformer.data.tokenizer import Tokenizer, Unknown
from meshformer.data.windows import Batch, Batches, EpochOrder, EvalBatches, GlobalBatchSampler, WindowDataset, collated


class TextData(LightningDataModule):
    """Batches ``{"tokens": (B, T), "targets": (B, T)}`` (int64, ignored targets -100) for language modelling.

    Args:
        source: a corpus, see ``corpus.py``.
        batch_size: samples in one optimizer step over all processes and micro-batches.
        context_length: T, tokens in a sample.
        tokenizer: ``char`` or ``bpe``; ``vocab_size`` is for ``bpe``.
        cache: folder for what is downloaded and prepared.
        seed: of the order of the samples.
        eval_batch_size: windows in one evaluation batch over all data-parallel ranks, rounded up to a multiple of them; by default as
            many as a training micro-batch. It changes speed and memory, never the result.
        workers: loader processes for training; 0 is fastest for token files.
        accumulation: micro-batches in one optimizer step.
        fixed_tokenizer: the pretrained run's tokenizer, for fine-tuning.
        unknown: ``error`` or ``replace`` characters that a fixed character tokenizer does not know.

    ``samples`` is the position in the data: training samples consumed so far, over all epochs and processes. The trainer side sets it
    after each optimizer step; it is saved in the checkpoint, and the next ``train_dataloader()`` goes on from there.
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
    ) -> None:
        super().__init__()
        self.source = source
        self.batch_size = batch_size
        self.context_length = context_length
        self.seed = seed
        self.eval_batch_size = eval_batch_size
        self.workers = workers
        self.accumulation = accumulation
        self.samples = 0
        self._settings: dict[str, Any] = {"tokenizer": tokenizer, "vocab_size": vocab_size, "cache": cache}
        self._settings |= {"fixed_tokenizer": fixed_tokenizer, "unknown": unknown}

    @cached_property
    def prepared(self) -> Prepared:
        """The token files; prepared at the first use, by whichever process comes first."""
        return prepare(self.source, **self._settings)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.prepared.tokenizer

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch, whatever the number of ranks."""
        return self._sampler(data_rank=0, data_world=1, accumulation=1).steps_per_epoch

    def bytes_per_token(self, split: str) -> float:
        """Bits per byte = nats per token / ln 2 / bytes per token."""
        return self.prepared.bytes_per_token(split)

    def prepare_data(self) -> None:
        """Download and tokenize, unless it is in the cache. Needs neither a trainer nor a model."""
        _ = self.prepared

    def setup(self, stage: str | None = None) -> None:
        _ = self.prepared

    def train_dataloader(self) -> Batches | DataLoader[Batch]:
        """This rank's micro-batches, from ``samples`` on."""
        sampler = self._sampler(*self._data_axis(), self.accumulation, self.samples)
        windows = WindowDataset(self.prepared.tokens("train"), self.context_length)
        if self.workers == 0:
            return Batches(windows.__getitems__, sampler, self._on_gpu())
        return DataLoader(
            windows,
            batch_sampler=sampler,  # pyright: ignore[reportArgumentType]  # arrays, which a dataset with __getitems__ is handed as they are
            collate_fn=collated,  # pyright: ignore[reportArgumentType]  # and it returns the batch
            num_workers=self.workers,
            persistent_workers=True,
            pin_memory=self._on_gpu(),
            generator=torch.Generator(),  # else each start draws from the global one
        )

    def val_dataloader(self) -> Batches:
        return self._eval_dataloader("val")

    def test_dataloader(self) -> Batches:
        return self._eval_dataloader("test")

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples, "seed": self.seed, "identity": self.prepared.identity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ConfigError when the position belongs to another order of samples: other text, tokenizer or seed."""
        if state_dict["identity"] != self.prepared.identity:
            raise ConfigError(
                "the checkpoint was trained on other text or with another tokenizer than this run's data",
                fix="Restore the files it was trained on, or start with stage=finetune stage.init_from=RUN, which takes the weights alone",
            )
        if state_dict["seed"] != self.seed:
            raise ConfigError(f"the checkpoint's order of samples was drawn with seed {state_dict['seed']}", "seed", self.seed)
        self.samples = state_dict["samples"]

    def _sampler(self, data_rank: int, data_world: int, accumulation: int, start_sample: int = 0) -> GlobalBatchSampler:
        order = EpochOrder(len(self.prepared.tokens("train")), self.context_length, self.seed)
        return GlobalBatchSampler(order, self.batch_size, accumulation, data_rank, data_world, start_sample)

    def _eval_dataloader(self, split: str) -> Batches:
        data_rank, data_world = self._data_axis()
        wanted = self.batch_size // self.accumulation if self.eval_batch_size is None else self.eval_batch_size
        a_rank = max(1, -(-wanted // data_world))
        batches = EvalBatches(self.prepared.tokens(split), self.context_length, a_rank, data_rank, data_world)
        return Batches(batches.__getitem__, range(len(batches)), self._on_gpu())

    def _data_axis(self) -> tuple[int, int]:
        """(rank, size) along the data axis: the strategy knows which processes share a batch."""
        axis = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return (axis["rank"], axis["num_replicas"]) if axis else (0, 1)

    def _on_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
