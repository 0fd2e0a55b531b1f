"""Expand a command's overrides into the points of a sweep, and compose the configuration of each point."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, read_write

from meshformer.checkpoint.find import latest_checkpoint
from meshformer.command import compose
from meshformer.command.compose import Hydra
from meshformer.command.explain import EXPLAINED, explain
from meshformer.command.folders import claim_folder, write_settings
from meshformer.command.recorded import write_overrides
from meshformer.config import ConfigError

Config = dict[str, Any]


@dataclass
class Job:
    """A run that can start: its resolved configuration, its folder relative to the sweep's, and its extra environment variables."""

    config: Config
    folder: str
    environment: dict[str, str]
    auto_threads: bool = False  # trainer.threads was auto, so the launcher chooses the number


class Confined:
    """Restricts a resumed sweep: its points come from its folder, which is not trusted, so the command (`typed`) decides where runs write."""

    def __init__(self, flags: dict[str, str | None], typed: Sequence[str]):
        run_overrides = [override for override in typed if not override.lstrip("+~").startswith(("hydra", "sweep"))]
        hydra = compose.make_hydra(flags["config_dir"])
        try:
            parsed = OverridesParser.create().parse_overrides(run_overrides)
            single = [text for text, override in zip(run_overrides, parsed, strict=True) if not override.is_sweep_override()]
            self.mine = compose.own(hydra, flags["config_name"] or "train", single)
        except EXPLAINED as error:
            raise explain(error, hydra, flags["config_name"] or "train", run_overrides) from error
        self.typed = single
        self.overrides = [f"paths.{key}={compose.quoted(value)}" for key, value in self.mine["paths"].items()]

    def __call__(self, config: Config) -> Config:
        return compose.within(config, self.mine, self.typed)


class Composer:
    """Composes points. `flags` are the command's --config-dir and --config-name, `hydra_overrides` its overrides of Hydra's own settings."""

    def __init__(self, flags: dict[str, str | None], hydra_overrides: Sequence[str], confine: Confined | None = None):
        self.flags, self.hydra_overrides, self.confine = flags, list(hydra_overrides), confine
        self.hydra: Hydra = compose.make_hydra(flags["config_dir"])
        self.name = flags["config_name"] or "train"
        # stage.init_from as typed -> where it led first: later `last` would be a run of this sweep. The sweep's record keeps it for a resume.
        self.sources: dict[str, str] = {}

    def command(self, overrides: Sequence[str]) -> DictConfig:
        """Compose the settings of the sweep itself: its folder, launcher and options."""
        try:
            return compose.compose_config(self.hydra, self.name, [*self.hydra_overrides, *overrides], multirun=True)
        except EXPLAINED as error:
            if "submitit" in str(error) and find_spec("submitit") is None:
                message = "SLURM jobs need hydra-submitit-launcher"
                raise ConfigError(message, "hydra/launcher", fix="Install it: pip install 'meshformer[slurm]'.") from error
            raise explain(error, self.hydra, self.name, overrides) from error

    def parse(self, cfg: DictConfig, overrides: Sequence[str]) -> list[Override]:
        """Parse the overrides of hydra.sweeper.params (set by a file of the sweep group) and of the command; the latter win."""
        params = OmegaConf.to_container(cfg.hydra.sweeper, resolve=True)
        assert isinstance(params, dict)
        given = [f"{key}={value}" for key, value in (params.get("params") or {}).items()]
        try:
            parsed = OverridesParser.create(config_loader=self.hydra.config_loader).parse_overrides([*given, *overrides])
        except EXPLAINED as error:
            raise explain(error, self.hydra, self.name, overrides) from error
        return list({override.get_key_element(): override for override in parsed}.values())

    def job(self, number: int, overrides: Sequence[str]) -> Job:
        """Compose and check the run of a point. Raises ConfigError if it cannot be trained."""
        try:
            cfg = compose.compose_config(self.hydra, self.name, [*self.hydra_overrides, *overrides])
            with read_write(cfg.hydra.job):
                cfg.hydra.job.num = number
            HydraConfig.instance().set_config(cfg)
            config = compose.plain(cfg)
            folder, environment = str(cfg.hydra.sweep.subdir), {str(k): str(v) for k, v in cfg.hydra.job.env_set.items()}
        except EXPLAINED as error:
            raise explain(error, self.hydra, self.name, overrides) from error
        automatic = config["trainer"].get("threads") == "auto"
        if self.confine:
            config = self.confine(config)
        spec, stage = config["stage"].get("init_from"), config["stage"]
        if spec is not None:
            config["stage"] = {**stage, "init_from": self.sources.get(str(spec), spec)}
        config = compose.settle(config, overrides)
        if spec is not None:
            self.sources.setdefault(str(spec), str(config["stage"]["init_from"]))
        if config["trainer"]["num_nodes"] > 1:
            message = "the runs of a sweep have one node each"
            raise ConfigError(message, "trainer.num_nodes", config["trainer"]["num_nodes"], fix="Start such runs one by one.")
        for key, source in (("fork", config["fork"]), ("stage.init_from", config["stage"]["init_from"])):
            if source is not None:
                latest_checkpoint(Path(source), key)
        return Job(config, folder, environment, automatic)

    def own(self, cfg: DictConfig) -> Config:
        """The part of the configuration that comes from the command alone: paths, and the loggers and callbacks that it names."""
        return self.confine.mine if self.confine else compose.plain(cfg)

    def settings(self, overrides: Sequence[str]) -> str:
        """Return the text of the run's overrides.txt."""
        return write_overrides(overrides, self.flags["config_dir"], self.flags["config_name"])


def grid(parsed: Sequence[Override]) -> list[list[str]]:
    """Return every combination as a list of overrides; the last key varies fastest."""
    for override in parsed:
        if override.is_sweep_override() and not override.is_discrete_sweep():
            text = (override.input_line or "").partition("=")[2]
            raise ConfigError("an interval has infinitely many points", override.get_key_element(), text, fix="Add sweep.search=tpe or random.")
    values: dict[str, list[str]] = {}  # the last override of a key wins
    for override in parsed:
        key, swept = override.get_key_element(), override.is_sweep_override()
        given = override.sweep_string_iterator() if swept else [override.get_value_element_as_str()]
        values[key] = [f"{key}={value}" for value in given]
    return [list(point) for point in itertools.product(*values.values())]


def differences(recorded: Sequence[Sequence[str]], typed: Sequence[Sequence[str]]) -> list[str]:
    """Describe how the two grids differ, one text per key."""
    found = []
    sides = [_values(recorded), _values(typed)]
    for key in dict.fromkeys([*sides[0], *sides[1]]):
        there, here = (side.get(key) for side in sides)
        if there != here:
            found.append(f"{_shown(key, there)} there, {_shown(key, here)} here")
    if not found and [list(p) for p in recorded] != [list(p) for p in typed]:
        found.append("the same values in another order")
    return found


def _values(points: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    values: dict[str, dict[str, None]] = {}
    for point in points:
        for override in point:
            key, _, value = override.partition("=")
            values.setdefault(key, {})[value] = None
    return {key: list(some) for key, some in values.items()}


def _shown(key: str, values: list[str] | None) -> str:
    return f"no {key}" if values is None else f"{key}={','.join(values)}"


def open_folder(folder: Path, config: Config, settings: str) -> None:
    """Claim a new run's folder and write its config.yaml and overrides.txt."""
    claim_folder(folder)
    write_settings(folder, config, settings)


def module_path() -> list[str]:
    """sys.path for a job, with the current folder written out: `allow` may name modules that lie there."""
    return [os.getcwd() if entry == "" else entry for entry in sys.path]
