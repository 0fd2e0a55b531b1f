"""What `trainer.compile=auto` becomes: true where compiling works and the run is long enough to win back the time that it takes. Without torch."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

from meshformer.config.errors import ConfigError
from meshformer.config.signature import attribute

Config = dict[str, Any]
# From how many floating-point operations of a whole run, on each core or GPU, compiling its blocks is worth while; see `compiles`.
WORTH_WHILE = {"cpu": 5e13, "gpu": 1e17}


def compiles(config: Config) -> tuple[bool, str]:
    """Whether to compile, and why, in a word or two. `config`: all else is settled.

    Compiling a block for training and for evaluation took 52 s of CPU time (AMD EPYC, torch 2.13, 2026-11-27), and steps of the default recipe
    were then 1.2 times as fast: a core wins that back in about five minutes, which are 5e12 to 3e13 of these operations, by precision and size.
    README's table of an H200 has our network at 0.28 of the card's rate eagerly and 0.49 compiled (`python -m meshformer.bench gpu`); 1e17
    operations are seven minutes there, eagerly. A slower device is busy for longer with the same run, and gains more.
    """
    trainer = config["trainer"]
    if (reason := _unsuited(config)) is not None:
        return False, reason
    processes = trainer["devices"] * trainer["num_nodes"]
    units = processes if trainer["accelerator"] == "gpu" else processes * trainer["threads"]
    if _operations(config) < WORTH_WHILE[trainer["accelerator"]] * units:
        return False, "the run is short"
    return True, "the run is long"


def lacking(accelerator: str) -> str | None:
    """What torch.compile needs on this machine and does not find."""
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python's header files"  # what it makes is a module of Python's
    if accelerator == "gpu":
        if importlib.util.find_spec("triton") is None:
            return "the package triton"
        compilers = [os.environ.get("CC"), "gcc", "clang"]
        return None if any(name and shutil.which(name) for name in compilers) else "a C compiler (gcc)"
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")  # Inductor looks for no other
    return None if shutil.which(compiler) else f"a C++ compiler ({compiler})"


def check_compile(config: Config) -> None:
    """trainer.compile against what this machine has."""
    missing = lacking(config["trainer"]["accelerator"])
    if config["trainer"]["compile"] and missing is not None:
        raise ConfigError(f"torch.compile needs {missing}", "trainer.compile", "true", fix="Install it, or use trainer.compile=false.")


def _unsuited(config: Config) -> str | None:
    """Why this run is better not compiled, however long it is."""
    model, trainer, stage = config["model"], config["trainer"], config["stage"]
    parts = [model, *(model.get(name) for name in ("attention", "position"))]  # a block that is no one graph would end the run
    if not attribute(model["_target_"], "one_graph") or not all(
        str(part["_target_"]).startswith("meshformer.") for part in parts if isinstance(part, dict)
    ):
        return "the model has parts of your own"
    if (missing := lacking(trainer["accelerator"])) is not None:
        return f"it needs {missing}"
    if config["strategy"]["schedule"] == "interleaved_zero_bubble":
        return "its schedule needs two backward passes"
    if trainer["deterministic"]:
        return "trainer.deterministic=true"  # kernels may be chosen by timing them, which a resumed run does anew
    if stage.get("unfreeze_every"):
        return "stage.unfreeze_every changes the blocks"
    if config["data"]["kind"] == "texts":
        return "batches of texts differ in length"
    if trainer["max_epochs"] is not None or trainer["max_steps"] is None:
        return "trainer.max_epochs leaves open how long the run is"
    return None


def _operations(config: Config) -> int:
    """Of the blocks in the whole run, as Kaplan et al. (2020) estimate them: 6 for each entry of a matrix and each token."""
    model, data = config["model"], config["data"]
    width = model["d_model"]
    tokens = data["context_length"]
    if model.get("image_size") and model.get("patch_size"):
        tokens = (model["image_size"] // model["patch_size"]) ** 2
    entries = model["n_layers"] * (4 * width**2 + 2 * width * (model.get("d_ff") or 4 * width))
    return 6 * entries * tokens * data["batch_size"] * config["trainer"]["max_steps"]
