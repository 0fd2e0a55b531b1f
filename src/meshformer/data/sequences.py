"""Short texts as a LightningDataModule: labelled or not, padded to batches of like length or packed several to a sample.

Shapes: B batch, T time. ``documents`` (B, T) says which text a token belongs to, and PADDING where there is none: attention keeps texts apart
and padding unseen. Positions start again with every text.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, insort
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from meshformer.config.errors import ConfigError
from meshformer.data.base import SampledData
from meshformer.data.checked import built_once
from meshformer.data.datamodule import masking_of
from meshformer.data.labelled import Examples, LabelledSource, class_names
from meshformer.data.masking import Masking
from meshformer.data.prepared import tokenizer_settings
from meshformer.data.tokenizer import CharTokenizer, PretrainedTokenizer, Tokenizer, Unknown, load_tokenizer, train_tokenizer
from meshformer.data.windows import IGNORED, Batch, Order, Starts

PADDING = -1  # as a document
Objective = Literal["next", "mask", "label", "tags", "pairs"]
Ints = npt.NDArray[np.int64]
_LAYOUT = 1
_POOL = 16  # batches whose samples are sorted by length together


class Sequences:
    """Token sequences of one part, one after the other: ``tokens`` of all, ``ends`` of each, and ``labels``, one a sequence or (tags) a token."""

    def __init__(self, tokens: npt.NDArray[Any], ends: Ints, labels: Ints | None) -> None:
        self.tokens, self.ends, self.labels = tokens, ends, labels
        self.starts = np.concatenate((np.zeros(1, np.int64), ends[:-1]))


class SequenceData(SampledData):
    """Batches for ``objective``, int64: ``tokens`` and ``documents`` (B, T), and

    - ``label``: ``labels`` (B,), the class of each text, IGNORED for texts that only fill a batch up
    - ``tags``: ``targets`` (B, T), the class of each word at its last token, IGNORED elsewhere
    - ``next``, ``mask``: ``targets`` (B, T), the next or the hidden token
    - ``pairs``: rows 2i and 2i + 1 are a pair, B is twice the samples

    A batch is as wide as the longest text of the whole step, rounded up to ``pad_to``; batches are of texts of like length.

    Args (the others are ``SampledData``'s and ``TextData``'s):
        context_length: T at most; what is longer is cut, or with ``next`` and ``mask`` continued in another sample.
        packing: several texts share a sample, for ``next`` and ``mask``; positions (B, T) are in the batch then.
        classes: names in the order of their numbers; None: those of the training part.
        eval_multiple: what the samples of an evaluation batch on each rank must be a multiple of (groups of pairs).
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
        self.objective: Objective = objective
        self.source, self.context_length = source, context_length
        self.packing, self.pad_to, self._classes = packing, pad_to, classes
        self._tokenizer_settings = tokenizer, vocab_size, fixed_tokenizer, unknown
        self._cache = cache

    @cached_property
    def folder(self) -> Path:
        kind, vocab_size, fixed, unknown = self._tokenizer_settings
        masked = self.objective == "mask"
        settings = {"sequences": _LAYOUT, "source": self.source.identity(), "objective": self.objective, "classes": self._classes}
        settings |= tokenizer_settings(kind, vocab_size, fixed, unknown, masked)

        def build(folder: Path) -> None:
            examples = self.source.examples()
            _check(examples, self.objective)
            train = [i for i, split in enumerate(examples.splits) if split == "train"]
            chosen = fixed or _train_tokenizer(examples, train, kind, vocab_size, masked)
            classes = _classes_of(examples, train, self.objective, self._classes)
            for split in ("train", "val", "test"):
                members = [i for i, own in enumerate(examples.splits) if own == split]
                arrays: dict[str, Any] = _encoded(examples, members, chosen, unknown, self.objective, classes)
                np.savez(folder / f"{split}.npz", **arrays)
            chosen.save(folder / "tokenizer.json")
            (folder / "classes.json").write_text(json.dumps(classes), encoding="utf-8")

        return built_once(settings, self._cache, build)

    @cached_property
    def tokenizer(self) -> Tokenizer:  # pyright: ignore[reportIncompatibleVariableOverride]
        return load_tokenizer(self.folder / "tokenizer.json")

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @cached_property
    def classes(self) -> list[str] | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return json.loads((self.folder / "classes.json").read_text(encoding="utf-8"))

    @cached_property
    def identity(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        # Not the folder's name: in a resumed run the classes are given that were found in the first.
        parts = self.source.identity(), self.objective, self.packing, self.classes, self.tokenizer.to_json()
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def prepare_data(self) -> None:
        _ = self.folder

    def setup(self, stage: str | None = None) -> None:
        _ = self.folder

    def model_settings(self) -> dict[str, int]:
        return {"vocab_size": self.vocab_size} | ({"outputs": len(self.classes)} if self.classes is not None else {})

    @cached_property
    def mean_length(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return float(self._rows("train").lengths.mean()) * (2 if self.objective == "pairs" else 1)

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

    def _rows(self, split: str) -> Rows:
        if split not in self._made_rows:
            self._made_rows[split] = self._make_rows(split)
        return self._made_rows[split]

    @cached_property
    def _made_rows(self) -> dict[str, Rows]:
        return {}

    def _make_rows(self, split: str) -> Rows:
        with np.load(self.folder / f"{split}.npz", allow_pickle=False) as arrays:
            sequences = Sequences(arrays["tokens"], arrays["ends"], arrays.get("labels"))
        masking = None
        if self.objective == "mask":
            # One seed for all evaluations, so that runs are judged by the same hidden tokens.
            masking = masking_of(self.tokenizer, self.seed if split == "train" else 0, self.context_length)
        keep_last = isinstance(self.tokenizer, PretrainedTokenizer) and self.objective != "next"
        return Rows(sequences, self.objective, self.context_length, self.packing, masking, keep_last)


class Rows:
    """Samples of one part by number; keys are an order's rows (sample, width, number of the sample over all epochs)."""

    def __init__(
        self, sequences: Sequences, objective: Objective, context_length: int, packing: bool, masking: Masking | None, keep_last: bool
    ) -> None:
        self.objective, self.masking, self.packing = objective, masking, packing
        self.tokens, self.labels = sequences.tokens, sequences.labels
        starts, lengths = sequences.starts, sequences.ends - sequences.starts
        if objective in ("next", "mask"):
            starts, lengths = _pieces(starts, lengths, context_length)
        # A text that is cut keeps its last token, an end mark, where the tokenizer puts one.
        self.cut_to = context_length if keep_last else None
        self.piece_starts, self.piece_lengths = starts, np.minimum(lengths, context_length)
        self.lasts = starts + lengths - 1
        count = 2 if objective == "pairs" else 1
        self.members = [[i * count + k for k in range(count)] for i in range(len(starts) // count)]
        self.lengths = self.piece_lengths.reshape(-1, count).max(axis=1) if len(starts) else self.piece_lengths
        if packing:
            self.members = packed(self.piece_lengths, context_length)
            self.lengths = np.array([self.piece_lengths[row].sum() for row in self.members], dtype=np.int64)

    def __getitems__(self, keys: Starts) -> Batch:
        return self.read(keys[:, 0], int(keys[0, 1]), keys[:, 2])

    def read(self, samples: Ints, width: int, numbers: Sequence[int] | Ints) -> Batch:
        """The batch of these samples (−1: none, it fills the batch up), ``width`` tokens wide."""
        count = 2 if self.objective == "pairs" else 1
        B = len(samples) * count
        tokens = np.zeros((B, width), np.int64)
        documents = np.full((B, width), PADDING, np.int64)
        positions = np.zeros((B, width), np.int64)
        targets = np.full((B, width), IGNORED, np.int64)
        labels = np.full(B, IGNORED, np.int64)
        for row, sample in enumerate(samples.tolist()):
            if sample < 0:
                continue
            filled = 0
            for document, piece in enumerate(self.members[sample]):
                at, first = (row, filled) if count == 1 else (row * 2 + document, 0)
                start, n = self.piece_starts[piece], int(self.piece_lengths[piece])
                inside = slice(first, first + n)
                ids = self.tokens[start : start + n]
                tokens[at, inside] = ids
                if n == self.cut_to:
                    tokens[at, first + n - 1] = self.tokens[self.lasts[piece]]
                documents[at, inside] = document if count == 1 else 0
                positions[at, inside] = np.arange(n)
                if self.objective == "next":
                    targets[at, first : first + n - 1] = ids[1:]
                elif self.objective == "tags" and self.labels is not None:
                    targets[at, inside] = self.labels[start : start + n]
                elif self.objective == "label" and self.labels is not None:
                    labels[at] = self.labels[piece]
                filled += n
        batch = {"tokens": torch.from_numpy(tokens), "documents": torch.from_numpy(documents)}
        if self.packing:
            batch["positions"] = torch.from_numpy(positions)
        if self.masking is not None:
            return {**batch, **self.masking(batch["tokens"], batch["documents"] != PADDING, numbers)}
        if self.objective == "label":
            return {**batch, "labels": torch.from_numpy(labels)}
        return batch if self.objective == "pairs" else {**batch, "targets": torch.from_numpy(targets)}


class ByLength:
    """A fresh random order each epoch in which a batch's texts are of like length, so that little of it is padding.

    The epoch's random permutation is cut into pools of 16 batches; each is sorted by length, cut into batches, and these are shuffled.
    Rows are (sample, width of its batch, number of the sample over all epochs).
    """

    def __init__(self, lengths: Ints, batch_size: int, seed: int, pad_to: int, longest: int) -> None:
        self.n_samples, self.told = len(lengths), f"the training part has only {len(lengths)} samples"
        self.lengths, self.batch_size, self.seed, self.pad_to, self.longest = lengths, batch_size, seed, pad_to, longest

    def starts(self, epoch: int) -> Starts:
        generator = np.random.default_rng([self.seed, epoch])
        steps = self.n_samples // self.batch_size
        chosen = generator.permutation(self.n_samples)[: steps * self.batch_size]
        pool = np.arange(len(chosen)) // (self.batch_size * _POOL)
        batches = chosen[np.lexsort((self.lengths[chosen], pool))].reshape(steps, self.batch_size)
        batches = batches[np.lexsort((generator.random(steps), np.arange(steps) // _POOL))]
        widths = _rounded(self.lengths[batches].max(axis=1, initial=1), self.pad_to, self.longest)
        numbers = epoch * self.n_samples + np.arange(len(chosen))
        return np.stack((batches.ravel(), widths.repeat(self.batch_size), numbers), axis=1)


class EvalRows:
    """A whole part as ready batches of texts of like length, in random order, so that the first few are a fair sample of it: every text once,
    whatever ``batch_size`` and ``data_world``. The end is filled up."""

    def __init__(self, rows: Rows, batch_size: int, data_rank: int, data_world: int, pad_to: int, longest: int) -> None:
        self.rows, self.batch_size, self.data_rank, self.data_world = rows, batch_size, data_rank, data_world
        order = np.argsort(-rows.lengths, kind="stable")
        size = batch_size * data_world
        self._samples = np.full(-(-len(order) // size) * size, -1, np.int64)
        self._samples[: len(order)] = order
        self._widths = _rounded(rows.lengths[order[::size]], pad_to, longest)
        self._turns = np.random.default_rng(0).permutation(len(self._widths))

    def __len__(self) -> int:
        return len(self._widths)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        index = int(self._turns[index])
        first = (index * self.data_world + self.data_rank) * self.batch_size
        samples = self._samples[first : first + self.batch_size]
        return self.rows.read(samples, int(self._widths[index]), np.maximum(samples, 0))


def packed(lengths: Ints, longest: int) -> list[list[int]]:
    """Which sequences share a row of at most ``longest`` tokens: best fit, the longest first."""
    rows: list[list[int]] = []
    free: dict[int, list[int]] = {}  # tokens left -> rows
    sizes: list[int] = []  # the keys of `free`, ascending
    for piece in np.argsort(-lengths, kind="stable").tolist():
        n = int(lengths[piece])
        at = bisect_left(sizes, n)
        if at == len(sizes):
            row, left = len(rows), longest
            rows.append([])
        else:
            left = sizes[at]
            row = free[left].pop()
            if not free[left]:
                del free[left], sizes[at]
        rows[row].append(piece)
        if left > n:
            if left - n not in free:
                free[left - n] = []
                insort(sizes, left - n)
            free[left - n].append(row)
    return rows


def _pieces(starts: Ints, lengths: Ints, longest: int) -> tuple[Ints, Ints]:
    """Texts longer than ``longest`` as several."""
    counts = np.maximum(1, -(-lengths // longest))
    owner = np.repeat(np.arange(len(starts)), counts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    return starts[owner] + number * longest, np.minimum(lengths[owner] - number * longest, longest)


def _rounded(widths: Ints, multiple: int, longest: int) -> Ints:
    """Up to a multiple, but not beyond ``longest``, what the model can read."""
    return np.minimum(-(-widths // multiple) * multiple, longest)


# --- from texts to arrays


def _check(examples: Examples, objective: Objective) -> None:
    if not examples.texts:
        raise ConfigError("there are no texts", "data.source")
    if objective in ("label", "tags") and examples.labels is None:
        raise ConfigError("this task learns from labels, and the data has none", "data.label_column", fix="Name the column that holds them")
    if objective == "pairs" and examples.partners is None:
        raise ConfigError("this task learns from pairs, and the data has none", "data.pair_column", fix="Name the column of the other half")
    for split, need in (("train", "to train on"), ("val", "to validate on")):
        if split not in examples.splits:
            raise ConfigError(f"no example is left {need}, of {len(examples.texts)} in all", "data.validation_fraction")


def _train_tokenizer(examples: Examples, train: list[int], kind: str, vocab_size: int, masked: bool) -> Tokenizer:
    def joined(members: Sequence[int]) -> str:
        return "\n".join(text for i in members for text in (examples.texts[i], *([examples.partners[i]] if examples.partners else [])))

    return train_tokenizer(kind, joined(range(len(examples.texts))), joined(train), vocab_size, masked)


def _classes_of(examples: Examples, train: list[int], objective: Objective, wanted: Sequence[str] | None) -> list[str] | None:
    """The classes; ConfigError for a label outside them, at the place where it stands."""
    if objective not in ("label", "tags") or examples.labels is None:
        return None
    labels = [label.split() if objective == "tags" else [label] for label in examples.labels]
    classes = class_names((label for i in train for label in labels[i]), wanted)
    known = set(classes)
    for i, own in enumerate(labels):
        strange = next((label for label in own if label not in known), None)
        if strange is not None:
            shown = ", ".join(classes[:10]) + (f" and {len(classes) - 10} more" if len(classes) > 10 else "")
            whose = "the classes given" if wanted is not None else "those of the training part"
            raise ConfigError(
                f"{examples.place(i)} has the label {strange}, which is none of {whose} ({shown})",
                "data.classes" if wanted is not None else "data.label_column",
                fix="Correct it, or name all classes in data.classes.",
            )
    if len(classes) < 2:
        raise ConfigError(f"there is only one class, {classes[0]}: nothing to tell apart", "data.label_column")
    return classes


def _encoded(
    examples: Examples, members: list[int], tokenizer: Tokenizer, unknown: Unknown, objective: Objective, classes: list[str] | None
) -> dict[str, npt.NDArray[Any]]:
    texts = [examples.texts[i] for i in members]
    if objective == "pairs":
        assert examples.partners is not None
        texts = [text for i in members for text in (examples.texts[i], examples.partners[i])]
    if objective == "tags":
        assert examples.labels is not None and classes is not None
        return _tagged(examples, members, tokenizer, unknown, classes)
    ids = _ids(texts, tokenizer, unknown, marks=objective != "next")
    arrays = _joined(ids, tokenizer)
    if objective == "label":
        assert examples.labels is not None and classes is not None
        arrays["labels"] = np.array([classes.index(examples.labels[i]) for i in members], dtype=np.int64)
    return arrays


def _ids(texts: list[str], tokenizer: Tokenizer, unknown: Unknown, marks: bool) -> list[npt.NDArray[Any]]:
    """Of each text the ids, with the begin and end marks of a pretrained tokenizer where it has some."""
    if isinstance(tokenizer, CharTokenizer):  # at once, so that what is unknown is told once
        return np.split(tokenizer.encode("".join(texts), unknown), np.cumsum([len(text) for text in texts])[:-1]) if texts else []
    if isinstance(tokenizer, PretrainedTokenizer) and marks:
        return [np.asarray(encoding.ids) for encoding in tokenizer.model.encode_batch(texts)]
    return [tokenizer.encode(text, unknown) for text in texts]


def _joined(ids: list[npt.NDArray[Any]], tokenizer: Tokenizer) -> dict[str, npt.NDArray[Any]]:
    ids = [own if len(own) else np.zeros(1, np.int64) for own in ids]  # a text that has no tokens still is a sample
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    tokens = np.concatenate(ids).astype(dtype) if ids else np.zeros(0, dtype)
    return {"tokens": tokens, "ends": np.cumsum([len(own) for own in ids], dtype=np.int64)}


def _tagged(
    examples: Examples, members: list[int], tokenizer: Tokenizer, unknown: Unknown, classes: list[str]
) -> dict[str, npt.NDArray[Any]]:
    """Words between spaces, each with a tag at its last token: there a decoder, too, has read all of it."""
    sequences: list[npt.NDArray[Any]] = []
    tags: list[Ints] = []
    for i in members:
        words, own = examples.texts[i].split(), examples.labels[i].split()  # pyright: ignore[reportOptionalSubscript]
        if len(words) != len(own):
            raise ConfigError(
                f"{examples.place(i)} has {len(words)} words and {len(own)} tags",
                "data.label_column",
                fix="Give each word one tag, with spaces between them.",
            )
        ids = [tokenizer.encode(word if k == 0 else f" {word}", unknown) for k, word in enumerate(words)]
        marks = [np.full(len(piece), IGNORED, np.int64) for piece in ids]
        for mark, tag in zip(marks, own, strict=True):
            mark[-1:] = classes.index(tag)
        sequences.append(np.concatenate(ids))
        tags.append(np.concatenate(marks))
    return {**_joined(sequences, tokenizer), "labels": np.concatenate(tags) if tags else np.zeros(0, np.int64)}
