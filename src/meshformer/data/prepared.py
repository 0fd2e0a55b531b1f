"""Tokenizes a corpus into files on disk, once for each combination of settings, also when several processes start at once. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from meshformer.config.errors import ConfigError
from meshformer.data.checked import built_once
from meshformer.data.corpus import Corpus, TextFiles
from meshformer.data.records import TFRecords
from meshformer.data.streamed import Stream, write_tokens
from meshformer.data.tokenizer import BpeTokenizer, CharTokenizer, IdTokenizer, Tokenizer, Tokens, Unknown, load_tokenizer

SPLITS = ("train", "val", "test")
_LAYOUT = 1  # version of the folder's format; part of the cache key


@dataclass(frozen=True)
class Prepared:
    """A folder named by the hash of its settings: ``{train,val,test}.npy`` (token ids), ``tokenizer.json``, ``prepared.json``
    and ``checksums.json``."""

    folder: Path

    @property
    def identity(self) -> str:
        """A string that identifies the text and its tokens."""
        return self.folder.name

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.folder / "tokenizer.json")

    @cached_property
    def text_bytes(self) -> dict[str, int]:
        """Split -> length of its text in UTF-8 bytes; empty where the tokens stand for no text."""
        return json.loads((self.folder / "prepared.json").read_text(encoding="utf-8"))["text_bytes"]

    def tokens(self, split: str) -> Tokens:
        """Token ids of ``train``, ``val`` or ``test``, shape (n,), memory-mapped read-only."""
        return np.load(self.folder / f"{split}.npy", mmap_mode="r", allow_pickle=False)

    def bytes_per_token(self, split: str) -> float | None:
        """Mean UTF-8 bytes of text in a token. Bits per byte = nats per token / ln 2 / bytes per token. None for ids without a text."""
        return self.text_bytes[split] / len(self.tokens(split)) if split in self.text_bytes else None


def prepare(
    source: Corpus,
    *,
    tokenizer: str,
    vocab_size: int,
    cache: str | Path,
    fixed_tokenizer: Tokenizer | None = None,
    unknown: Unknown = "error",
    mask: bool = False,
) -> Prepared:
    """Tokenize ``source`` into a folder below ``cache``, or return the folder that an earlier call wrote.

    The text is split by characters: the first 90 % train, the next 5 % val, the last 5 % test; or as ``source.lengths`` says. A source with
    ``holds_ids`` has token ids instead of text, which are split in the same way.

    Args:
        tokenizer: ``char`` or ``bpe``; ``vocab_size`` is used by ``bpe`` only.
        fixed_tokenizer: use this one instead of training one: fine-tuning needs the token ids of pretraining.
        mask: add a mask token to the tokenizer that is trained.
        unknown: ``error`` or ``replace`` characters that a fixed character tokenizer does not know (see ``tokenizer.py``).

    Raises ConfigError for text that is missing, unreadable or too short, and for characters a fixed tokenizer does not know.
    """
    identity = source.identity(cache) if isinstance(source, TextFiles) else source.identity()
    settings: dict[str, Any] = {"layout": _LAYOUT, "source": identity}
    settings |= tokenizer_settings(tokenizer, vocab_size, fixed_tokenizer, unknown, mask)

    def build(folder: Path) -> None:
        if isinstance(source, TFRecords) and source.holds_ids:
            _write_ids(folder, source, fixed_tokenizer, mask)
            return
        stream = Stream(source)
        bounds = _bounds(stream.length, getattr(source, "lengths", None))
        chosen = fixed_tokenizer
        if chosen is None and tokenizer == "char":
            chosen = CharTokenizer(stream.characters, mask)  # of the whole text, so that validation has no unknown characters
        elif chosen is None and tokenizer == "bpe":
            chosen = BpeTokenizer.train(stream.part(*bounds["train"]), vocab_size, mask)
        elif chosen is None:
            raise ConfigError("no such tokenizer", "data.tokenizer", tokenizer, "Use char or bpe")
        text_bytes: dict[str, int] = {}

        def counted(split: str) -> Iterator[str]:
            text_bytes[split] = 0
            for piece in stream.part(*bounds[split]):
                text_bytes[split] += len(piece.encode("utf-8", "surrogatepass"))
                yield piece

        for split in SPLITS:
            write_tokens(folder / f"{split}.npy", chosen.encode_pieces(counted(split), unknown), chosen.vocab_size)
        chosen.save(folder / "tokenizer.json")
        about = {"text_bytes": text_bytes}
        (folder / "prepared.json").write_text(json.dumps(about), encoding="utf-8")

    return Prepared(built_once(settings, cache, build))


def tokenizer_settings(kind: str, vocab_size: int, fixed: Tokenizer | None, unknown: Unknown, mask: bool) -> dict[str, Any]:
    """The settings of the tokenizer that the cache key must contain."""
    if fixed is not None:
        return {"tokenizer": fixed.to_json(), "unknown": unknown}
    return {"tokenizer": kind, "vocab_size": vocab_size if kind == "bpe" else None} | ({"mask": True} if mask else {})


def _bounds(length: int, parts: dict[str, int] | None = None, unit: str = "characters") -> dict[str, tuple[int, int]]:
    """Split -> (index of its first character, index after its last). ``parts``: the lengths of the parts, in this order; without a part ``test``,
    the second half of ``val`` is it."""
    if not length:
        raise ConfigError("the text is empty", "data.source", fix="Give a file or a dataset with text in it")
    if parts is None:
        first, second = length * 90 // 100, length * 95 // 100
    else:
        first = parts["train"] if "val" in parts else parts["train"] * 95 // 100
        second = length - parts["test"] if "test" in parts else (first + length) // 2
    bounds = ((0, first), (first, second), (second, length))
    if min(end - begin for begin, end in bounds) < 2:  # a loss needs at least two tokens: one to predict the other from
        if parts is not None:
            raise ConfigError(f"a part of the data has fewer than two {unit}", "data.validation_files", fix="Give it longer files.")
        message = f"{length} {unit} are too few: 5 % of them are kept for validation and 5 % for testing"
        raise ConfigError(message, "data.source", fix="Use 40 or more")
    return dict(zip(SPLITS, bounds, strict=True))


def _write_ids(folder: Path, source: TFRecords, fixed: Tokenizer | None, mask: bool) -> None:
    """The files of prepared data, from token ids. They count bytes of text where the tokenizer is one of text."""
    chosen = source.tokenizer
    if fixed is not None and fixed.to_json() != chosen.to_json():
        if not isinstance(chosen, IdTokenizer) or chosen.vocab_size > fixed.vocab_size:
            message = "the ids of these files are of another tokenizer than the model's"
            raise ConfigError(message, "data.tokens_feature", source.features["tokens"], "Name a feature with text.")
        chosen = fixed
    if mask and chosen.mask_id is None:
        if not isinstance(chosen, IdTokenizer):
            raise ConfigError("the tokenizer of these ids has no mask token", "data.tokens_feature", fix="Use task=language_modelling.")
        chosen = IdTokenizer(chosen.size, mask)
    lengths = source.lengths
    bounds = _bounds(sum(map(len, source.id_pieces())), lengths, "ids")
    text_bytes: dict[str, int] = {}

    def part(split: str) -> Iterator[Tokens]:
        at, (first, end) = 0, bounds[split]
        for ids in source.id_pieces():
            own = ids[max(first - at, 0) : max(end - at, 0)]
            at += len(ids)
            if len(own):
                if not isinstance(chosen, IdTokenizer):
                    text_bytes[split] = text_bytes.get(split, 0) + len(chosen.decode(own).encode("utf-8", "surrogatepass"))
                yield own

    for split in SPLITS:
        write_tokens(folder / f"{split}.npy", part(split), chosen.vocab_size)
    chosen.save(folder / "tokenizer.json")
    (folder / "prepared.json").write_text(json.dumps({"text_bytes": text_bytes}), encoding="utf-8")
