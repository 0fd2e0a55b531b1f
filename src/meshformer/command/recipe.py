"""Recipes of two runs: `stage.pretrain` lists the overrides of a run whose weights fine-tuning starts from, and which is trained first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meshformer import compose
from meshformer.checkpoint.find import candidates
from meshformer.config import ConfigError, check, resolve, validate
from meshformer.config.resolve import outside
from meshformer.record import RunRecord

Config = dict[str, Any]
# What the command says for both runs: where and how they run, and what the weights of one must share with the other.
SHARED = (
    "strategy", "model", "seed", "paths", "allow", "logger", "launch", "trainer.devices", "trainer.num_nodes", "trainer.accelerator",
    "trainer.threads", "trainer.precision", "trainer.progress", "trainer.compile", "trainer.deterministic", "data.tokenizer", "data.vocab_size",
)  # fmt: skip


def pretraining(config: Config, overrides: Sequence[str]) -> list[str] | None:
    """The overrides of the run to train first; None where `config`, composed and not settled, asks for none.

    Raises ConfigError for what is wrong with either run, before the first is started.
    """
    stage = config.get("stage") or {}
    first = stage.get("pretrain")
    if not first:
        return None
    if stage.get("init_from") == "???":
        config = {**config, "stage": {**stage, "init_from": None}}
    config = validate(config)
    if config["stage"]["init_from"] is not None:
        message = "says where the weights come from, and so does stage.init_from"
        raise ConfigError(message, "stage.pretrain", first, fix="Leave one of them out.")
    if outside() is not None:
        message = "trains two runs, and torchrun or srun starts the processes of one"
        raise ConfigError(message, "stage.pretrain", first, fix="Train the first by a command of its own, and add stage.init_from=RUN.")
    shared = [o for o in overrides if any(_key(o) == key or _key(o).startswith((f"{key}.", f"{key}/")) for key in SHARED)]
    first = [*config["stage"]["pretrain"], *shared]
    source = compose.compose(first)
    later = validate(compose.adopt(config, source, overrides))
    check({**resolve(later), "resume": "later"})  # which lifts the checks of what is not there yet
    return first


def run_that_did(overrides: Sequence[str], runs: str) -> tuple[Path, bool] | None:
    """(folder, whether it is finished) of the newest run under `runs` that these overrides made and that can be used or continued."""
    text = compose.write_overrides(overrides, None, None)
    made = [file.parent for file in Path(runs).expanduser().glob("*/*/overrides.txt") if file.read_text(encoding="utf-8") == text]
    usable = [folder for folder in sorted(made, key=lambda run: run.stat().st_mtime) if candidates(folder)]
    finished = [folder for folder in usable if RunRecord(folder).fields.get("state") == "finished"]
    if finished:
        return finished[-1].absolute(), True
    return (usable[-1].absolute(), False) if usable else None


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]
