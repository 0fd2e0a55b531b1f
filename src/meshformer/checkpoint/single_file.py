"""Checkpoints as single files, for moving and publishing. `meshformer convert` makes them from the folders that training writes.

`.ckpt`           a whole checkpoint: torch.save of {"tensors": {name: tensor}, "rest": {…}}, the names as in the folder, read with weights_only=True
`.safetensors`    the weights alone, under the names of the model's parameters. Tied weights are stored once; the file's metadata list their
                  second names, and the reader here returns them under both.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from meshformer.config.errors import ConfigError

from .find import SINGLE, WEIGHTS
from .write import naming_the_cause, sync_folder

DAMAGED = (RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError, safetensors.SafetensorError)


def is_single(path: Path) -> bool:
    return Path(path).suffix in (SINGLE, WEIGHTS)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """(tensors by name, rest). `rest` is None for a .safetensors file. Tensors are memory-mapped: only the parts that are used are read.

    ConfigError when the file does not exist, is damaged or is of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path} is not there", fix="Name a file that `meshformer convert` made.")
    try:
        if path.suffix == WEIGHTS:
            with safetensors.safe_open(path, framework="pt") as file:
                tied = json.loads((file.metadata() or {}).get("tied", "{}"))
            weights = safetensors.torch.load_file(path)
            weights |= {name: weights[first] for name, first in tied.items()}
            return {f"model.{name}": x for name, x in weights.items()}, None
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return held["tensors"], held["rest"]
    except pickle.UnpicklingError as error:
        raise ConfigError(f"{path} {what_it_asks_for(error)}", fix="Name a file made by `meshformer convert`.") from None
    except DAMAGED as error:
        raise ConfigError(
            f"{path} cannot be read as a checkpoint ({_first_line(error)})", fix="Name a file made by `meshformer convert`."
        ) from error


def what_it_asks_for(error: pickle.UnpicklingError) -> str:
    """What a refused pickle would have called, in words. (torch's own message recommends loading it anyway.)"""
    found = re.search(r"(?:Unsupported|GLOBAL|global) (\w+\.[\w.]+)", str(error))
    asked = f"asks for {found[1]}, and a checkpoint holds tensors and plain values alone" if found else "cannot be read as one"
    return f"is no checkpoint of ours: it {asked}. It was not run"


def write_single(path: Path, tensors: Mapping[str, Tensor], rest: dict[str, Any]) -> None:
    """Writes a whole checkpoint into one file, which gets its name once it is complete."""
    # torch.save would write the whole storage of a view.
    whole = {key: x if x.untyped_storage().nbytes() == x.nbytes else x.clone() for key, x in tensors.items()}

    def write(aside: Path) -> None:
        with naming_the_cause(), open(aside, "wb") as file:
            torch.save({"tensors": whole, "rest": rest}, file)

    _atomically(path, write)


def write_weights(path: Path, tensors: Mapping[str, Tensor], tied: Mapping[str, str], about: Mapping[str, Any]) -> None:
    """Writes the tensors `model.*` as safetensors. `tied`: {second name: first name} of tied weights; `about`: further metadata, as JSON."""
    weights = {key.removeprefix("model."): x.contiguous() for key, x in tensors.items() if key.startswith("model.")}
    metadata = {"format": "pt", "names": json.dumps(list(weights)), "tied": json.dumps(dict(tied))}
    metadata |= {key: json.dumps(value) for key, value in about.items()}
    stored = {name: x for name, x in weights.items() if name not in tied}
    _atomically(path, lambda aside: safetensors.torch.save_file(stored, aside, metadata=metadata))


def tied_weights(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, str]:
    """{second name: first name} of the weights that a checkpoint holds under two names. The optimizer lists a parameter by its first name only."""
    listed = [name for state in rest["optimizer_states"] for group in state["param_groups"] for name in group["param_names"]]
    weights = {key.removeprefix("model."): x for key, x in tensors.items() if key.startswith("model.")}
    same = {
        name: next((first for first in listed if weights[first].shape == x.shape and torch.equal(weights[first], x)), None)
        for name, x in weights.items()
        if name not in listed
    }
    return {name: first for name, first in same.items() if first is not None}


def _atomically(path: Path, write: Callable[[Path], None]) -> None:
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    try:
        write(aside)
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
