"""Values that no run can use: numbers outside of the range in which a setting means something, and sizes that this machine cannot hold.

Both are compared before anything is allocated: torch would end in a trace, take the machine's whole memory, or crash.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

from meshformer.config.degrees import Degrees
from meshformer.config.errors import ConfigError
from meshformer.config.resolve import cores
from meshformer.config.signature import attribute

Config = dict[str, Any]
# key -> (lowest, may it be the lowest, highest, may it be the highest); settings of components, whose annotations are plain `float`.
BOUNDS: dict[str, tuple[float, bool, float, bool]] = {
    "model.init_std": (0, True, math.inf, False),
    "model.norm_eps": (0, True, 1, False),
    "model.dropout": (0, True, 1, False),
    "optimizer.eps": (0, True, 1, False),
    "optimizer.adamw_eps": (0, True, 1, False),
    "optimizer.momentum": (0, True, 1, False),
    "callbacks.throughput.measure_seconds": (0, False, 60, True),
    "callbacks.ema.decay": (0, True, 1, False),
    "callbacks.samples.max_tokens": (1, True, math.inf, False),
    "callbacks.samples.every_n_validations": (1, True, math.inf, False),
    "callbacks.checkpoint.every_n_steps": (1, True, math.inf, False),
    "callbacks.checkpoint.keep_last": (0, True, math.inf, False),
    "callbacks.checkpoint.keep_best": (0, True, math.inf, False),
    "callbacks.spike.window": (2, True, math.inf, False),
}
BYTE_TOKENS = 256  # a byte-level tokenizer starts from all bytes
THREADS_A_CORE = 8
TRAINED_BYTES, DRAWN_BYTES = 8, 4  # of each parameter: fp32 weight and gradient; the weight alone, where a GPU holds the rest


def check_bounds(config: Config) -> None:
    """ConfigError for the first number outside of its range."""
    for key, (low, low_counts, high, high_counts) in BOUNDS.items():
        value = _get(config, key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if not ((value > low or (low_counts and value == low)) and (value < high or (high_counts and value == high))):
            raise ConfigError(f"must be {_range(low, low_counts, high, high_counts)}", key, value)
    for key in ("optimizer.betas", "optimizer.adamw_betas"):
        betas = _get(config, key)
        if betas is None:
            continue
        if not isinstance(betas, list) or len(betas) != 2 or not all(isinstance(b, int | float) and 0 <= b < 1 for b in betas):
            raise ConfigError("must be two numbers from 0 to below 1", key, betas, fix=f"[0.9,0.95] is usual: {key}=[0.9,0.95].")
    if config["data"]["tokenizer"] == "bpe" and config["data"]["vocab_size"] < BYTE_TOKENS:
        message = f"byte-level BPE starts from {BYTE_TOKENS} bytes"
        raise ConfigError(message, "data.vocab_size", config["data"]["vocab_size"], fix=f"Use at least {BYTE_TOKENS}.")
    threads, most = config["trainer"]["threads"], THREADS_A_CORE * cores()
    if threads > most:
        raise ConfigError(f"this machine has {cores()} cores", "trainer.threads", threads, fix=f"Use {cores()} at most, or auto.")


def check_cache(config: Config) -> None:
    """ConfigError where `paths.data` can neither be written nor made. Everybody's prepared data lies there."""
    folder = Path(config["paths"]["data"])
    standing = next((one for one in (folder, *folder.parents) if one.exists()), None)
    if standing is None:
        return
    fix = "Set MESHFORMER_DATA or paths.data to a folder of yours."
    if not standing.is_dir():
        raise ConfigError(f"{standing} is a file", "paths.data", str(folder), fix=fix)
    # Root passes every permission check, so a file system that takes no files (/proc, a read-only mount) shows by its flags and kind.
    unwritable = not os.access(standing, os.W_OK | os.X_OK) or str(standing).startswith(("/proc", "/sys"))
    if unwritable and not _prepared(folder):
        raise ConfigError(f"{standing} cannot be written to", "paths.data", str(folder), fix=fix)


def _prepared(folder: Path) -> bool:
    """A cache that somebody else filled may be read-only."""
    return folder.is_dir() and any(folder.iterdir())


def check_memory(config: Config) -> None:
    """ConfigError where one node's part of the weights, or one layer of hidden states, exceeds this machine's memory. Lower bounds: what passes
    may still not fit."""
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
            raise ConfigError(message, key, _get(config, key), fix="Make the model smaller.")
    if not on_cpu:
        return
    data = config["data"]
    samples = data["batch_size"] / max(1, config["trainer"]["accumulate_grad_batches"] * degrees.data)
    states = samples * data["context_length"] * model["d_model"] * 4 / (degrees.context * max(1, degrees.pipeline))
    if states * model["n_layers"] > memory:
        key = "data.context_length" if data["context_length"] > data["batch_size"] else "data.batch_size"
        message = f"one hidden state a layer would take {_gib(states * model['n_layers'])}, and this machine has {_gib(memory)}"
        raise ConfigError(message, key, _get(config, key), fix="Make it smaller, or raise trainer.accumulate_grad_batches.")


def _parameters(config: Config) -> dict[str, float]:
    """At least how many parameters each key answers for: the blocks by their width or number, the embedding by the vocabulary."""
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
    """Bytes of memory of this machine, or of the control group around this process where that is less; None where neither is told."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if re.fullmatch(r"\d+", limit) else total


def _get(config: Config, key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _range(low: float, low_counts: bool, high: float, high_counts: bool) -> str:
    lowest = f"at least {low:g}" if low_counts else f"above {low:g}"
    return lowest if high == math.inf else f"{lowest} and {'at most' if high_counts else 'below'} {high:g}"


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
