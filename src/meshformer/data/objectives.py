"""Datasets of short texts, one class (a subclass of ``Reader``) for each training objective. ``READERS`` lists them by name.

A reader's class methods turn texts into arrays, once, when the data is prepared. An instance makes batches from the arrays of one part (train,
val or test).

Shapes: B rows in a batch, T time. ``documents`` (B, T) numbers the texts in a row and is PADDING where there is none: attention never crosses
from one text to another and ignores padding. Positions start at 0 in every text.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from meshformer.config.errors import ConfigError
from meshformer.data.labelled import Examples, class_names
from meshformer.data.masking import masking_of
from meshformer.data.tokenizer import CharTokenizer, PretrainedTokenizer, Tokenizer, Unknown
from meshformer.data.windows import IGNORED, Batch, Starts

PADDING = -1  # in `documents`
Objective = Literal["next", "mask", "label", "tags", "pairs"]
Ints = npt.NDArray[np.int64]
Arrays = dict[str, npt.NDArray[Any]]  # tokens of all texts, one after the other; `ends`, where each text ends; `labels`, if there are any


class Reader:
    """The samples of one split. A sample is one text, truncated to ``context_length``; subclasses define the targets.

    Args:
        arrays: as ``encoded`` returns them.
        packing: several texts share a row. Only ``StretchReader`` can do that.
        seed: for random choices within a sample (masking).

    ``lengths``: the number of tokens of each sample, of its longest row where it has several.
    """

    rows_per_sample = 1
    masks = False  # whether the objective needs a mask token
    marks = True  # whether a pretrained tokenizer adds its begin and end tokens to each text

    # --- from texts to arrays

    @classmethod
    def check(cls, examples: Examples) -> None:
        """ConfigError where the examples lack the labels or pairs that this objective needs."""

    @classmethod
    def classes_of(cls, examples: Examples, train: list[int], wanted: Sequence[str] | None) -> list[str] | None:
        """The names of the classes, None where the objective has none. ``train``: numbers of the training examples."""
        return None

    @classmethod
    def encoded(cls, examples: Examples, members: list[int], tokenizer: Tokenizer, unknown: Unknown, classes: list[str] | None) -> Arrays:
        """The arrays of the examples with the numbers ``members``."""
        return joined(token_ids([examples.texts[i] for i in members], tokenizer, unknown, cls.marks), tokenizer)

    # --- from arrays to batches

    def __init__(self, arrays: Arrays, context_length: int, tokenizer: Tokenizer, packing: bool = False, seed: int = 0) -> None:
        self.tokens, self.labels, self.packing = arrays["tokens"], arrays.get("labels"), packing
        ends: Ints = arrays["ends"]
        self.sizes = np.minimum(np.diff(ends, prepend=0), context_length)  # of each text
        self.starts = ends - np.diff(ends, prepend=0)
        # A truncated text keeps its end token, if the tokenizer adds one.
        keeps_mark = self.marks and isinstance(tokenizer, PretrainedTokenizer)
        self.lasts = (ends if keeps_mark else self.starts + self.sizes) - 1  # index of the last token of each text
        self.rows = [[text] for text in range(len(ends))]
        self.lengths = self.sizes.reshape(-1, self.rows_per_sample).max(axis=1)

    def __getitems__(self, keys: Starts) -> Batch:
        """``keys``: rows (sample, width of the batch, number of the sample over all epochs), as the order gives them."""
        return self.read(keys[:, 0], int(keys[0, 1]), keys[:, 2])

    def read(self, samples: Ints, width: int, numbers: Sequence[int] | Ints) -> Batch:
        """The batch of these samples, ``width`` tokens wide. A sample of −1 is a row of padding."""
        rows = (samples[:, None] * self.rows_per_sample + np.arange(self.rows_per_sample)).ravel()
        shape = len(rows), width
        tokens, documents, positions = np.zeros(shape, np.int64), np.full(shape, PADDING, np.int64), np.zeros(shape, np.int64)
        for b, row in enumerate(rows.tolist()):
            first = 0
            for document, text in enumerate(self.rows[row] if row >= 0 else ()):
                start, n = self.starts[text], int(self.sizes[text])
                place = slice(first, first + n)
                tokens[b, place] = self.tokens[start : start + n]
                tokens[b, first + n - 1] = self.tokens[self.lasts[text]]
                documents[b, place] = document
                positions[b, place] = np.arange(n)
                first += n
        batch = {"tokens": torch.from_numpy(tokens), "documents": torch.from_numpy(documents)}
        if self.packing:
            batch["positions"] = torch.from_numpy(positions)
        return batch | self.targets(batch, samples, numbers)

    def targets(self, batch: Batch, samples: Ints, numbers: Sequence[int] | Ints) -> Batch:
        """The entries of the batch beside ``tokens`` and ``documents``; they may replace ``tokens``."""
        raise NotImplementedError(f"{type(self).__name__} must define this method")


# --- every token is a target


class StretchReader(Reader):
    """Base class for objectives that do not need a text whole: a long text is split into several samples, and several texts may share a row."""

    def __init__(self, arrays: Arrays, context_length: int, tokenizer: Tokenizer, packing: bool = False, seed: int = 0) -> None:
        super().__init__(arrays, context_length, tokenizer, packing, seed)
        ends: Ints = arrays["ends"]
        self.starts, self.sizes = stretches(self.starts, ends - self.starts, context_length)
        self.lasts = self.starts + self.sizes - 1
        self.rows, self.lengths = [[stretch] for stretch in range(len(self.sizes))], self.sizes
        if packing:
            self.rows = packed(self.sizes, context_length)
            self.lengths = np.array([self.sizes[row].sum() for row in self.rows], dtype=np.int64)


class NextToken(StretchReader):
    """``targets`` (B, T): the next token of the same text, IGNORED at its last token."""

    marks = False

    def targets(self, batch: Batch, samples: Ints, numbers: Sequence[int] | Ints) -> Batch:
        tokens_BT, documents_BT = batch["tokens"].numpy(), batch["documents"].numpy()  # NumPy: torch takes longer at this size
        targets_BT = np.full_like(tokens_BT, IGNORED)
        same_text = (documents_BT[:, 1:] == documents_BT[:, :-1]) & (documents_BT[:, 1:] != PADDING)
        np.copyto(targets_BT[:, :-1], tokens_BT[:, 1:], where=same_text)
        return {"targets": torch.from_numpy(targets_BT)}


class MaskedTokens(StretchReader):
    """``targets`` (B, T): the masked tokens, IGNORED elsewhere. In ``tokens`` they are replaced (see ``Masking``)."""

    masks = True

    def __init__(self, arrays: Arrays, context_length: int, tokenizer: Tokenizer, packing: bool = False, seed: int = 0) -> None:
        super().__init__(arrays, context_length, tokenizer, packing, seed)
        self.masking = masking_of(tokenizer, seed, context_length)

    def targets(self, batch: Batch, samples: Ints, numbers: Sequence[int] | Ints) -> Batch:
        return self.masking(batch["tokens"], batch["documents"] != PADDING, numbers)


# --- labels


class LabelReader(Reader):
    """Base class for objectives with labels."""

    @staticmethod
    def labels_in(cell: str) -> list[str]:
        """The labels in one cell of the label column."""
        return [cell]

    @classmethod
    def check(cls, examples: Examples) -> None:
        if examples.labels is None:
            message = "this task learns from labels, and the data has none"
            raise ConfigError(message, "data.label_column", fix="Name the column that holds them")

    @classmethod
    def classes_of(cls, examples: Examples, train: list[int], wanted: Sequence[str] | None) -> list[str]:
        """The classes, by default those of the training examples. ConfigError for a label that is none of them, with its example."""
        labels = [cls.labels_in(cell) for cell in examples.labels or ()]
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


class TextLabels(LabelReader):
    """``labels`` (B,): the class of each text, IGNORED for rows of padding."""

    @classmethod
    def encoded(cls, examples: Examples, members: list[int], tokenizer: Tokenizer, unknown: Unknown, classes: list[str] | None) -> Arrays:
        assert examples.labels is not None and classes is not None
        labels = np.array([classes.index(examples.labels[i]) for i in members], dtype=np.int64)
        return {**super().encoded(examples, members, tokenizer, unknown, classes), "labels": labels}

    def targets(self, batch: Batch, samples: Ints, numbers: Sequence[int] | Ints) -> Batch:
        assert self.labels is not None
        return {"labels": torch.from_numpy(np.where(samples >= 0, self.labels[samples], IGNORED))}


class WordTags(LabelReader):
    """``targets`` (B, T): the class of each word at the word's last token, IGNORED elsewhere. Words are separated by spaces.

    At the last token a causal model has seen the whole word.
    """

    marks = False

    @staticmethod
    def labels_in(cell: str) -> list[str]:
        return cell.split()

    @classmethod
    def encoded(cls, examples: Examples, members: list[int], tokenizer: Tokenizer, unknown: Unknown, classes: list[str] | None) -> Arrays:
        assert examples.labels is not None and classes is not None
        texts: list[npt.NDArray[Any]] = []
        tags: list[Ints] = []
        for i in members:
            words, own = examples.texts[i].split(), cls.labels_in(examples.labels[i])
            if len(words) != len(own):
                raise ConfigError(
                    f"{examples.place(i)} has {len(words)} words and {len(own)} tags",
                    "data.label_column",
                    fix="Give each word one tag, with spaces between them.",
                )
            ids = [tokenizer.encode(word if k == 0 else f" {word}", unknown) for k, word in enumerate(words)]
            marks = [np.full(len(word), IGNORED, np.int64) for word in ids]
            for mark, tag in zip(marks, own, strict=True):
                mark[-1:] = classes.index(tag)
            texts.append(np.concatenate(ids))
            tags.append(np.concatenate(marks))
        return {**joined(texts, tokenizer), "labels": np.concatenate(tags) if tags else np.zeros(0, np.int64)}

    def targets(self, batch: Batch, samples: Ints, numbers: Sequence[int] | Ints) -> Batch:
        assert self.labels is not None
        targets = np.full(batch["tokens"].shape, IGNORED, np.int64)
        for b, text in enumerate(samples.tolist()):
            if text >= 0:
                start, n = self.starts[text], int(self.sizes[text])
                targets[b, :n] = self.labels[start : start + n]
        return {"targets": torch.from_numpy(targets)}


# --- pairs


class Pairs(Reader):
    """No targets: rows 2i and 2i + 1 of a batch are a pair, so a batch has twice as many rows as samples."""

    rows_per_sample = 2

    @classmethod
    def check(cls, examples: Examples) -> None:
        if examples.partners is None:
            raise ConfigError("this task learns from pairs, and the data has none", "data.pair_column", fix="Name the column of the other half")

    @classmethod
    def encoded(cls, examples: Examples, members: list[int], tokenizer: Tokenizer, unknown: Unknown, classes: list[str] | None) -> Arrays:
        assert examples.partners is not None
        texts = [text for i in members for text in (examples.texts[i], examples.partners[i])]
        return joined(token_ids(texts, tokenizer, unknown, cls.marks), tokenizer)

    def targets(self, batch: Batch, samples: Ints, numbers: Sequence[int] | Ints) -> Batch:
        return {}


READERS: dict[Objective, type[Reader]] = {
    "next": NextToken,
    "mask": MaskedTokens,
    "label": TextLabels,
    "tags": WordTags,
    "pairs": Pairs,
}


# --- tokens


def token_ids(texts: list[str], tokenizer: Tokenizer, unknown: Unknown, marks: bool) -> list[npt.NDArray[Any]]:
    """The ids of each text. With ``marks``, a pretrained tokenizer adds its begin and end tokens."""
    if isinstance(tokenizer, CharTokenizer):  # all texts in one call, so that unknown characters are reported once
        return np.split(tokenizer.encode("".join(texts), unknown), np.cumsum([len(text) for text in texts])[:-1]) if texts else []
    if isinstance(tokenizer, PretrainedTokenizer) and marks:
        return [np.asarray(encoding.ids) for encoding in tokenizer.model.encode_batch(texts)]
    return [tokenizer.encode(text, unknown) for text in texts]


def joined(ids: list[npt.NDArray[Any]], tokenizer: Tokenizer) -> Arrays:
    """The concatenated tokens, and the index where each text ends. An empty text becomes one token 0, so that it stays a sample."""
    ids = [own if len(own) else np.zeros(1, np.int64) for own in ids]
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    tokens = np.concatenate(ids).astype(dtype) if ids else np.zeros(0, dtype)
    return {"tokens": tokens, "ends": np.cumsum([len(own) for own in ids], dtype=np.int64)}


def stretches(starts: Ints, lengths: Ints, longest: int) -> tuple[Ints, Ints]:
    """(starts, lengths) of the pieces of at most ``longest`` tokens that the texts are divided into."""
    counts = np.maximum(1, -(-lengths // longest))
    owner = np.repeat(np.arange(len(starts)), counts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    return starts[owner] + number * longest, np.minimum(lengths[owner] - number * longest, longest)


def packed(lengths: Ints, longest: int) -> list[list[int]]:
    """Which texts share a row of at most ``longest`` tokens: best fit, the longest texts first."""
    rows: list[list[int]] = []
    free: dict[int, list[int]] = {}  # {free tokens: rows that have so many}
    sizes: list[int] = []  # the keys of `free`, ascending
    for text in np.argsort(-lengths, kind="stable").tolist():
        n = int(lengths[text])
        at = bisect_left(sizes, n)
        if at == len(sizes):
            row, left = len(rows), longest
            rows.append([])
        else:
            left = sizes[at]
            row = free[left].pop()
            if not free[left]:
                del free[left], sizes[at]
        rows[row].append(text)
        if left > n:
            if left - n not in free:
                free[left - n] = []
                insort(sizes, left - n)
            free[left - n].append(row)
    return rows
