"""Checks that weights and hidden states fit this machine's memory, before anything is allocated: otherwise torch exhausts the memory or crashes."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from meshformer.config.bounds import setting
from meshformer.config.degrees import Degrees
from meshformer.config.errors import ConfigError
from meshformer.config.signature import attribute

Config = dict[str, Any]
TRAINED_BYTES, DRAWN_BYTES = 8, 4  # host bytes per parameter: fp32 weight and gradient on a CPU; the initial weight alone with a GPU


def check_memory(config: Config) -> None:
    """ConfigError where the weights on one node, or one hidden state per layer, exceed this machine's memory. These are lower bounds: a run that
    passes may still run out of memory."""
    model, memory = config["model"], machine_memory()
    sized = all(model.get(key) is not None for key in ("d_model", "n_layers", "context_length"))
    if memory is None or not sized or not attribute(model["_target_"], "usual_settings"):
        return
    degrees = Degrees.from_config(config["strategy"])
    on_cpu = config["trainer"]["accelerator"] == "cpu"
    copies = config["trainer"]["devices"] / max(1, degrees.shard * degrees.tensor * degrees.pipeline)  # of the weights on this node
    for key, parameters in _parameters(config).items():
        needed = parameters * (TRAINED_BYTES if on_cpu else DRAWN_BYTES) * max(1.0, copies) / (1 if copies >= 1 else config["trainer"]["num_nodes"])
        if needed > memory:
            what = "weights and gradients" if on_cpu else "weights"
            message = f"the model's {what} would take {_gib(needed)}, and this machine has {_gib(memory)}"
            raise ConfigError(message, key, setting(config, key), fix="Make the model smaller.")
    if not on_cpu:
        return
    data = config["data"]
    samples = data["batch_size"] / max(1, config["trainer"]["accumulate_grad_batches"] * degrees.data)
    states = samples * data["context_length"] * model["d_model"] * 4 / (degrees.context * max(1, degrees.pipeline))
    if states * model["n_layers"] > memory:
        key = "data.context_length" if data["context_length"] > data["batch_size"] else "data.batch_size"
        message = f"one hidden state a layer would take {_gib(states * model['n_layers'])}, and this machine has {_gib(memory)}"
        raise ConfigError(message, key, setting(config, key), fix="Make it smaller, or raise trainer.accumulate_grad_batches.")


def _parameters(config: Config) -> dict[str, float]:
    """Configuration key -> a lower bound of the number of parameters that it causes: blocks, token embedding, position table."""
    model, data = config["model"], config["data"]
    width, layers = model["d_model"], model["n_layers"]
    blocks = layers * width * (2.0 * width + 2 * (model.get("d_ff") or 2 * width))
    entries = model.get("vocab_size") or (data["vocab_size"] if data["tokenizer"] == "bpe" else 1)
    key = "model.n_layers" if layers > width else "model.d_model"
    vocabulary = "model.vocab_size" if model.get("vocab_size") else "data.vocab_size"
    has_table = attribute(str(model.get("position", {}).get("_target_", "")), "has_table", False)
    table = model["context_length"] * width if has_table else 0
    return {key: blocks, vocabulary: float(entries * width), "data.context_length": float(table)}


def machine_memory() -> int | None:
    """Bytes of memory of this machine, or of this process's control group if that is less; None if unknown."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if re.fullmatch(r"\d+", limit) else total


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
