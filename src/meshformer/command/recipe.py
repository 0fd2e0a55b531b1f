"""Recipes of two runs: `stage.pretrain` lists the overrides of a pretraining run, which is trained first and whose weights are then fine-tuned."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from meshformer.checkpoint.check import check_fits
from meshformer.checkpoint.find import candidates
from meshformer.command import compose
from meshformer.command.check import check, resolve
from meshformer.config import ConfigError, validate
from meshformer.config.foreign import read_config
from meshformer.config.resolve import external_launcher
from meshformer.printing import say
from meshformer.record import RunRecord
from meshformer.tasks.check import has_own_head

Config = dict[str, Any]
# Overrides of these keys apply to both runs: they say where and how to run, or must agree for the weights to fit.
SHARED = (
    "strategy", "model", "seed", "paths", "allow", "logger", "launch", "trainer.devices", "trainer.num_nodes", "trainer.accelerator",
    "trainer.threads", "trainer.precision", "trainer.progress", "trainer.compile", "trainer.deterministic", "data.tokenizer", "data.vocab_size",
)  # fmt: skip
FOUND_OUT = ("model.vocab_size", "model.classes", "model.outputs", "data.classes", "resume", "fork")  # set by the job itself


@dataclass
class FirstRun:
    """The pretraining run: the command-line arguments that start it and its resolved configuration."""

    arguments: list[str]
    config: Config

    @property
    def trusted(self) -> list[str]:
        """The arguments that must be repeated on resume, because a run folder's own record of them is not trusted."""
        return [argument for argument in self.arguments if argument.lstrip("+").startswith(("--config-dir=", "allow=", "paths."))]

    @property
    def runs(self) -> Path:
        return Path(self.config["paths"]["runs"]).expanduser() / self.config["experiment"]

    def find(self) -> tuple[Path, bool] | None:
        """Return (folder, whether it is finished) of the newest run with this configuration that can be used or resumed; None if there is none."""
        made = sorted((file.parent for file in self.runs.glob("*/config.yaml")), key=lambda run: run.stat().st_mtime, reverse=True)
        usable = [run for run in made if candidates(run) and self._is_of(_config_of(run))]
        finished = [run for run in usable if RunRecord(run).fields.get("state") == "finished"]
        return next(((run.absolute(), run in finished) for run in (*finished, *usable)), None)

    def _is_of(self, recorded: Config) -> bool:
        if not recorded:
            return False
        may_differ = (*compose.RESUMABLE, *FOUND_OUT)
        other = [key for key in compose.differences(recorded, self.config) if not key.startswith(may_differ)]
        return not other and recorded["trainer"].get("max_steps") == self.config["trainer"]["max_steps"]

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold a lock on this run, waiting while another command trains it."""
        name = hashlib.sha256(repr(sorted(self.arguments)).encode()).hexdigest()[:16]
        self.runs.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.runs / f".pretraining-{name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say("another command trains the run of stage.pretrain; waiting for it")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


def pretraining(config: Config, overrides: Sequence[str], flags: Sequence[str], config_dir: str | None) -> FirstRun | None:
    """Return the run to train first, or None if `config` (composed, not yet resolved) has no `stage.pretrain`. `flags` are passed to both runs.

    Raises ConfigError for a mistake in either run before the first one starts.
    """
    stage = config.get("stage") or {}
    listed = stage.get("pretrain")
    if not listed:
        return None
    if stage.get("init_from") == "???":
        config = {**config, "stage": {**stage, "init_from": None}}
    config = validate(config)
    if config["stage"]["name"] != "finetune":
        raise ConfigError("trains a run to fine-tune", "stage.pretrain", listed, fix="Add stage=finetune.")
    if config["stage"]["init_from"] is not None:
        message = "says where the weights come from, and so does stage.init_from"
        raise ConfigError(message, "stage.pretrain", listed, fix="Leave one of them out.")
    if external_launcher() is not None:
        message = "trains two runs, and torchrun or srun starts the processes of one"
        raise ConfigError(message, "stage.pretrain", listed, fix="Train the first by a command of its own, and add stage.init_from=RUN.")
    own = [o for o in config["stage"]["pretrain"] if _key(o).startswith(("hydra", "paths"))]
    if own:
        raise ConfigError("both runs use the same folders", "stage.pretrain", own[0], fix="Set it for both, outside of stage.pretrain.")
    shared = [o for o in overrides if any(_key(o) == key or _key(o).startswith((f"{key}.", f"{key}/")) for key in SHARED)]
    first = [*config["stage"]["pretrain"], *shared]
    source = compose.compose(first, config_dir=config_dir)
    later = resolve(validate(compose.adopt(config, source, overrides)))
    check({**later, "resume": "later"})  # any value of `resume` skips the checks of files that do not exist yet
    check_fits(later["model"], source["model"], "the run of stage.pretrain", has_own_head(later))
    return FirstRun([*flags, *first], source)


def _config_of(run: Path) -> Config:
    """Return the run's configuration, or {} if it cannot be read: any folder may lie below paths.runs."""
    try:
        return read_config(run)
    except ConfigError:
        return {}


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]
