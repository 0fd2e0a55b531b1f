"""Weights from a checkpoint into a model, by name."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from meshformer.model.lora import ADAPTERS

from .folder import SHOWN, misfits, read_into, read_tensors, refuse_misfits, tensor_sizes

PREFIX, AVERAGE = "model.", "average."  # of the keys of weights, and of their averages over the training steps (callbacks.EMA)


def load_weights(
    model: nn.Module,
    checkpoint: Path,
    partial: bool = False,
    aliases: Mapping[str, str] | None = None,
    new: tuple[str, ...] = (),
    reinit: Sequence[str] | None = None,
    averaged: bool = True,
    whole: Collection[str] = (),
) -> None:
    """Copies the checkpoint's weights into `model`, whose parameters may be DTensors; each process reads its pieces, no communication.

    Where the run kept an average of its weights, that is taken, unless `averaged` is False (to go on training).

    `partial`: the model is a part of the one that was saved (a pipeline rank's), so the checkpoint may hold more: what `whole`, the names in the
    whole model, lists, or anything without it. `aliases` are {own name: name in the checkpoint} for names that the checkpoint lacks: the head
    of a tied model, say, where it is held without the embedding.
    `new`: patterns of names of parameters that keep the values they have where the checkpoint's are of another shape or not there (adapters: not
    there; those that the checkpoint has are never left behind).
    `reinit`: patterns of names of parameters that keep them in any case; None where the caller has no way to say so.
    ConfigError lists every tensor that is missing, extra or of another shape.
    """
    again = reinit or ()
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

    def replaced(name: str) -> bool:
        """The checkpoint's is left behind for a new one."""
        return fits(name, new) and not fits(name, ADAPTERS)

    kept = {id(p) for name, p in model.named_parameters() if fits(name, again)}
    drawn = {name for name, x in own.items() if id(x) in kept}
    saved = {name: size for name, size in saved.items() if name not in drawn and not fits(name, again)}
    drawn |= {name for name in own if fits(name, new) and name not in saved}
    drawn |= {name for name, x in own.items() if replaced(name) and name in saved and tuple(saved[name]) != tuple(x.shape)}
    own = {name: x for name, x in own.items() if name not in drawn}
    saved = {name: size for name, size in saved.items() if name in own or not replaced(name)}
    source = {name: name if name in saved else aliases.get(name, name) for name in own}
    # Of a parameter with two names (tied weights) one is enough.
    found = {id(x) for name, x in own.items() if source[name] in saved}
    wanted = {source[name]: x for name, x in own.items() if source[name] in saved or id(x) not in found}
    extra = saved.keys() - (set(whole) or saved.keys() if partial else wanted.keys())
    shapes = {name: x.shape for name, x in wanted.items()}
    problems = misfits(saved, shapes, extra)
    if problems:
        unfilled = [name for name, shape in shapes.items() if saved.get(name) != shape]
        refuse_misfits(problems, f"the weights in {checkpoint} do not fit this model", _way_out(extra, unfilled, reinit))
    once = {id(x): name for name, x in wanted.items()}
    read_into(checkpoint, {(AVERAGE if name in averages else PREFIX) + name: wanted[name] for name in once.values()})


def _way_out(extra: Collection[str], unfilled: Collection[str], reinit: Sequence[str] | None) -> str:
    """What to do about tensors that nobody takes (`extra`) and parameters that nothing fills."""
    if any(fnmatchcase(name, pattern) for name in (*extra, *unfilled) for pattern in ADAPTERS):
        return "Merge that run's adapters first (meshformer export format=safetensors) and start from the file, or use its stage.lora settings."
    if extra or reinit is None:
        return "use the model settings that the run was trained with"
    patterns = list(dict.fromkeys([*reinit, *(re.sub(r"\.\d+\.", ".*.", name) for name in unfilled)]))
    if len(patterns) > SHOWN:
        return "use the model settings that the run was trained with, or name with stage.reinit what is to be drawn anew"
    listed = ",".join(f'"{pattern}"' for pattern in patterns)
    return f"To draw them anew, add 'stage.reinit=[{listed}]'; else use the model settings that the run was trained with."


def misfits_of(model: nn.Module, saved: Mapping[str, torch.Size]) -> list[str]:
    """What keeps tensors of the shapes `saved` from being exactly the weights of `model`, in words. Of tied weights one name is enough."""
    own: dict[str, Any] = model.state_dict(keep_vars=True)
    there = {id(x) for name, x in own.items() if name in saved}
    wanted = {name: x.shape for name, x in own.items() if name in saved or id(x) not in there}
    return misfits(saved, wanted, saved.keys() - own.keys())


def weight_names(path: Path) -> list[str]:
    """Names of the weights of a checkpoint or of foreign ones, without reading them."""
    return [key.removeprefix(PREFIX) for key in tensor_sizes(path) if key.startswith(PREFIX)]


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
