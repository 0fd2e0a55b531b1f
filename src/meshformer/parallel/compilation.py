"""Resolves `trainer.compile=auto`: true where torch.compile works and the run is long enough to make up for the compile time. Imports no torch."""

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
from meshformer.model.settings import sequence_length

Config = dict[str, Any]
VARIED = ("texts", "speech")  # kinds of data whose batches differ in length
# FLOPs of the whole run per core or GPU from which compiling the blocks pays off; see `compiles`.
WORTH_WHILE = {"cpu": 5e13, "gpu": 1e17}


def compiles(config: Config) -> tuple[bool, str]:
    """(whether to compile, a short reason). `config`: resolved except for trainer.compile.

    CPU: compiling a block for training and evaluation took 52 s of CPU time (AMD EPYC, torch 2.13, 2026-11-27), after which steps of the default
    recipe were 1.2 times as fast. A core makes up for that in about five minutes of training, 5e12 to 3e13 FLOPs depending on precision and size.
    GPU: in README's table for an H200 our model reaches an MFU of 0.28 in eager mode and 0.49 compiled (`python -m meshformer.bench gpu`), and
    1e17 FLOPs take seven minutes in eager mode. Slower devices take longer for the same run, so they gain more.
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
    """The first requirement of torch.compile that is missing on this machine, or None."""
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python's header files"  # Inductor builds a Python extension module
    if accelerator == "gpu":
        if importlib.util.find_spec("triton") is None:
            return "the package triton"
        compilers = [os.environ.get("CC"), "gcc", "clang"]
        return None if any(name and shutil.which(name) for name in compilers) else "a C compiler (gcc)"
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")  # the only compilers that Inductor tries
    return None if shutil.which(compiler) else f"a C++ compiler ({compiler})"


def check_compile(config: Config) -> None:
    """ConfigError if trainer.compile is true and this machine lacks a requirement, or trainer.detect_anomaly is true."""
    if config["trainer"]["compile"] is True and config["trainer"]["detect_anomaly"]:
        message = "it names the operation that made a NaN, and a compiled block is one operation"
        raise ConfigError(message, "trainer.detect_anomaly", "true", fix="Use trainer.detect_anomaly=false, or trainer.compile=false.")
    missing = lacking(config["trainer"]["accelerator"])
    if config["trainer"]["compile"] and missing is not None:
        raise ConfigError(f"torch.compile needs {missing}", "trainer.compile", "true", fix="Install it, or use trainer.compile=false.")


def _unsuited(config: Config) -> str | None:
    """Why this run should not be compiled, whatever its length; None if nothing speaks against it."""
    model, trainer, stage = config["model"], config["trainer"], config["stage"]
    parts = [model, *(model.get(name) for name in ("attention", "position"))]  # compiling with fullgraph=True fails on a graph break
    if not attribute(model["_target_"], "one_graph") or not all(
        str(part["_target_"]).startswith("meshformer.") for part in parts if isinstance(part, dict)
    ):
        return "the model has parts of your own"
    if (missing := lacking(trainer["accelerator"])) is not None:
        return f"it needs {missing}"
    if config["strategy"]["schedule"] == "interleaved_zero_bubble":
        return "its schedule needs two backward passes"
    if trainer["detect_anomaly"]:
        return "trainer.detect_anomaly=true"
    if trainer["deterministic"]:
        return "trainer.deterministic=true"  # Inductor may select kernels by timing them, so a resumed run could select others
    if stage.get("unfreeze_every"):
        return "stage.unfreeze_every changes the blocks"
    if config["data"]["kind"] in VARIED:
        return f"batches of {config['data']['kind']} differ in length"
    if trainer["max_epochs"] is not None or trainer["max_steps"] is None:
        return "trainer.max_epochs leaves open how long the run is"
    return None


def _operations(config: Config) -> int:
    """FLOPs of the blocks in the whole run: 6 per matrix parameter and token (Kaplan et al. 2020)."""
    model, data = config["model"], config["data"]
    width = model["d_model"]
    tokens = sequence_length(model, data["context_length"])
    entries = model["n_layers"] * (4 * width**2 + 2 * width * (model.get("d_ff") or 4 * width))
    return 6 * entries * tokens * data["batch_size"] * config["trainer"]["max_steps"]
