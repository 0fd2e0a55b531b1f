"""A user's LightningDataModule in the place of `data` and LightningModule in that of `task`: their YAML as our settings. Without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from meshformer.config import ConfigError
from meshformer.config.schema import Data
from meshformer.config.signature import TargetNotFound, attribute, method, signature

Config = dict[str, Any]
SHARED = ("batch_size", "context_length", "workers", "file", "files")  # settings of `data` that a data module is given if it takes them
PLAIN = "meshformer.tasks.PlainTask"
OF_THE_MODULE = {"_target_": "meshformer.optim.of_the_module", "_partial_": True}


def settled(config: Config, overrides: Sequence[str]) -> Config:
    """Move the arguments of a data module to data.source, and make a plain LightningModule the model of PlainTask.

    `overrides` are those the user typed. Raises ConfigError for a class that is neither, and for an override that the module would not read.
    """
    config = _data(config) if "_target_" in _node(config, "data") else config
    return _task(config, overrides) if is_plain(str(_node(config, "task").get("_target_", ""))) else config


def _node(config: Config, name: str) -> Config:
    """The settings of a group, empty where the configuration, which is not validated yet, holds something else there."""
    found = config.get(name)
    return found if isinstance(found, dict) else {}


@contextmanager
def keys_as_typed(typed: Config, config: Config) -> Iterator[None]:
    """Context in which a ConfigError about `config` names the key that stands in the user's YAML, of which `typed` was composed."""
    moved = {}
    if "_target_" in _node(typed, "data"):
        moved["data.source."] = "data."
    if _node(config, "task").get("_target_") == PLAIN and config["task"] != typed["task"]:
        moved["model."] = "task."
    try:
        yield
    except ConfigError as error:
        here, there = next(((here, there) for here, there in moved.items() if (error.key or "").startswith(here)), ("", ""))
        if not here or error.key is None:
            raise
        raise ConfigError(error.message, there + error.key.removeprefix(here), error.value, error.fix and error.fix.replace(here, there)) from None


def is_plain(target: str) -> bool:
    """Whether `target` is a LightningModule with a training_step of its own, and no task of ours. Raises ConfigError for one without that method."""
    if target.startswith("meshformer.") or attribute(target, "objective") is not None or method(target, "configure_optimizers") is None:
        return False
    step = method(target, "training_step")
    if step is None or step.module.partition(".")[0] in ("lightning", "pytorch_lightning"):
        message = "is neither a task of this program nor a LightningModule with a training_step"
        raise ConfigError(message, "task._target_", target, fix="See docs/make_it_yours/task.md and docs/make_it_yours/lightning.md.")
    return True


def _data(config: Config) -> Config:
    data, known = config["data"], {field.name for field in dataclasses.fields(Data)}
    target = str(data["_target_"])
    try:
        taken = signature(target).parameters
    except TargetNotFound:
        taken = {}
    if taken and method(target, "train_dataloader") is None:
        fix = "A source of text goes under `source:` (docs/make_it_yours/data.md)."
        raise ConfigError("is no LightningDataModule: it has no train_dataloader", "data._target_", target, fix=fix)
    own = {name: value for name, value in data.items() if name not in known}
    own |= {name: data[name] for name in SHARED if name in taken and data.get(name) is not None}
    return {**config, "data": {**{name: value for name, value in data.items() if name in known}, "kind": "own", "source": own}}


def _task(config: Config, overrides: Sequence[str]) -> Config:
    target = config["task"]["_target_"]
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        part = key.replace("/", ".").partition(".")[0]
        if part in ("model", "optimizer", "schedule"):
            what = "its own network" if part == "model" else "its own optimizers (configure_optimizers)"
            raise ConfigError(f"{target} brings {what}", key, value or None, fix="Leave it out.")
    if _node(config, "stage").get("name") == "finetune":
        message = f"scales learning rates and starts from models of this program, and {target} makes its own optimizer"
        raise ConfigError(message, "stage", "finetune", fix="Use fork=RUN, or load the weights in its __init__.")
    parts = {"model": config["task"], "task": {"_target_": PLAIN}, "optimizer": dict(OF_THE_MODULE), "schedule": dict(OF_THE_MODULE)}
    return {**config, **parts}


def check_lightning_parts(config: Config) -> None:
    """Raise ConfigError for a layout, or another part, that a user's LightningModule or LightningDataModule does not work with."""
    strategy, plain = config["strategy"], config["task"]["_target_"] == PLAIN
    if not plain and config["data"]["kind"] != "own":
        return
    key, what = ("task", "a LightningModule computes its steps whole") if plain else ("data", "a LightningDataModule gives each process its own rows")
    for axis in ("tensor", "context", "pipeline"):
        if strategy[axis] > 1:
            message = f"{what} ({key}), so only samples, parameters and optimizer state can be split"
            raise ConfigError(message, f"strategy.{axis}", strategy[axis], fix="Use strategy=single, ddp, fsdp or hsdp.")
    if plain:
        if (config["stage"].get("lora") or {}).get("rank"):
            raise ConfigError("adapters are for the models of this program", "stage.lora.rank", config["stage"]["lora"]["rank"], fix="Leave it out.")
        return
    model = config["model"]
    if str(model["_target_"]).startswith("meshformer.") and "vocab_size" in model and model["vocab_size"] is None:
        message = f"needs a value: the tokens come from {config['data']['source']['_target_']}, which says no number of them"
        raise ConfigError(message, "model.vocab_size", fix="Add model.vocab_size=… to the command.")
