"""Which option of each config group a run chose: `model=nano`, `model/position=rotary`. Read from plain files; Hydra is not asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from meshformer.config.paths import conf_dir

GROUPS = ("model", "model/position", "model/attention", "data", "optimizer", "schedule", "task", "trainer")
# libyaml's safe loader reads a config.yaml in a tenth of the time; not every build of PyYAML has it.
Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def choices(config: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, str]:
    """Group -> option, from what was typed; else from the class that stands in the configuration, where one option alone names it; else the
    recipe's own. A run folder does not record them, so a later edit of conf/ may rename what an old run took by default."""
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
    if not all(_options(group).values()):  # an option that sets no class may have any
        return None
    matches = [option for option, classes in _options(group).items() if all(_at(config, key) == cls for key, cls in classes)]
    return matches[0] if len(matches) == 1 else None


@cache
def _options(group: str) -> dict[str, list[tuple[str, str]]]:
    """Option -> [(dotted key, class)] of the `_target_`s that its file sets."""
    files = sorted((conf_dir() / group).glob("*.yaml"))
    return {file.stem: list(_classes(_load(file), group.replace("/", "."))) for file in files}


@cache
def _defaults(experiment: str) -> dict[str, str]:
    """What train.yaml chooses, then what the experiment puts in its place."""
    chosen: dict[str, str] = {"model/attention": "auto", "model/position": "rotary"}
    for file in (conf_dir() / "train.yaml", conf_dir() / "experiment" / f"{experiment}.yaml"):
        for entry in (_load(file).get("defaults") or []) if file.is_file() else []:
            for key, option in entry.items() if isinstance(entry, dict) else []:
                chosen[key.removeprefix("override ").lstrip("/")] = str(option)
    return chosen


def _load(file: Path) -> dict[str, Any]:
    try:
        return yaml.load(file.read_text(encoding="utf-8"), Loader) or {}
    except (OSError, ValueError, yaml.YAMLError):  # someone is editing it
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
