"""From a corpus to token files on disk, once for each combination of settings, however many processes ask at the same time. No torch."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from meshformer.config.errors import ConfigError
from meshformer.data.corpus import Corpus
from meshformer.data.tokenizer import Tokenizer, Tokens, Unknown, load_tokenizer, train_tokenizer

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
_LAYOUT = 1  # of the folder; another number leaves folders of older versions unused


@dataclass(frozen=True)
class Prepared:
    """A folder named by the hash of its settings: ``{train,val,test}.npy`` (token ids), ``tokenizer.json`` and ``prepared.json``."""

    folder: Path

    @property
    def identity(self) -> str:
        """Equal strings: the same tokens from the same text."""
        return self.folder.name

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.folder / "tokenizer.json")

    @cached_property
    def text_bytes(self) -> dict[str, int]:
        """Split -> length of its text in UTF-8 bytes."""
        return json.loads((self.folder / "prepared.json").read_text(encoding="utf-8"))["text_bytes"]

    def tokens(self, split: str) -> Tokens:
        """Token ids of ``train``, ``val`` or ``test``, shape (n,), memory-mapped read-only."""
        return np.load(self.folder / f"{split}.npy", mmap_mode="r", allow_pickle=False)

    def bytes_per_token(self, split: str) -> float:
        """Text bytes a token stands for on average: bits per byte = nats per token / ln 2 / this."""
        return self.text_bytes[split] / len(self.tokens(split))


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
    """Tokenize ``source`` into a folder below ``cache``, or find the folder an earlier call left there.

    The text is split by characters: the first 90 % train, the next 5 % val, the last 5 % test.

    Args:
        tokenizer: ``char`` or ``bpe``; ``vocab_size`` matters to ``bpe`` alone.
        fixed_tokenizer: use this one and train none: fine-tuning must keep the ids its weights were trained with.
        mask: the tokenizer that is trained gets a mask token.
        unknown: ``error`` or ``replace`` characters that a fixed character tokenizer does not know (see ``tokenizer.py``).

    Raises ConfigError for text that is missing, unreadable or too short, and for characters a fixed tokenizer does not know.
    """
    settings: dict[str, Any] = {"layout": _LAYOUT, "source": source.identity()}
    settings |= tokenizer_settings(tokenizer, vocab_size, fixed_tokenizer, unknown, mask)

    def build(folder: Path) -> None:
        text = source.text()
        texts = _split(text)
        chosen = fixed_tokenizer if fixed_tokenizer is not None else train_tokenizer(tokenizer, text, texts["train"], vocab_size, mask)
        for split, part in texts.items():
            np.save(folder / f"{split}.npy", chosen.encode(part, unknown))
        chosen.save(folder / "tokenizer.json")
        about = {"text_bytes": {split: len(part.encode("utf-8", "surrogatepass")) for split, part in texts.items()}}
        (folder / "prepared.json").write_text(json.dumps(about), encoding="utf-8")

    return Prepared(built_once(settings, cache, build))


def tokenizer_settings(kind: str, vocab_size: int, fixed: Tokenizer | None, unknown: Unknown, mask: bool) -> dict[str, Any]:
    """What the cache key must say of the tokenizer."""
    if fixed is not None:
        return {"tokenizer": fixed.to_json(), "unknown": unknown}
    return {"tokenizer": kind, "vocab_size": vocab_size if kind == "bpe" else None} | ({"mask": True} if mask else {})


def built_once(settings: dict[str, Any], cache: str | Path, build: Callable[[Path], None]) -> Path:
    """The folder below ``cache`` that is named by the hash of ``settings``; if it is not there yet, ``build`` fills it, once, however many
    processes ask at the same time."""
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(cache).expanduser() / "prepared" / key
    if folder.is_dir():  # without a lock, and in a read-only cache too: a folder appears by rename, complete
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                _build(folder, build)
    except OSError as error:
        raise ConfigError(f"cannot write the data cache ({error})", "paths.data", cache, "Name a folder you may write to") from error
    return folder


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    log.info("preparing tokens in %s", folder)
    for leftover in folder.parent.glob(f".{folder.name}-*"):  # of a process killed while it held our lock
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        build(temporary)
        temporary.chmod(0o755)  # mkdtemp makes it private; a cache may be shared
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after the rename there is nothing left to remove


def _split(text: str) -> dict[str, str]:
    if not text:
        raise ConfigError("the text is empty", "data.source", fix="Give a file or a dataset with text in it")
    first, second = len(text) * 90 // 100, len(text) * 95 // 100
    parts = (text[:first], text[first:second], text[second:])
    if min(map(len, parts)) < 2:  # a model predicts a token from the one before: two are the least that can be scored
        message = f"{len(text)} characters are too few: 5 % of them are kept for validation and 5 % for testing"
        raise ConfigError(message, "data.source", fix="Use 40 or more")
    return dict(zip(SPLITS, parts, strict=True))
