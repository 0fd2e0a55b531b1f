"""Read configurations from run folders, which are untrusted: their values must not make a command write, send or read outside its own paths.

Four rules hold for every command that reads a config.yaml. No text in it is evaluated. Paths to write to come from the command. A component
that writes or sends to where its settings say, such as most loggers, is built only if the command itself names it. No symbolic link may lead
out of the folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from meshformer.config.allow import check_target
from meshformer.config.errors import ConfigError
from meshformer.config.paths import link_out_of

Config = dict[str, Any]
# Callbacks of Lightning that only act on the training: they take no path and write no file.
ACTS_ON_TRAINING = frozenset(
    f"lightning.pytorch.callbacks.{name}"
    for name in ("DeviceStatsMonitor", "EarlyStopping", "LearningRateMonitor", "StochasticWeightAveraging", "Timer")
)
TENSORBOARD = "lightning.pytorch.loggers.TensorBoardLogger"  # job/loggers.py sets the folder it writes to
# Settings of loggers that are only names, where the logger writes below the folders of the command: mlflow.db in its runs folder, wandb offline.
NAMES = {
    "lightning.pytorch.loggers.MLFlowLogger": {"experiment_name", "run_name", "tags"},
    "lightning.pytorch.loggers.WandbLogger": {"project", "name", "tags", "offline"},
}
PRUNING = "meshformer.callbacks.Pruning"  # writes to the study of the sweep that started the run
# Classes allowed only in callbacks, logger and data.source: they may write, download or read where their settings say.
RESTRICTED = ("lightning.", "torchmetrics.", "meshformer.callbacks.", "meshformer.data.")


def read_config(run: Path) -> Config:
    """Read the run's config.yaml. Raises ConfigError if it is missing or damaged, or holds an interpolation that would be evaluated later."""
    file = Path(run) / "config.yaml"
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{run} holds no config.yaml, so it is not a run that can be read") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror})") from None
    # yaml raises ValueError for text that is not UTF-8 and for dates that do not exist.
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{file} is damaged ({' '.join(str(error).split())})", fix="Restore it from a copy.") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{file} is empty or damaged")
    for name in ("model", "data", "trainer", "stage", "strategy", "paths"):
        if not isinstance(config.get(name), dict):
            raise ConfigError(f"{file} is damaged, or of another program: {name} is no group of settings", fix="Restore it from a copy.")
    refuse_interpolations(config, str(file))
    return config


def refuse_links(run: Path, key: str, value: Any) -> None:
    """Raise ConfigError if a symbolic link leads out of the run's folder: the command would read or overwrite another file of the user."""
    if (link := link_out_of(Path(run))) is not None:
        message = f"{link} is a link to {link.resolve()}, outside of the run's folder"
        raise ConfigError(message, key, value, fix="If the run is yours, put in the link's place what it points to.")


def refuse_interpolations(node: Any, place: str, key: str = "") -> None:
    """Raise ConfigError for a `${…}`: recorded configurations are resolved, and `instantiate` would resolve it after the targets are checked."""
    for path, text in _texts(node, key):
        if "${" in text:
            message = f"{place} holds an interpolation, and a resolved configuration has none"
            raise ConfigError(message, path, text, fix="Write its value instead.")


def confine(config: Config, paths: Mapping[str, str], mine: Config | None = None, cache: str | None = None) -> Config:
    """Return `config`, read from a folder, restricted so that it writes only where the command says. Raises ConfigError for other components.

    `paths` of the command replace the recorded ones. `mine` is the command's own configuration, composed without the folder. `cache` replaces
    the data source's cache (default: paths.data). `config["allow"]` must already be the command's.
    """
    mine, allow = mine or {}, config.get("allow") or ()
    config = {**config, "paths": dict(paths)}
    data = config.get("data")
    if isinstance(data, dict) and isinstance(source := data.get("source"), dict) and "cache" in source:
        config["data"] = {**data, "source": {**source, "cache": cache or paths["data"]}}
    for group in ("callbacks", "logger"):
        nodes, own = config.get(group) or {}, mine.get(group) or {}
        if not isinstance(nodes, dict):
            raise ConfigError("must be a group of named parts, or {}", group, nodes)
        kept = {name: node for name, node in nodes.items() if not _is_pruning(node) or own.get(name) == node}
        for name, node in kept.items():
            if node is not None and own.get(name) != node and not _stays_inside(group, name, node, allow):
                _refuse(f"{group}.{name}", node)
        config[group] = kept
    for key, node in config.items():
        for path, part in _parts(node, str(key)) if key not in ("callbacks", "logger") else ():
            target = part["_target_"]
            if path != "data.source" and str(target).startswith(RESTRICTED) and not _is_allowed(target, allow) and _at(mine, path) != part:
                _refuse(path, part)
    return config


def _refuse(key: str, node: Any) -> None:
    target = node.get("_target_") if isinstance(node, dict) else None
    message = "the folder asks for a part that writes or sends where its settings say"
    fix = f"If you trust it and its settings, add allow=[{target}] to the command; ~{key} leaves it out."
    raise ConfigError(message, f"{key}._target_" if target else key, target or node, fix=fix)


def _stays_inside(group: str, name: Any, node: Any, allow: Sequence[str]) -> bool:
    if not isinstance(node, dict) or not str(name).isidentifier():  # the name becomes a folder name
        return False
    target, arguments = node.get("_target_"), {key: value for key, value in node.items() if key != "_target_"}
    if _is_allowed(target, allow) or not _buildable(target):  # a target that is not on the allow-list is refused later, by check_target
        return True
    if any(_parts(arguments, "")):
        return False
    if target in NAMES:
        given = {key for key, value in arguments.items() if value is not None}
        return group == "logger" and given <= NAMES[target] and (target.endswith("MLFlowLogger") or arguments.get("offline") is True)
    if group == "logger":
        return target == TENSORBOARD and all(isinstance(value, (bool, int, float)) for value in arguments.values())
    return target in ACTS_ON_TRAINING or str(target).startswith("meshformer.callbacks.")


def _buildable(target: Any) -> bool:
    try:
        check_target(target)
    except ConfigError:
        return False
    return True


def _is_pruning(node: Any) -> bool:
    return isinstance(node, dict) and node.get("_target_") == PRUNING


def _is_allowed(target: Any, allow: Sequence[str]) -> bool:
    return any(str(target) == name or str(target).startswith(f"{name}.") for name in allow)


def _parts(node: Any, path: str) -> Iterator[tuple[str, Config]]:
    """Yield (dotted key, node) for every node with `_target_` at or below `node`."""
    if isinstance(node, dict) and "_target_" in node:
        yield path, node
    for name, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from _parts(child, f"{path}.{name}" if path else str(name))


def _texts(node: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield (dotted key, text) for every string at or below `node`, including the names of settings."""
    if isinstance(node, str):
        yield path, node
    for name, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        at = f"{path}.{name}" if path else str(name)
        if isinstance(name, str):
            yield path, name
        yield from _texts(child, at)


def _at(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = config.get(name) if isinstance(config, dict) else None
    return config
