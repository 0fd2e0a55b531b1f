"""Four tokenizers with one interface: ``encode``, ``decode``, ``vocab_size``, ``to_json``, ``save``. Imports no torch.

- ``CharTokenizer``: one token a character, ids in code point order. It has no unknown token, whose row of the embedding would
  never be trained. A character outside the vocabulary raises ConfigError; with ``unknown="replace"`` it becomes ``?`` (the
  vocabulary's first character where it has no ``?``), with a warning.
- ``BpeTokenizer``: byte-level byte-pair encoding; every text can be encoded, and decodes to itself.
- ``PretrainedTokenizer``: the tokenizer.json of a pretrained model.
- ``IdTokenizer``: ids without a meaning, shown as numbers.
"""

from __future__ import annotations

import json
import logging
import os
import re
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from meshformer.config.errors import ConfigError

log = logging.getLogger(__name__)

Tokens = npt.NDArray[np.unsignedinteger[Any]]
Unknown = Literal["error", "replace"]
MASK, MASK_SHOWN = "[MASK]", "\ufffd"
CUT, LONGEST = 1 << 16, 1 << 22  # characters in a piece for `tokenizers`: usually, and at most
BATCH, ALONE = 32, 4  # pieces in a batch; batches that are encoded in this process before workers are started
REMEMBERED, TOGETHER = 100_000, 4000  # words: size of the cache, and encoded in one call
UNCUT, SIDE = 1 << 23, 200  # a pretrained tokenizer: characters encoded in one call, and compared on each side of a possible cut
# Whitespace and the word after it. The byte-level pre-tokenizer always splits before whitespace that follows another character. It uses Unicode's
# whitespace; Python's \s also matches four control characters.
_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_WORD = re.compile(f"[{_SPACE}]*[^{_SPACE}]+|[{_SPACE}]+")
A = TypeVar("A")
B = TypeVar("B")


class Tokenizer(Protocol):
    """The interface of all tokenizers."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def mask_id(self) -> int | None:
        """The id of the mask token for masked language modelling; None where the vocabulary has none."""
        ...

    def encode(self, text: str, unknown: Unknown = "error") -> Tokens:
        """Token ids, shape (n,), uint16 where the vocabulary fits into it and uint32 otherwise."""
        ...

    def encode_pieces(self, pieces: Iterable[str], unknown: Unknown = "error") -> Iterator[Tokens]:
        """Yield the ids of the concatenated pieces in parts, computed on all cores. They do not depend on where the text was cut."""
        ...

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str: ...

    def to_json(self) -> str:
        """The tokenizer as JSON; equal tokenizers give equal strings."""
        ...

    def save(self, path: str | Path) -> None: ...


class CharTokenizer:
    """One token a character. ``characters`` is the vocabulary, in the order of the ids; ``mask`` adds a mask token after them."""

    def __init__(self, characters: str, mask: bool = False) -> None:
        if not characters or len(set(characters)) != len(characters):
            raise ValueError("a vocabulary is a non-empty string of distinct characters")
        self.characters, self.mask_id = characters, len(characters) if mask else None
        self._points = code_points(characters)
        # Code point -> id. The dtype has room for the ids and a marker for unknown; the last entry is used for all code points beyond the table.
        self._absent, self._stand_in = len(characters) + 1, max(characters.find("?"), 0)
        self._table = np.full(int(self._points.max()) + 2, self._absent, dtype=token_type(self._absent + 1))
        self._table[self._points] = np.arange(len(characters))
        self._shown = np.append(self._points, code_points(MASK_SHOWN)) if mask else self._points

    @classmethod
    def train(cls, text: str, mask: bool = False) -> CharTokenizer:
        """The distinct characters of ``text``, sorted by code point."""
        return cls("".join(sorted(set(text))), mask)

    @property
    def vocab_size(self) -> int:
        return len(self._shown)

    def encode(self, text: str, unknown: Unknown = "error") -> Tokens:
        """Raises ConfigError naming the most frequent characters outside the vocabulary, unless ``unknown="replace"``."""
        ids, outside = self._encoded(text)
        self._tell(outside, unknown)
        return ids

    def encode_pieces(self, pieces: Iterable[str], unknown: Unknown = "error") -> Iterator[Tokens]:
        outside: Counter[str] = Counter()
        for ids, own in in_order(self._encoded, pieces):
            outside.update(own)
            yield ids
        self._tell(outside, unknown)  # after the last piece, when all are counted

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        return self._shown[np.asarray(ids, dtype=np.int64)].tobytes().decode("utf-32-le", "surrogatepass")

    def to_json(self) -> str:
        mask = {} if self.mask_id is None else {"mask": True}
        return json.dumps({"kind": "char", "characters": self.characters, **mask})

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json(), encoding="utf-8")

    def _encoded(self, text: str) -> tuple[Tokens, Counter[str]]:
        """(ids, with unknown characters replaced; count of each unknown character)."""
        ids = self._table[np.minimum(code_points(text), len(self._table) - 1)]
        outside: Counter[str] = Counter()
        if len(ids) and ids.max() == self._absent:
            strange = ids == self._absent
            outside.update(code_points(text)[strange].tobytes().decode("utf-32-le", "surrogatepass"))
            ids[strange] = self._stand_in
        return ids.astype(token_type(self.vocab_size), copy=False), outside

    def _tell(self, outside: Counter[str], unknown: Unknown) -> None:
        if not outside:
            return
        named = ", ".join(f"{character!r} ({count} times)" for character, count in outside.most_common(5))
        more = f" and {len(outside) - 5} more" if len(outside) > 5 else ""
        message = f"the text has characters outside the tokenizer's {len(self.characters)}: {named}{more}"
        if unknown == "error":
            raise ConfigError(message, fix="Remove them, or pretrain with data.tokenizer=bpe, which knows every character")
        log.warning("%s; each becomes %r", message, self.characters[self._stand_in])


class BpeTokenizer:
    """Byte-level byte-pair encoding by the ``tokenizers`` library. ``model`` is the JSON of a ``tokenizers.Tokenizer``."""

    def __init__(self, model: str) -> None:
        from tokenizers import Tokenizer as Model

        self._model = Model.from_str(model)

    @classmethod
    def train(cls, text: str | Iterable[str], vocab_size: int, mask: bool = False) -> BpeTokenizer:
        """Train the merges on ``text``, a string or its consecutive pieces. A short text may give fewer than ``vocab_size`` entries. ``mask`` adds a
        mask token after them."""
        from tokenizers import Tokenizer as Model
        from tokenizers import decoders, models, pre_tokenizers, trainers

        if vocab_size < 256:
            raise ConfigError("byte-level BPE starts from 256 bytes", "data.vocab_size", vocab_size, "Use at least 256")
        model = Model(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes, so that every text can be encoded
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False, special_tokens=[])
        model.train_from_iterator(_pieces((text,) if isinstance(text, str) else text), trainer)
        if mask:
            model.add_special_tokens([MASK])
        return cls(model.to_str())

    @property
    def vocab_size(self) -> int:
        return self._model.get_vocab_size()

    @property
    def mask_id(self) -> int | None:
        return self._model.token_to_id(MASK)

    def encode(self, text: str, unknown: Unknown = "error") -> Tokens:
        """``unknown`` has no effect: a byte-level vocabulary covers every text."""
        return np.concatenate([np.zeros(0, token_type(self.vocab_size)), *self.encode_pieces((text,))])

    def encode_pieces(self, pieces: Iterable[str], unknown: Unknown = "error") -> Iterator[Tokens]:
        # A lone surrogate (a prompt in a broken locale) cannot be encoded as UTF-8.
        whole = (piece.encode("utf-8", "replace").decode("utf-8") for piece in pieces)
        memory: dict[str, bytes] = {}
        batches = iter(_batches(_pieces(whole), BATCH))
        for batch in islice(batches, ALONE):
            yield self.encode_batch(batch, memory)
        if (batch := next(batches, None)) is None:
            return
        from meshformer.data.workers import MOST, Workers

        count = min(cores(), MOST)
        with Workers(self, memory, count) as workers:
            yield from in_order(workers.encode, chain((batch,), batches), count)

    def encode_batch(self, pieces: list[str], memory: dict[str, bytes]) -> Tokens:
        """The concatenated ids of the pieces. ``memory`` caches the ids of words: most words recur, and a look-up is ten times as fast as merging
        the bytes again."""
        dtype = np.dtype(token_type(self.vocab_size))
        words = [word for piece in pieces for word in _WORD.findall(piece)]
        if len(memory) > REMEMBERED:
            memory.clear()
        for new in _batches(set(words).difference(memory), TOGETHER):
            for word, encoding in zip(new, self._model.encode_batch_fast(new), strict=True):
                memory[word] = array(dtype.char, encoding.ids).tobytes()
        return np.frombuffer(b"".join(map(memory.__getitem__, words)), dtype)

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        """Invalid UTF-8, such as part of a character, becomes U+FFFD."""
        return self._model.decode(np.asarray(ids, dtype=np.int64).tolist(), skip_special_tokens=False)

    def to_json(self) -> str:
        return json.dumps({"kind": "bpe", "model": json.loads(self._model.to_str())})

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json(), encoding="utf-8")


class PretrainedTokenizer:
    """The tokenizer of a pretrained model, as the ``tokenizers`` library writes it (``tokenizer.json`` of a Hugging Face folder); its ids are kept.

    ``encode`` gives the ids of running text: special tokens ([CLS], padding) and truncation are left out. ``model`` is the library's
    tokenizer, which can add them.
    """

    def __init__(self, model: str) -> None:
        from tokenizers import Tokenizer as Model

        self.model = Model.from_str(model)
        self.model.no_padding()
        self.model.no_truncation()

    @property
    def vocab_size(self) -> int:
        return self.model.get_vocab_size()

    @property
    def mask_id(self) -> int | None:
        return next((found for name in (MASK, "<mask>") if (found := self.model.token_to_id(name)) is not None), None)

    @property
    def special_ids(self) -> tuple[int, ...]:
        """The ids of the special tokens: begin, end, padding, …"""
        return tuple(i for i, token in self.model.get_added_tokens_decoder().items() if token.special)

    def encode(self, text: str, unknown: Unknown = "error") -> Tokens:
        """``unknown`` has no effect: the tokenizer uses its own unknown token."""
        text = text.encode("utf-8", "replace").decode("utf-8")
        return np.asarray(self.model.encode(text, add_special_tokens=False).ids, token_type(self.vocab_size))

    def encode_pieces(self, pieces: Iterable[str], unknown: Unknown = "error") -> Iterator[Tokens]:
        """A short text is encoded in one call. A longer one is cut where encoding both sides separately gives the same tokens as together, since no
        rule for cutting holds for every tokenizer."""
        rest, parts = "", iter(pieces)
        for part in parts:
            rest += part
            if len(rest) > UNCUT:
                break
        else:
            yield self.encode(rest)
            return
        for batch in _batches(self._cut(chain((rest,), parts)), BATCH):
            encoded = self.model.encode_batch_fast(batch, add_special_tokens=False)
            yield np.concatenate([np.asarray(piece.ids, token_type(self.vocab_size)) for piece in encoded])

    def _cut(self, texts: Iterable[str]) -> Iterator[str]:
        rest, boundary = "", re.compile(r"(?<=\S)\s")
        for text in texts:
            rest, start = rest + text.encode("utf-8", "replace").decode("utf-8"), 0
            while True:
                places = islice(boundary.finditer(rest, start + CUT, max(len(rest) - SIDE, 0)), 20)
                end = next(
                    (m.start() for m in places if self._parts(rest[m.start() - SIDE : m.start()], rest[m.start() : m.start() + SIDE])), None
                )
                if end is None:
                    break
                yield rest[start:end]
                start = end
            rest = rest[start:]
        yield rest

    def _parts(self, left: str, right: str) -> bool:
        both, first, second = (self.model.encode(text, add_special_tokens=False).ids for text in (left + right, left, right))
        return both == first + second

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        return self.model.decode(np.asarray(ids, dtype=np.int64).tolist(), skip_special_tokens=False)

    def to_json(self) -> str:
        return json.dumps({"kind": "pretrained", "model": json.loads(self.model.to_str())})

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json(), encoding="utf-8")


class IdTokenizer:
    """Ids that come without a tokenizer: a text is numbers with spaces between them. ``mask`` adds a mask token after ``size`` ids."""

    def __init__(self, size: int, mask: bool = False) -> None:
        self.size, self.mask_id = size, size if mask else None

    @property
    def vocab_size(self) -> int:
        return self.size + (self.mask_id is not None)

    def encode(self, text: str, unknown: Unknown = "error") -> Tokens:
        """Raises ConfigError for what is no id, with any ``unknown``: no other id could stand for it."""
        for word in text.split():
            if not word.isdecimal() or int(word) >= self.size:
                message = f"{word!r} is no token: the data holds ids, here numbers from 0 to {self.size - 1}"
                raise ConfigError(message, fix="Write ids with spaces between them, for example '3 1 4'.")
        return np.array([int(word) for word in text.split()], token_type(self.vocab_size))

    def encode_pieces(self, pieces: Iterable[str], unknown: Unknown = "error") -> Iterator[Tokens]:
        yield self.encode("".join(pieces), unknown)

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        return " ".join(MASK if i == self.mask_id else str(i) for i in np.asarray(ids, dtype=np.int64).tolist())

    def to_json(self) -> str:
        return json.dumps({"kind": "ids", "size": self.size} | ({} if self.mask_id is None else {"mask": True}))

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json(), encoding="utf-8")


def train_tokenizer(kind: str, text: str, train_text: str, vocab_size: int, mask: bool = False) -> Tokenizer:
    """``char``: the characters of the whole ``text``, so that validation has no unknown ones. ``bpe``: merges learnt from ``train_text`` only."""
    if kind == "char":
        return CharTokenizer.train(text, mask)
    if kind == "bpe":
        return BpeTokenizer.train(train_text, vocab_size, mask)
    raise ConfigError("no such tokenizer", "data.tokenizer", kind, "Use char or bpe")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read what ``save`` wrote, or a Hugging Face folder's ``tokenizer.json``; ConfigError where it is missing or holds no tokenizer."""
    try:
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        if "kind" not in saved and "model" in saved:  # a Hugging Face tokenizer.json
            return PretrainedTokenizer(json.dumps(saved))
        if saved["kind"] == "char":
            return CharTokenizer(saved["characters"], saved.get("mask", False))
        if saved["kind"] == "bpe":
            return BpeTokenizer(json.dumps(saved["model"]))
        if saved["kind"] == "pretrained":
            return PretrainedTokenizer(json.dumps(saved["model"]))
        if saved["kind"] == "ids":
            return IdTokenizer(int(saved["size"]), saved.get("mask", False))
        raise ValueError(f"kind {saved['kind']!r}")
    except FileNotFoundError as error:
        raise ConfigError(f"there is no tokenizer at {path}") from error
    except Exception as error:  # `tokenizers` raises bare Exception for a model it cannot read
        raise ConfigError(f"{path} does not hold a tokenizer ({type(error).__name__}: {error})") from error


def code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def token_type(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def _pieces(texts: Iterable[str], size: int = CUT, longest: int = LONGEST) -> Iterator[str]:
    """Yield the concatenated ``texts`` in pieces for parallel encoding in bounded memory. A cut is made before whitespace that follows another
    character, where the byte-level pre-tokenizer always splits, so the tokens are those of the whole text. Only where there is no such place
    within ``longest`` characters is the text cut elsewhere."""
    boundary = re.compile(r"(?<=\S)\s")
    rest, looked = "", 0
    for text in texts:
        rest, start = rest + text, 0
        while True:
            match = boundary.search(rest, max(start + size, looked))
            if match is None and len(rest) - start < longest:
                break
            end = min(match.start(), start + longest) if match else start + longest
            yield rest[start:end]
            start = looked = end
        rest = rest[start:]
        looked = len(rest)
    if rest:
        yield rest


def _batches(items: Iterable[A], size: int) -> Iterator[list[A]]:
    batch: list[A] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(work: Callable[[A], B], items: Iterable[A], threads: int | None = None) -> Iterator[B]:
    """Yield ``work(item)`` for each item, in order. Threads compute a few items ahead of the consumer."""
    threads = threads or cores()
    waiting: deque[Future[B]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
