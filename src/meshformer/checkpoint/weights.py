"""Weights from a checkpoint into a model, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .folder import misfits, read_into, read_tensors, refuse_misfits, tensor_sizes

PREFIX, AVERAGE = "model.", "average."  # of the keys of weights, and of their averages over the training steps (callbacks.EMA)


def load_weights(
    model: nn.Module,
    checkpoint: Path,
    partial: bool = False,
    aliases: Mapping[str, str] | None = None,
    new: tuple[str, ...] = (),
    reinit: Sequence[str] = (),
    averaged: bool = True,
) -> None:
    """Copies the checkpoint's weights into `model`, whose parameters may be DTensors; each process reads its pieces, no communication.

    Where the run kept an average of its weights, that is taken, unless `averaged` is False (to go on training).

    `partial`: the model is a part of the one that was saved (a pipeline rank's), so the checkpoint may hold more. `aliases` are {own name: name
    in the checkpoint} for names that the checkpoint lacks: the head of a tied model, say, where it is held without the embedding.
    `new`: patterns of names of parameters that keep the values they have where the checkpoint's are of another shape or not there.
    `reinit`: patterns of names of parameters that keep them in any case.
    ConfigError lists every tensor that is missing, extra or of another shape.
    """
    aliases, sizes = aliases or {}, tensor_sizes(checkpoint)
    saved = {key.removeprefix(PREFIX): size for key, (size, _) in sizes.items() if key.startswith(PREFIX)}
    own: dict[str, Any] = model.state_dict(keep_vars=True)
    averages = {name for name in saved if AVERAGE + name in sizes} if averaged else set()
    if averages:  # they are there for each parameter once: under the second name of a tied one lie the last step's weights
        averaged_ids = {id(own[name]) for name in averages & own.keys()}
        second = {name for name, x in own.items() if id(x) in averaged_ids or aliases.get(name) in averages} - averages
        saved = {name: size for name, size in saved.items() if name not in second}

    def fits(name: str, patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(aliases.get(name, name), pattern) for pattern in patterns)

    kept = {id(p) for name, p in model.named_parameters() if fits(name, reinit)}
    drawn = {name for name, x in own.items() if id(x) in kept}
    saved = {name: size for name, size in saved.items() if name not in drawn and not fits(name, reinit)}
    drawn |= {name for name, x in own.items() if fits(name, new) and (name not in saved or tuple(saved[name]) != tuple(x.shape))}
    own = {name: x for name, x in own.items() if name not in drawn}
    saved = {name: size for name, size in saved.items() if name in own or not fits(name, new)}
    source = {name: name if name in saved else aliases.get(name, name) for name in own}
    # Of a parameter with two names (tied weights) one is enough.
    found = {id(x) for name, x in own.items() if source[name] in saved}
    wanted = {source[name]: x for name, x in own.items() if source[name] in saved or id(x) not in found}
    extra = [] if partial else saved.keys() - wanted.keys()
    problems = misfits(saved, {name: x.shape for name, x in wanted.items()}, extra)
    refuse_misfits(problems, f"the weights in {checkpoint} do not fit this model")
    once = {id(x): name for name, x in wanted.items()}
    read_into(checkpoint, {(AVERAGE if name in averages else PREFIX) + name: wanted[name] for name in once.values()})


def read_weights(path: Path) -> dict[str, Tensor]:
    """Every weight by name, whole and on the CPU; its average where the run kept one."""
    return weights_of({**read_tensors(path, PREFIX), **read_tensors(path, AVERAGE)})


def weights_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same from all of a checkpoint's tensors by key. Each has the type that it was trained in."""
    weights = {key.removeprefix(PREFIX): x for key, x in tensors.items() if key.startswith(PREFIX)}
    averages = {key.removeprefix(AVERAGE): x for key, x in tensors.items() if key.startswith(AVERAGE)}

    def averaged(name: str, x: Tensor) -> Tensor:
        same = (first for first in averages if weights[first].shape == x.shape and torch.equal(weights[first], x))  # tied weights
        return averages.get(name if name in averages else next(same, ""), x).to(x.dtype)

    return {name: averaged(name, x) for name, x in weights.items()}
