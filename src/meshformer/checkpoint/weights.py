"""Weights from a checkpoint into a model, by name; adapters of low rank (model/lora.py), alone in a file or merged into the weights."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from meshformer.config.errors import ConfigError
from meshformer.config.foreign import read_config
from meshformer.config.paths import run_of
from meshformer.model.lora import ADAPTERS, add_adapters, merged, transposed
from meshformer.record.run_folder import new_folder

from .read import SHOWN, Foreign, misfits, read_into, read_tensors, refuse_misfits, tensor_sizes

ADAPTER_CONFIG, ADAPTER_WEIGHTS, OF_PEFT = "adapter_config.json", "adapter_model.safetensors", "base_model.model."  # of peft's folders
PREFIX, AVERAGE = "model.", "average."  # of the names of weights, and of their averages over the training steps (callbacks.EMA)
Shapes = Mapping[str, torch.Size]
NameMap = dict[str, str | None]  # {name in the model: name in the checkpoint, or None where the model's own value is kept}


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
    """Copies the checkpoint's weights into `model`, whose parameters may be DTensors. Each process reads the pieces it holds; processes do not
    communicate.

    Args:
        partial: `model` is a part of the model that was saved (a pipeline rank's), so the checkpoint may hold further weights.
        whole: with `partial`, the names in the whole model; weights of the checkpoint with other names are then refused.
        aliases: {name in the model: name in the checkpoint} for weights that the checkpoint lacks under the model's name, such as the tied
            head of a pipeline rank that does not hold the embedding.
        new: patterns of names. A parameter that matches keeps its value where the checkpoint lacks it or has it in another shape. Adapters
            keep theirs only where the checkpoint lacks them.
        reinit: patterns of names. A parameter that matches keeps its value in any case. None: the caller has no such setting to suggest.
        averaged: load the average over the training steps where the run saved one. False to continue training.

    ConfigError lists every weight that is missing, unknown to the model, or of another shape.
    """
    foreign = getattr(model, "foreign_tensors", None)  # reads a Hugging Face folder under its own names (huggingface/transformers_model.py)
    sizes = tensor_sizes(checkpoint, foreign)
    saved = {key.removeprefix(PREFIX): shape for key, (shape, _) in sizes.items() if key.startswith(PREFIX)}
    averages = {name for name in saved if AVERAGE + name in sizes} if averaged else set[str]()
    names, readable = match_names(model, saved, averages, aliases or {}, new, reinit or ())
    own: dict[str, Any] = model.state_dict(keep_vars=True)
    accepted = (set(whole) or readable.keys()) if partial else set(names.values())
    may_drop = getattr(model, "may_drop", lambda name: False)
    left_over = [name for name in readable.keys() - accepted if not (new and may_drop(name))]
    refuse_mismatch(checkpoint, own, names, readable, left_over, reinit)
    read_matched(checkpoint, own, names, averages, foreign)


def match_names(
    model: nn.Module, saved: Shapes, averages: Collection[str], aliases: Mapping[str, str], new: Sequence[str], reinit: Sequence[str]
) -> tuple[NameMap, dict[str, torch.Size]]:
    """Pass 1: finds for each name in the model's state dict the weight of the checkpoint that belongs there. The arguments are those of
    `load_weights`; `averages` are the names of weights whose average is read instead.

    Returns the name map, and those weights of `saved` that may be read: without the ones for which the model keeps its own value.
    """
    own: dict[str, Any] = model.state_dict(keep_vars=True)

    def fits(name: str, patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(aliases.get(name, name), pattern) for pattern in patterns)

    def replaceable(name: str) -> bool:
        return fits(name, new) and not fits(name, ADAPTERS)

    # The average is saved once for each parameter: under the second name of a tied parameter there are only the weights of the last step.
    averaged = {id(own[name]) for name in averages if name in own}
    outdated = {name for name, x in own.items() if id(x) in averaged or aliases.get(name) in averages} - set(averages)

    # `reinit`: the model's value is kept, under either name of a tied parameter.
    reinitialised = {id(p) for name, p in model.named_parameters() if fits(name, reinit)}
    kept = {name for name, x in own.items() if id(x) in reinitialised}
    readable = {name: shape for name, shape in saved.items() if name not in outdated | kept and not fits(name, reinit)}

    # `new`: the model's value is kept where the checkpoint has nothing to fill it with.
    kept |= {name for name in own if fits(name, new) and name not in readable}
    kept |= {name for name in own.keys() & readable.keys() if replaceable(name) and readable[name] != own[name].shape}
    readable = {name: shape for name, shape in readable.items() if not replaceable(name) or name in own.keys() - kept}

    names: NameMap = {}
    for name in own:
        names[name] = None if name in kept else name if name in readable else aliases.get(name, name)
    # Tied weights are one tensor with two names. Where the checkpoint lacks one of the names, the tensor is read from the other.
    found: dict[int, str] = {}
    for name, source in names.items():
        if source in readable:
            found.setdefault(id(own[name]), source)
    for name, source in names.items():
        if source is not None and source not in readable:
            names[name] = found.get(id(own[name]), source)
    return names, readable


def refuse_mismatch(
    checkpoint: Path,
    own: Mapping[str, Tensor],
    names: NameMap,
    readable: Shapes,
    left_over: Collection[str],
    reinit: Sequence[str] | None,
) -> None:
    """Pass 2: ConfigError, before anything is read, where a tensor of the model (`own`) has no weight of its shape in the checkpoint, or where
    weights of the checkpoint are `left_over`. The message suggests what to change."""
    shapes: dict[str, torch.Size] = {}
    for name, source in names.items():
        if source is not None and shapes.get(source) in (None, readable.get(source)):  # a shape that does not fit stays listed
            shapes[source] = own[name].shape
    problems = misfits(readable, shapes, left_over)
    if problems:
        unfilled = [name for name, shape in shapes.items() if readable.get(name) != shape]
        refuse_misfits(problems, f"the weights in {checkpoint} do not fit this model", _way_out(left_over, unfilled, reinit))


def read_matched(
    checkpoint: Path, own: Mapping[str, Tensor], names: NameMap, averages: Collection[str], foreign: Foreign | None = None
) -> None:
    """Pass 3: copies each weight, or its average, into the model's tensor. Tied weights are one tensor, which is read once."""
    remaining = {id(own[name]): (source, own[name]) for name, source in names.items() if source is not None}
    while remaining:
        batch = dict(remaining.values())  # two tensors that have the same weight in the checkpoint are read one after the other
        read_into(checkpoint, {(AVERAGE if source in averages else PREFIX) + source: x for source, x in batch.items()}, foreign)
        remaining = {key: (source, x) for key, (source, x) in remaining.items() if batch[source] is not x}


def _way_out(extra: Collection[str], unfilled: Collection[str], reinit: Sequence[str] | None) -> str:
    """What the user can change when weights of the checkpoint are left over (`extra`) or parameters of the model stay `unfilled`."""
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
    """One line for each difference between the shapes `saved` and the weights of `model`. A tied weight may have only one of its names."""
    own: dict[str, Any] = model.state_dict(keep_vars=True)
    there = {id(x) for name, x in own.items() if name in saved}
    wanted = {name: x.shape for name, x in own.items() if name in saved or id(x) not in there}
    return misfits(saved, wanted, saved.keys() - own.keys())


def weight_names(path: Path) -> list[str]:
    """Names of the weights in a checkpoint or in foreign weights, without reading them."""
    return [key.removeprefix(PREFIX) for key in tensor_sizes(path) if key.startswith(PREFIX)]


def read_weights(path: Path) -> dict[str, Tensor]:
    """Every weight by name, whole and on the CPU; its average where the run saved one."""
    return weights_of({**read_tensors(path, PREFIX), **read_tensors(path, AVERAGE)})


def weights_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same from all tensors of a checkpoint. An average is converted to the dtype of its weight."""
    weights = {key.removeprefix(PREFIX): x for key, x in tensors.items() if key.startswith(PREFIX)}
    averages = {key.removeprefix(AVERAGE): x for key, x in tensors.items() if key.startswith(AVERAGE)}

    def averaged(name: str, x: Tensor) -> Tensor:
        same = (first for first in averages if weights[first].shape == x.shape and torch.equal(weights[first], x))  # tied weights
        return averages.get(name if name in averages else next(same, ""), x).to(x.dtype)

    return {name: averaged(name, x) for name, x in weights.items()}


# --- adapters


def is_adapter(name: str) -> bool:
    return name.endswith((".lora_A", ".lora_B"))


def settings_of(source: Path) -> dict[str, Any] | None:
    """The setting `stage` of the run that the checkpoint `source` belongs to, if that run trained adapters; else None."""
    run = run_of(Path(source))
    stage = read_config(run)["stage"] if (run / "config.yaml").is_file() else {}
    lora = stage.get("lora")
    return stage if isinstance(lora, dict) and lora.get("rank") else None


def merge_adapters(source: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint by name. If it has adapters, they are merged into the weights."""
    weights = read_weights(source)
    if not any(map(is_adapter, weights)):
        return weights
    stage = settings_of(source)
    if stage is None:
        raise ConfigError(
            f"{source} has adapters and lies in no run, so their alpha is not known", fix="Keep it in checkpoints/ of its run."
        )
    return merged(weights, stage["lora"]["rank"], stage["lora"]["alpha"])


def write_adapters(source: Path, folder: Path, trained: tuple[str, ...] = ()) -> None:
    """Writes the adapters of a checkpoint into a new `folder` in the format of peft, with the parameters that match a pattern of `trained` (a new
    head) as its `modules_to_save`. ConfigError where the run trained no adapters."""
    stage = settings_of(source)
    if stage is None:
        raise ConfigError("the run trained no adapters (stage.lora.rank)", "run", str(source), fix="Use format=safetensors.")
    weights, lora = read_weights(source), stage["lora"]
    saved = {name: x for name, x in weights.items() if is_adapter(name) or any(fnmatchcase(name, one) for one in trained)}
    turned = transposed({name: x.shape for name, x in saved.items()}, lora["rank"])
    heads = sorted({peft_name(name).rpartition(".")[0] for name in saved if not is_adapter(name)})
    about = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(stage["init_from"]),
        "r": lora["rank"],
        "lora_alpha": lora["alpha"],
        "lora_dropout": 0.0,
        "target_modules": list(lora["targets"]),
        "fan_in_fan_out": bool(turned),
        "modules_to_save": heads or None,
        "bias": "none",
        "task_type": None,
        "inference_mode": True,
    }
    with new_folder(folder) as aside:
        (aside / ADAPTER_CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        tensors = {OF_PEFT + peft_name(name): x.contiguous() for name, x in _turned(saved, turned).items()}
        safetensors.torch.save_file(tensors, aside / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def _turned(tensors: Mapping[str, Tensor], layers: set[str]) -> dict[str, Tensor]:
    """The tensors with the adapters of `layers` transposed: peft's folders hold all of them alike."""
    return {name: x.T if is_adapter(name) and name.rpartition(".")[0] in layers else x for name, x in tensors.items()}


def peft_name(name: str) -> str:
    """A parameter's name in peft: of the model itself, without the prefix `net.` of huggingface/transformers_model.py."""
    name = name.removeprefix("net.")
    return f"{name}.weight" if is_adapter(name) else name


def load_adapters(model: nn.Module, path: Path) -> None:
    """Adds the adapters in `path` to `model`, which has none yet, and loads the other parameters stored there. In place.

    `path`: a folder as `write_adapters` and peft write it, or a file that `meshformer export format=adapter` wrote before it wrote folders.
    ConfigError where they do not fit.
    """
    lora, tensors = _adapter_folder(path, model) if path.is_dir() else _adapter_file(path)
    try:
        add_adapters(model, lora["rank"], lora["alpha"], lora["targets"], seed=0)
    except ValueError as error:
        raise ConfigError(f"the adapters in {path} do not fit this model: {error}") from None
    shapes = {name: p.shape for name, p in model.named_parameters()}
    tensors = _turned(tensors, transposed(shapes, lora["rank"]))
    wanted = {name: shape for name, shape in shapes.items() if is_adapter(name) or name in tensors}
    problems = misfits({name: x.shape for name, x in tensors.items()}, wanted, tensors.keys() - wanted.keys())
    refuse_misfits(problems, f"the adapters in {path} do not fit this model")
    model.load_state_dict(tensors, strict=False)


def _adapter_folder(folder: Path, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(settings as in stage.lora, tensors by our names) of a folder in peft's format."""
    try:
        about = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        stored = safetensors.torch.load_file(folder / ADAPTER_WEIGHTS)
        lora = {"rank": about["r"], "alpha": about["lora_alpha"], "targets": about["target_modules"]}
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise ConfigError(f"{folder} holds no adapters that can be read ({error})", fix="Name a folder that peft wrote.") from None
    other = {"use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "bias": "none"}
    usual = all(about.get(key, value) == value for key, value in other.items())
    if about.get("peft_type") != "LORA" or not isinstance(lora["targets"], list) or not usual:
        raise ConfigError(f"{folder} holds adapters of another kind than stage.lora", fix="Load them with peft.")
    prefix = "net." if any(name.startswith("net.") for name, _ in model.named_parameters()) else ""

    def ours(name: str) -> str:
        name = prefix + name.removeprefix(OF_PEFT)
        return name.removesuffix(".weight") if is_adapter(name.removesuffix(".weight")) else name

    return lora, {ours(name): x for name, x in stored.items()}


def _adapter_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safetensors.safe_open(path, "pt") as file:
        lora = json.loads((file.metadata() or {}).get("lora", "null"))
        if lora is None:
            raise ConfigError(f"{path} is no file of adapters", fix="Write a folder with meshformer export format=adapter.")
        return lora, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
