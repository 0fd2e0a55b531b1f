"""Short texts as a LightningDataModule: labelled or not, padded to batches of similar length, or packed several to a row.

The inputs and targets depend on the objective: see ``objectives.py``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from meshformer.config.errors import ConfigError
from meshformer.data.base import FolderData
from meshformer.data.checked import built_once
from meshformer.data.labelled import Examples, LabelledSource
from meshformer.data.objectives import READERS, Ints, Objective, Reader, StretchReader
from meshformer.data.prepared import SPLITS, tokenizer_settings
from meshformer.data.tokenizer import Tokenizer, Unknown, train_tokenizer
from meshformer.data.windows import Batch, Order, Starts

_LAYOUT = 1  # version of the folder's format; part of the cache key
_POOL = 16  # batches whose samples are sorted by length together


class SequenceData(FolderData):
    """Batches for ``objective``, int64: ``tokens`` and ``documents`` (B, T), and

    - ``label``: ``labels`` (B,), the class of each text, IGNORED for rows of padding
    - ``tags``: ``targets`` (B, T), the class of each word at its last token, IGNORED elsewhere
    - ``next``, ``mask``: ``targets`` (B, T), the next or the masked token
    - ``pairs``: rows 2i and 2i + 1 are a pair; B is twice the number of samples

    All batches of one optimizer step are as wide as its longest text, rounded up to ``pad_to``; the texts of a step are of similar length.

    Args (the others are those of ``SampledData`` and ``TextData``):
        context_length: the largest T. A longer text is cut; with ``next`` and ``mask`` it continues in another sample.
        packing: several texts share a row, for ``next`` and ``mask``. The batch then has ``positions`` (B, T) too.
        classes: names in the order of their numbers; None: those of the training part.
        eval_multiple: the samples of an evaluation batch on each rank must be a multiple of it (groups of pairs).
    """

    def __init__(
        self,
        source: LabelledSource,
        objective: Objective,
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
        packing: bool = False,
        classes: Sequence[str] | None = None,
        pad_to: int = 16,
        eval_multiple: int = 1,
    ) -> None:
        super().__init__(batch_size, seed, eval_batch_size, workers, accumulation)
        self.eval_multiple = eval_multiple
        self.objective, self.reader = objective, READERS[objective]
        if packing and not issubclass(self.reader, StretchReader):
            raise ConfigError(f"objective={objective} needs each text in a row of its own", "data.packing", "true", fix="Leave it out.")
        self.source, self.context_length = source, context_length
        self.packing, self.pad_to, self._classes = packing, pad_to, classes
        self._tokenizer_settings = tokenizer, vocab_size, fixed_tokenizer, unknown
        self._cache = cache
        self._readers: dict[str, Reader] = {}

    def prepared_folder(self) -> Path:
        kind, vocab_size, fixed, unknown = self._tokenizer_settings
        settings = {"sequences": _LAYOUT, "source": self.source.identity(), "objective": self.objective, "classes": self._classes}
        settings |= tokenizer_settings(kind, vocab_size, fixed, unknown, self.reader.masks)

        def build(folder: Path) -> None:
            examples = self.source.examples()
            _check_examples(examples, self.reader)
            train = [i for i, split in enumerate(examples.splits) if split == "train"]
            chosen = fixed or _train_tokenizer(examples, train, kind, vocab_size, self.reader.masks)
            classes = self.reader.classes_of(examples, train, self._classes)
            for split in SPLITS:
                members = [i for i, own in enumerate(examples.splits) if own == split]
                arrays: dict[str, Any] = self.reader.encoded(examples, members, chosen, unknown, classes)
                np.savez(folder / f"{split}.npz", **arrays)
            chosen.save(folder / "tokenizer.json")
            (folder / "classes.json").write_text(json.dumps(classes), encoding="utf-8")

        return built_once(settings, self._cache, build)

    @cached_property
    def classes(self) -> list[str] | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return json.loads((self.folder / "classes.json").read_text(encoding="utf-8"))

    @cached_property
    def identity(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        # Not the folder's name, which depends on `classes`: a resumed run gets the recorded classes, where the first start had None.
        parts = self.source.identity(), self.objective, self.packing, self.classes, self.tokenizer.to_json()
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def model_settings(self) -> dict[str, int]:
        return {"vocab_size": self.vocab_size} | ({"outputs": len(self.classes)} if self.classes is not None else {})

    @cached_property
    def mean_length(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return float(self._rows("train").lengths.mean()) * self.reader.rows_per_sample

    def order(self) -> Order:
        return ByLength(self._rows("train").lengths, self.batch_size, self.seed, self.pad_to, self.context_length)

    def training_set(self) -> Any:
        return self._rows("train")

    def eval_batches(self, split: str, batch_size: int, data_rank: int, data_world: int) -> Any:
        rows = self._rows(split)
        if not len(rows.lengths):
            fix = "Use split=val, or give it one: data.source.test_fraction=0.1, or a file or split of its own."
            raise ConfigError(f"the data has no {split} part", "split", split, fix)
        batch_size = -(-batch_size // self.eval_multiple) * self.eval_multiple
        return EvalRows(rows, batch_size, data_rank, data_world, self.pad_to, self.context_length)

    def _rows(self, split: str) -> Reader:
        if split not in self._readers:
            self._readers[split] = self._make_reader(split)
        return self._readers[split]

    def _make_reader(self, split: str) -> Reader:
        with np.load(self.folder / f"{split}.npz", allow_pickle=False) as stored:
            arrays = dict(stored)
        seed = self.seed if split == "train" else 0  # fixed for evaluation, so that all runs are evaluated on the same masked tokens
        return self.reader(arrays, self.context_length, self.tokenizer, self.packing, seed)


class Rows(Protocol):
    """The samples of one split, as ``EvalRows`` reads them: a negative sample is an empty row."""

    lengths: Ints

    def read(self, samples: Ints, width: int, numbers: Ints) -> Batch: ...


class ByLength:
    """A new random order in each epoch, in which the texts of a batch are of similar length, so that little of it is padding.

    The epoch's random permutation is divided into pools of 16 batches; each pool is sorted by length and divided into batches, which are shuffled.
    Its rows are (sample, width of its batch, number of the sample over all epochs).
    """

    def __init__(self, lengths: Ints, batch_size: int, seed: int, pad_to: int, longest: int) -> None:
        self.n_samples, self.told = len(lengths), f"the training part has only {len(lengths)} samples"
        self.lengths, self.batch_size, self.seed, self.pad_to, self.longest = lengths, batch_size, seed, pad_to, longest

    def starts(self, epoch: int) -> Starts:
        generator = np.random.default_rng([self.seed, epoch])
        steps = self.n_samples // self.batch_size
        chosen = generator.permutation(self.n_samples)[: steps * self.batch_size]
        batches = chosen[in_batches_of_like_length(self.lengths[chosen], self.batch_size, generator)]
        widths = rounded(self.lengths[batches].max(axis=1, initial=1), self.pad_to, self.longest)
        numbers = epoch * self.n_samples + np.arange(len(chosen))
        return np.stack((batches.ravel(), widths.repeat(self.batch_size), numbers), axis=1)


class EvalRows:
    """All samples of a part in batches of similar length, each sample once for any ``batch_size`` and ``data_world``. The last batch is
    padded with empty rows. The batches come in random order, so that the first few are representative of the part."""

    def __init__(self, reader: Rows, batch_size: int, data_rank: int, data_world: int, pad_to: int, longest: int) -> None:
        self.reader, self.batch_size, self.data_rank, self.data_world = reader, batch_size, data_rank, data_world
        order = np.argsort(-reader.lengths, kind="stable")
        size = batch_size * data_world
        self._samples = np.full(-(-len(order) // size) * size, -1, np.int64)
        self._samples[: len(order)] = order
        self._widths = rounded(reader.lengths[order[::size]], pad_to, longest)
        self._turns = np.random.default_rng(0).permutation(len(self._widths))

    def __len__(self) -> int:
        return len(self._widths)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        index = int(self._turns[index])
        first = (index * self.data_world + self.data_rank) * self.batch_size
        samples = self._samples[first : first + self.batch_size]
        return self.reader.read(samples, int(self._widths[index]), np.maximum(samples, 0))


def in_batches_of_like_length(lengths: Ints, batch_size: int, generator: np.random.Generator) -> Ints:
    """(steps, batch_size): which samples, of ``lengths`` in random order, form each batch. Pools of 16 batches are sorted by length and divided
    into batches, which are shuffled."""
    steps = len(lengths) // batch_size
    pool = np.arange(len(lengths)) // (batch_size * _POOL)
    batches = np.lexsort((lengths, pool)).reshape(steps, batch_size)
    return batches[np.lexsort((generator.random(steps), np.arange(steps) // _POOL))]


def rounded(widths: Ints, multiple: int, longest: int) -> Ints:
    """Rounded up to a multiple, but to ``longest`` at most, the model's context length."""
    return np.minimum(-(-widths // multiple) * multiple, longest)


# --- preparing


def _check_examples(examples: Examples, reader: type[Reader]) -> None:
    if not examples.texts:
        raise ConfigError("there are no texts", "data.source")
    reader.check(examples)
    for split, need in (("train", "to train on"), ("val", "to validate on")):
        if split not in examples.splits:
            raise ConfigError(f"no example is left {need}, of {len(examples.texts)} in all", "data.validation_fraction")


def _train_tokenizer(examples: Examples, train: list[int], kind: str, vocab_size: int, masked: bool) -> Tokenizer:
    def joined(members: Sequence[int]) -> str:
        return "\n".join(text for i in members for text in (examples.texts[i], *([examples.partners[i]] if examples.partners else [])))

    return train_tokenizer(kind, joined(range(len(examples.texts))), joined(train), vocab_size, masked)
