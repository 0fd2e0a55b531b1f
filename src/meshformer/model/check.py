"""Checks of the model settings, before torch is imported. A `Problem` holds the arguments of a ConfigError; command/check.py raises it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from .settings import PARTS

RANGES = {  # (minimum, inclusive, maximum, inclusive), read by command/check.py
    "model.init_std": (0, True, math.inf, False),
    "model.norm_eps": (0, True, 1, False),
    "model.dropout": (0, True, 1, False),
}


class Problem(NamedTuple):
    message: str
    key: str
    value: Any = None
    fix: str | None = None


def problems(model: Mapping[str, Any], declared: Callable[[str, str], Any]) -> Iterator[Problem]:
    """The errors in the `model` node of a class with `usual_settings`. `declared(target, name)`: a class attribute, read from the source file."""
    yield from _parts(model)
    yield from _sizes(model)
    yield from _positions(model, bool(declared(str(model.get("position", {}).get("_target_", "")), "needs_even_heads")))
    if model.get("head_transform"):
        for key, value in {"norm_position": "post", "head": True}.items():
            if model.get(key, value) != value:
                yield Problem(f"belongs to models with model.{key}={str(value).lower()}", "model.head_transform", "true", "Leave it out.")


def _parts(model: Mapping[str, Any]) -> Iterator[Problem]:
    for key in ("attention", "position"):
        if key in model and not isinstance(model[key], dict):
            yield Problem("needs a _target_: the dotted name of a class or function", f"model.{key}", model[key])


def _sizes(model: Mapping[str, Any]) -> Iterator[Problem]:
    width, heads, kv_heads = (model.get(key) for key in ("d_model", "n_heads", "n_kv_heads"))
    for key in ("n_layers", "n_heads", "n_kv_heads", "d_model", "d_ff", "context_length", "vocab_size", "window"):
        if model.get(key) is not None and model[key] < 1:
            yield Problem("must be at least 1", f"model.{key}", model[key])
    if width is not None and heads is not None and width % heads and model.get("head_dim") is None:
        below, above = width // heads * heads, (width // heads + 1) * heads
        usable = f"{below} or {above}" if below else f"{above}"
        yield Problem(f"does not divide by model.n_heads={heads}", "model.d_model", width, f"Use {usable}, or another number of heads.")
    if kv_heads is not None and heads is not None and heads % kv_heads:
        divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        yield Problem(f"model.n_heads={heads} does not divide by it", "model.n_kv_heads", kv_heads, f"Use one of {divisors}.")


def _positions(model: Mapping[str, Any], even: bool) -> Iterator[Problem]:
    width, heads, head_dim = (model.get(key) for key in ("d_model", "n_heads", "head_dim"))
    if even and head_dim is not None and head_dim % 2:
        yield Problem("rotary positions need an even head size", "model.head_dim", head_dim, f"Use {head_dim + 1}.")
    if even and width is not None and heads is not None and head_dim is None and width // heads % 2:
        message = f"rotary positions need an even head size, and model.d_model={width} / model.n_heads={heads} is {width // heads}"
        yield Problem(message, "model.n_heads", heads, f"Use model.d_model={width + heads}, or model/position=learned.")


def misnamed(model: Mapping[str, Any], key: str, patterns: Sequence[str]) -> Iterator[Problem]:
    """The `patterns` of the setting `key` that match no parameter. Only the first parts of the names are checked: the rest needs the built model."""
    for pattern in patterns:
        part, _, rest = pattern.partition(".")
        if not set(part) & set("*?[") and part not in PARTS:  # a wildcard may match dots too
            yield Problem("no parameter has such a name", key, pattern, f"Names begin with {', '.join(PARTS)}.")
        number = rest.partition(".")[0]
        if part == "blocks" and not set(number) & set("*?") and not any(fnmatchcase(str(n), number) for n in range(model["n_layers"])):
            yield Problem("there is no such block", key, pattern, f"Use 0 to {model['n_layers'] - 1}, or blocks.*.")
