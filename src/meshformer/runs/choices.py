"""Find the option of each config group that a run chose (`model=nano`, `model/position=rotary`) from plain files, without Hydra."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from meshformer.config.paths import conf_dir

GROUPS = ("model", "model/position", "model/attention", "data", "optimizer", "schedule", "task", "trainer")
# libyaml's safe loader is ten times as fast, but not every build of PyYAML has it.
Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def choices(config: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, str]:
    """Return a mapping from group to option.

    The option comes from the overrides, else from the class in the configuration if exactly one option names it, else from the defaults of the
    recipe. Run folders do not record choices, so a later edit of conf/ may change the shown default of an old run.
    """
    typed = dict(line.lstrip("+").split("=", 1) for line in overrides if "=" in line and not line.startswith(("-", '"')))
    experiment = config.get("experiment")
    found = {"experiment": str(experiment)} if experiment else {}
    for group in ("stage", "strategy"):
        if name := (config.get(group) or {}).get("name"):
            found[group] = str(name)
    defaults = _defaults(str(experiment))
    for group in GROUPS:
        option = typed.get(group) or _by_class(group, config) or defaults.get(group)
        if option and option != "null":
            found[group] = option.strip("'\"")
    return found


def _by_class(group: str, config: Mapping[str, Any]) -> str | None:
    if not all(_options(group).values()):  # an option without a class would match any
        return None
    matches = [option for option, classes in _options(group).items() if all(_at(config, key) == cls for key, cls in classes)]
    return matches[0] if len(matches) == 1 else None


@cache
def _options(group: str) -> dict[str, list[tuple[str, str]]]:
    """Return a mapping from each option to [(dotted key, class)] for the `_target_`s that its file sets."""
    files = sorted((conf_dir() / group).glob("*.yaml"))
    return {file.stem: list(_classes(_load(file), group.replace("/", "."))) for file in files}


@cache
def _defaults(experiment: str) -> dict[str, str]:
    """Return the options that train.yaml chooses, updated by those of the experiment."""
    chosen: dict[str, str] = {"model/attention": "auto", "model/position": "rotary"}
    for file in (conf_dir() / "train.yaml", conf_dir() / "experiment" / f"{experiment}.yaml"):
        for entry in (_load(file).get("defaults") or []) if file.is_file() else []:
            for key, option in entry.items() if isinstance(entry, dict) else []:
                chosen[key.removeprefix("override ").lstrip("/")] = str(option)
    return chosen


def _load(file: Path) -> dict[str, Any]:
    try:
        return yaml.load(file.read_text(encoding="utf-8"), Loader) or {}
    except (OSError, ValueError, yaml.YAMLError):  # the file may be half-edited
        return {}


def _classes(node: Any, path: str) -> Iterator[tuple[str, str]]:
    for name, value in node.items() if isinstance(node, dict) else []:
        if name == "_target_":
            yield f"{path}._target_", value
        else:
            yield from _classes(value, f"{path}.{name}")


def _at(config: Mapping[str, Any], key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node
