"""Adapters of low rank (model/lora.py) in checkpoints: alone in a file, or merged into the weights they belong to."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor, nn

from meshformer.config.errors import ConfigError
from meshformer.config.foreign import read_config
from meshformer.config.paths import run_of
from meshformer.model.lora import add_adapters, merged

from .folder import misfits, refuse_misfits
from .single_file import write_weights
from .weights import read_weights


def is_adapter(name: str) -> bool:
    return name.endswith((".lora_A", ".lora_B"))


def settings_of(source: Path) -> dict[str, Any] | None:
    """`stage` of the run that the checkpoint `source` lies in, where it trained adapters; None elsewhere."""
    run = run_of(Path(source))
    stage = read_config(run)["stage"] if (run / "config.yaml").is_file() else {}
    lora = stage.get("lora")
    return stage if isinstance(lora, dict) and lora.get("rank") else None


def merge_adapters(source: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint by name, its adapters, if it has any, merged into them."""
    weights = read_weights(source)
    if not any(map(is_adapter, weights)):
        return weights
    stage = settings_of(source)
    if stage is None:
        raise ConfigError(
            f"{source} has adapters and lies in no run, so their alpha is not known", fix="Keep it in checkpoints/ of its run."
        )
    return merged(weights, stage["lora"]["alpha"])


def write_adapters(source: Path, target: Path, trained: tuple[str, ...] = ()) -> None:
    """The adapters of a checkpoint alone, as safetensors, with what they were made for in the metadata, and all parameters whose names fit one
    of the patterns `trained` (a new head). ConfigError where the run trained no adapters."""
    stage = settings_of(source)
    if stage is None:
        raise ConfigError("the run trained no adapters (stage.lora.rank)", "run", str(source), fix="Use format=safetensors.")
    tensors = {f"model.{name}": x for name, x in read_weights(source).items() if is_adapter(name) or any(fnmatchcase(name, one) for one in trained)}
    write_weights(target, tensors, {}, {"lora": stage["lora"], "init_from": stage["init_from"]})


def load_adapters(model: nn.Module, path: Path) -> None:
    """Gives `model`, which has none, the adapters that `write_adapters` wrote, and its values to the rest that is there. In place.

    ConfigError where they do not fit.
    """
    with safetensors.safe_open(path, "pt") as file:
        lora = json.loads((file.metadata() or {}).get("lora", "null"))
        if lora is None:
            raise ConfigError(f"{path} is no file of adapters", fix="Write one with meshformer export format=adapter.")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
    add_adapters(model, lora["rank"], lora["alpha"], lora["targets"], seed=0)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    wanted = {name: shape for name, shape in shapes.items() if is_adapter(name) or name in tensors}
    problems = misfits({name: x.shape for name, x in tensors.items()}, wanted, tensors.keys() - wanted.keys())
    refuse_misfits(problems, f"the adapters in {path} do not fit this model")
    model.load_state_dict(tensors, strict=False)
