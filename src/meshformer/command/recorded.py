"""Write and read the overrides of a run (overrides.txt) and of a sweep (sweep.json). Recorded overrides are untrusted input.

Only values of our own keys are accepted: Hydra's settings could instantiate any class or add search paths. Hydra's own parser parses each line
before it is checked, so that unusual syntax cannot hide a key.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, QuotedString
from hydra.errors import HydraException

from meshformer.config import ConfigError, Root

COMMAND_KEYS = ("hydra", "sweep.")  # settings of one command rather than of a run
# Only the command may name a run to continue or fork: a recorded path would be read without the user asking for it.
OWN = {spec.name for spec in dataclasses.fields(Root)} - {"run", "resume", "fork"} | {"sweep"}
OPTION = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)*")  # an option of a group: no absolute path, no `..`
# Settings of our own launcher: plain numbers, safe to take from a recorded sweep.
LAUNCHER = {"hydra.launcher.cores", "hydra.launcher.gpus", "hydra.launcher.warm"}


def write_overrides(overrides: Sequence[str], config_dir: str | None, config_name: str | None) -> str:
    """Return the text of overrides.txt: flags first, then one override per line. Settings of Hydra and of a sweep are left out."""
    flags = [f"--config-dir={Path(config_dir).absolute()}"] if config_dir else []
    flags += [f"--config-name={config_name}"] if config_name not in (None, "train") else []
    lines = [line if "\n" not in line else json.dumps(line) for line in overrides if not line.lstrip("+~").startswith(COMMAND_KEYS)]
    return "".join(f"{line}\n" for line in flags + lines)


def read_overrides(run: Path, config_dir: str | None = None, key: str | None = None) -> tuple[list[str], str | None, str | None]:
    """Return the overrides, --config-dir and --config-name recorded for a run.

    `config_dir` is the command's own, `key` the setting that names the run. With `key`, a run that was made with --config-dir raises ConfigError
    unless the command also has one.
    """
    file = run / "overrides.txt"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ConfigError(f"{run} holds no overrides.txt, so what made it is unknown") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is damaged ({error})", fix="Restore it from a copy.") from None
    overrides: list[str] = []
    flags: dict[str, str] = {}
    for line in lines:
        if line.startswith("--"):
            name, _, value = line.partition("=")
            flags[name] = value
        elif line.strip():
            overrides.append(_unquoted(line, file) if line.startswith('"') else line)
    if unknown := sorted(flags.keys() - {"--config-dir", "--config-name"}):
        raise ConfigError(f"{file} holds a flag that no run is made with", unknown[0], fix="Remove the line.")
    if key is not None:
        confirmed_config_dir(flags.get("--config-dir"), config_dir, key, run)
    return own_settings(overrides, str(file), config_dir), flags.get("--config-dir"), option_name(flags.get("--config-name"), str(file))


def _unquoted(line: str, file: Path) -> str:
    try:
        text = json.loads(line)
    except ValueError:
        text = None
    if not isinstance(text, str):
        raise ConfigError(f"{file} is damaged", fix="Restore it from a copy.")
    return text


def own_settings(overrides: Sequence[Any], place: str, config_dir: str | None = None) -> list[str]:
    """Return `overrides`, recorded in the file `place`. Raises ConfigError for the first one that does not set one of our own keys.

    Groups in `config_dir`, the command's own configuration folder, are accepted too.
    """
    known = OWN | ({entry.name for entry in Path(config_dir).glob("*/")} - {"hydra"} if config_dir else set())
    for line in overrides:
        override = _parsed(line, place)
        key, package = override.key_or_group, override.package
        if _first(key) not in known or (package is not None and _first(package) not in OWN):
            shown = key if package is None else f"{key}@{package}"
            raise ConfigError(f"is no setting of a run, and {place} sets it", shown, fix="Remove it there if you trust the rest.")
        if "." not in key:  # a group: its value names a file
            for value in _values(override):
                if isinstance(value, str):
                    option_name(value, place, key)
    return list(overrides)


def split_command(overrides: Sequence[Any], typed: Sequence[str], place: str, config_dir: str | None = None) -> list[str]:
    """Return the recorded overrides that belong to a sweep's runs. Raises ConfigError for one of Hydra's that the command does not repeat."""
    repeated = {_key(_parsed(line, "the command")) for line in typed}
    kept = []
    for line in overrides:
        override = _parsed(line, place)
        key = _key(override)
        if _first(key) != "hydra" and key != "data.source.cache":
            kept.append(line)
        elif key in LAUNCHER and override.package is None and isinstance(override.value(), (bool, int)):
            kept += [line] if key not in repeated else []
        elif key not in repeated and key != "hydra.sweep.dir":
            message = f"{place} sets it, and a folder does not say where or how its runs are started"
            raise ConfigError(message, key, fix=f"If you trust it, add {line} to the command.")
    own_settings([line for line in kept if _key(_parsed(line, place)) not in LAUNCHER], place, config_dir)
    return kept


def without_option(overrides: Sequence[str], group: str, files: Sequence[Path]) -> list[str]:
    """Return the recorded overrides without the settings that belong to an option of `group`, one of whose `files` exists.

    A setting belongs to it if the file has it, or if it is an argument, perhaps an added one, of a class that the file names by `_target_`.
    """
    file = next((file for file in files if file.is_file()), None)
    content = yaml.safe_load(file.read_text(encoding="utf-8")) if file is not None else None
    package = f"{group.replace('/', '.')}."
    kept = []
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        path = key.removeprefix(package).split(".")
        below = any((file.parent / path[0]).is_dir() for file in files)  # `model.position.…` belongs to an option of model/position
        if not key.startswith(package) or below or not _has(content, path):
            kept.append(override)
    return kept


def _has(node: Any, path: Sequence[str]) -> bool:
    for name in path:
        if not isinstance(node, dict) or "_target_" in node:
            return True
        if name not in node:
            return False
        node = node[name]
    return True


def confirmed_config_dir(recorded: str | None, typed: str | None, key: str, folder: Path) -> str | None:
    """Return the command's --config-dir. Raises ConfigError if `folder` recorded one and the command has none: a recorded one is not trusted."""
    if recorded is not None and typed is None:
        message = "it was made with a configuration folder of its own, which is read only where the command names it"
        raise ConfigError(message, key, str(folder), fix=f"If you trust what is in there, add --config-dir={recorded} to the command.")
    return typed


def option_name(value: Any, place: str, key: str = "--config-name") -> Any:
    """Return `value` if it is None or a valid option name, which cannot lead out of its group; else raise ConfigError."""
    if value is not None and not (isinstance(value, str) and OPTION.fullmatch(value)):
        raise ConfigError(f"{place} gives it a value that names no option", key, value, fix="Remove it there if you trust the rest.")
    return value


def _parsed(line: Any, place: str) -> Override:
    if isinstance(line, str):
        try:
            return OverridesParser.create().parse_override(line)
        except (HydraException, ValueError, RecursionError):
            pass
    raise ConfigError(f"{place} holds a line that is no override", value=None, key=repr(line)[:80], fix="Remove it there.")


def _key(override: Override) -> str:
    return override.key_or_group


def _first(key: str) -> str:
    return re.split(r"[./]", key, maxsplit=1)[0]


def _values(override: Override) -> list[Any]:
    if isinstance(override.value(), Glob):  # matches only existing options
        return []
    value = list(override.sweep_iterator()) if override.is_discrete_sweep() else override.value()
    return [item.text if isinstance(item, QuotedString) else item for item in (value if isinstance(value, list) else [value])]
