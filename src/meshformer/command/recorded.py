"""overrides.txt of a run, and the overrides in a sweep's sweep.json: written, and read as what a stranger may have written.

Values of our own keys are read from them, and nothing else: no setting of Hydra's, which builds what it is told to, and no place where it looks
for files. Each line is parsed by Hydra's own parser before it is judged, so that no way of writing it hides what it means.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, QuotedString
from hydra.errors import HydraException

from meshformer.config import ConfigError, Root

COMMAND_KEYS = ("hydra", "sweep.")  # settings of one command rather than of a run
# What a run was continued from is for the command to say: it would be read from there.
OWN = {spec.name for spec in dataclasses.fields(Root)} - {"run", "resume", "fork"} | {"sweep"}
OPTION = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)*")  # a file of a group: neither absolute nor with a way up
# The settings of our own launcher, numbers that hurt nobody.
LAUNCHER = {"hydra.launcher.cores", "hydra.launcher.gpus", "hydra.launcher.warm"}


def write_overrides(overrides: Sequence[str], config_dir: str | None, config_name: str | None) -> str:
    """The text of overrides.txt: a line each, flags first. Hydra's own settings and a sweep's are left out: they concern one command, not the run."""
    flags = [f"--config-dir={Path(config_dir).absolute()}"] if config_dir else []
    flags += [f"--config-name={config_name}"] if config_name not in (None, "train") else []
    lines = [line if "\n" not in line else json.dumps(line) for line in overrides if not line.lstrip("+~").startswith(COMMAND_KEYS)]
    return "".join(f"{line}\n" for line in flags + lines)


def read_overrides(run: Path, config_dir: str | None = None, key: str | None = None) -> tuple[list[str], str | None, str | None]:
    """The overrides, --config-dir (as the folder claims) and --config-name that made a run.

    `config_dir`: the command's own. With `key`, the setting that names the run, ConfigError where the run had one and the command has none.
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
        confirmed(flags.get("--config-dir"), config_dir, key, run)
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
    """`overrides`, which `place` holds, when each gives a value to one of our own keys. ConfigError on the first that does not.

    The groups in the folder of settings that the command names, `config_dir`, are its user's own.
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
    """Of a sweep's recorded overrides those of its runs. Those of Hydra count only where the command repeats them, by key: ConfigError otherwise."""
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


def confirmed(recorded: str | None, typed: str | None, key: str, folder: Path) -> str | None:
    """The --config-dir of a command that continues what `folder` holds: the command's. A folder of settings is not taken on that folder's word."""
    if recorded is not None and typed is None:
        message = "it was made with a configuration folder of its own, which is read only where the command names it"
        raise ConfigError(message, key, str(folder), fix=f"If you trust what is in there, add --config-dir={recorded} to the command.")
    return typed


def option_name(value: Any, place: str, key: str = "--config-name") -> Any:
    """`value`, None or the name of a file in a group of conf/, which does not lead out of it."""
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
    if isinstance(override.value(), Glob):  # takes names that are there
        return []
    value = list(override.sweep_iterator()) if override.is_discrete_sweep() else override.value()
    return [item.text if isinstance(item, QuotedString) else item for item in (value if isinstance(value, list) else [value])]
