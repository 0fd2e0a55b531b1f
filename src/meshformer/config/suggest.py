"""Suggestions for misspelt words, phrased the same way in every message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

LISTED = 12


def did_you_mean(word: Any, known: Iterable[Any]) -> str | None:
    """Return `Did you mean X?` for the closest known word, else `Choose from a, b, c.`; None if `known` is empty.

    Dotted words are compared whole and by their last part, so that both `optimizr.lr` and `trainer.lr` find `optimizer.lr`.
    """
    words = sorted({str(item) for item in known})
    if not words:
        return None
    text = str(word)
    close = difflib.get_close_matches(text.lower(), [w.lower() for w in words], n=1, cutoff=0.6)
    if close:
        return f"Did you mean {next(w for w in words if w.lower() == close[0])}?"
    last = text.rpartition(".")[2]
    same_ending = [w for w in words if "." in text and w.rpartition(".")[2] == last]
    if same_ending:
        return f"Did you mean {same_ending[0]}?"
    more = f", … ({len(words)} in all)" if len(words) > LISTED else ""
    return f"Choose from {', '.join(words[:LISTED])}{more}."
