"""What is taken of a configuration that lies in a run folder. A folder may come from a stranger: its values are data, and reach nothing outside.

Four rules, for every command that reads a config.yaml: no text in it is evaluated, paths to write to are the command's own, a component
that writes or sends where its settings say (a logger of another kind, say) is built only where the command names it, and no link leads out.
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
# Callbacks that act on the training alone: they take no path, and write nothing.
ACTS_ON_TRAINING = frozenset(
    f"lightning.pytorch.callbacks.{name}"
    for name in ("DeviceStatsMonitor", "EarlyStopping", "LearningRateMonitor", "StochasticWeightAveraging", "Timer")
)
TENSORBOARD = "lightning.pytorch.loggers.TensorBoardLogger"  # job/build.py says where it writes
PRUNING = "meshformer.callbacks.Pruning"  # writes to the study of the sweep that started the run
# What has no place outside of callbacks, logger and data.source: it may write, fetch or read where its settings say.
REACHING = ("lightning.", "torchmetrics.", "meshformer.callbacks.", "meshformer.data.")


def read_config(run: Path) -> Config:
    """The run's config.yaml. ConfigError where there is none, it is damaged, or a text in it would be evaluated later."""
    file = Path(run) / "config.yaml"
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{run} holds no config.yaml, so it is not a run that can be read") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror})") from None
    # A ValueError is text that is no UTF-8, or a date that does not exist.
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
    """ConfigError where a link in the run's folder leads out of it: through one, a file of the user's would be read, shown or written over."""
    if (link := link_out_of(Path(run))) is not None:
        message = f"{link} is a link to {link.resolve()}, outside of the run's folder"
        raise ConfigError(message, key, value, fix="If the run is yours, put in the link's place what it points to.")


def refuse_interpolations(node: Any, place: str, key: str = "") -> None:
    """A configuration is resolved before it is recorded. A `${…}` left in it would be resolved by `instantiate`, after the targets are checked."""
    for path, text in _texts(node, key):
        if "${" in text:
            message = f"{place} holds an interpolation, and a resolved configuration has none"
            raise ConfigError(message, path, text, fix="Write its value instead.")


def confine(config: Config, paths: Mapping[str, str], mine: Config | None = None, cache: str | None = None) -> Config:
    """`config`, which a folder says, with nothing in it that writes where the folder says.

    `paths`: the command's own, which take the place of the recorded ones. `mine`: what the command composes to without the folder. `cache`: the
    data source's, where it has one (default: paths.data). `config["allow"]` is the command's already.
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
        kept = {name: node for name, node in nodes.items() if not _of_a_search(node) or own.get(name) == node}
        for name, node in kept.items():
            if node is not None and own.get(name) != node and not _stays_inside(group, name, node, allow):
                _refuse(f"{group}.{name}", node)
        config[group] = kept
    for key, node in config.items():
        for path, part in _parts(node, str(key)) if key not in ("callbacks", "logger") else ():
            target = part["_target_"]
            if path != "data.source" and str(target).startswith(REACHING) and not _named(target, allow) and _at(mine, path) != part:
                _refuse(path, part)
    return config


def _refuse(key: str, node: Any) -> None:
    target = node.get("_target_") if isinstance(node, dict) else None
    message = "the folder asks for a part that writes or sends where its settings say"
    fix = f"If you trust it and its settings, add allow=[{target}] to the command; ~{key} leaves it out."
    raise ConfigError(message, f"{key}._target_" if target else key, target or node, fix=fix)


def _stays_inside(group: str, name: Any, node: Any, allow: Sequence[str]) -> bool:
    if not isinstance(node, dict) or not str(name).isidentifier():  # the name becomes that of a folder
        return False
    target, arguments = node.get("_target_"), {key: value for key, value in node.items() if key != "_target_"}
    if _named(target, allow) or not _buildable(target):  # what is not on the list is refused with all others that are not
        return True
    if any(_parts(arguments, "")):
        return False
    if group == "logger":
        return target == TENSORBOARD and all(isinstance(value, (bool, int, float)) for value in arguments.values())
    return target in ACTS_ON_TRAINING or str(target).startswith("meshformer.callbacks.")


def _buildable(target: Any) -> bool:
    try:
        check_target(target)
    except ConfigError:
        return False
    return True


def _of_a_search(node: Any) -> bool:
    return isinstance(node, dict) and node.get("_target_") == PRUNING


def _named(target: Any, allow: Sequence[str]) -> bool:
    return any(str(target) == name or str(target).startswith(f"{name}.") for name in allow)


def _parts(node: Any, path: str) -> Iterator[tuple[str, Config]]:
    """Every node with `_target_` at or below `node`, with its dotted key."""
    if isinstance(node, dict) and "_target_" in node:
        yield path, node
    for name, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from _parts(child, f"{path}.{name}" if path else str(name))


def _texts(node: Any, path: str) -> Iterator[tuple[str, str]]:
    """Every text at or below `node`, names of settings among them, with its dotted key."""
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
