"""Weights from a checkpoint into a model, by name."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from .folder import misfits, read_into, refuse_misfits, tensor_sizes


def load_weights(
    model: nn.Module, checkpoint: Path, partial: bool = False, aliases: Mapping[str, str] | None = None, new: tuple[str, ...] = ()
) -> None:
    """Copies the checkpoint's `model.*` tensors into `model`, whose parameters may be DTensors; each process reads its pieces, no communication.

    `partial`: the model is a part of the one that was saved (a pipeline rank's), so the checkpoint may hold more. `aliases` are {own name: name
    in the checkpoint} for names that the checkpoint lacks: the head of a tied model, say, where it is held without the embedding.
    `new`: patterns of names of parameters that keep the values they have where the checkpoint's are of another shape or not there.
    ConfigError lists every tensor that is missing, extra or of another shape.
    """
    saved = {key.removeprefix("model."): size for key, (size, _) in tensor_sizes(checkpoint).items() if key.startswith("model.")}
    own: dict[str, Any] = model.state_dict(keep_vars=True)
    if new:

        def may_differ(name: str) -> bool:
            return any(fnmatchcase(name, pattern) for pattern in new)

        fresh = {name for name, x in own.items() if may_differ(name) and (name not in saved or tuple(saved[name]) != tuple(x.shape))}
        own = {name: x for name, x in own.items() if name not in fresh}
        saved = {name: size for name, size in saved.items() if name in own or not may_differ(name)}
    source = {name: name if name in saved else (aliases or {}).get(name, name) for name in own}
    # Of a parameter with two names (tied weights) one is enough.
    found = {id(x) for name, x in own.items() if source[name] in saved}
    wanted = {source[name]: x for name, x in own.items() if source[name] in saved or id(x) not in found}
    extra = [] if partial else saved.keys() - wanted.keys()
    problems = misfits(saved, {name: x.shape for name, x in wanted.items()}, extra)
    refuse_misfits(problems, f"the weights in {checkpoint} do not fit this model")
    once = {id(x): name for name, x in wanted.items()}
    read_into(checkpoint, {f"model.{name}": wanted[name] for name in once.values()})
