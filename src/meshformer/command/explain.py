"""Turn errors of Hydra, OmegaConf and YAML into one sentence with the key, the value and a suggestion."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from meshformer.command.compose import Hydra, compose_config
from meshformer.config import ConfigError, did_you_mean
from meshformer.config.paths import conf_dir
from meshformer.config.trainer_keys import INSTEAD
from meshformer.printing import argument
from meshformer.record.run_folder import is_run

# Groups of Hydra in which users name a plugin, and what does its work here.
OWN_PLUGINS = {
    "hydra/sweeper": "Searches are built in: sweep=search, or sweep.search=tpe.",
    "hydra/launcher": "Use local, the default, which runs as many at a time as fit on the machine, or slurm.",
}
EXPLAINED = (HydraException, OmegaConfBaseException, yaml.YAMLError)


def explain(error: Exception, hydra: Hydra, config_name: str, overrides: Sequence[str]) -> ConfigError:
    """Return the ConfigError for an exception raised by composition."""
    found: ConfigError | None = None
    if isinstance(error, yaml.YAMLError):
        found = _yaml(error)
    elif isinstance(error, OverrideParseException):
        found = _unreadable(error, config_name)
    elif isinstance(error, MissingConfigException):
        found = _missing(error)
    elif isinstance(error.__cause__, OmegaConfBaseException) and not str(error):
        return explain(error.__cause__, hydra, config_name, overrides)
    return found or _composition(error, hydra, config_name, overrides)


def _yaml(error: yaml.YAMLError) -> ConfigError:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    where = f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}" if mark else "a YAML file"
    return ConfigError(f"{where}: {problem}", fix="Check the indentation, colons and quotes there.")


def _unreadable(error: OverrideParseException, config_name: str) -> ConfigError:
    override = error.override
    if "=" not in override and not override.startswith("~"):
        return ConfigError("is not an override", override, fix=_for_a_bare_word(override, config_name))
    key, _, value = override.partition("=")
    return ConfigError(f"cannot be read ({_first_line(error)})", key, value, fix=f"Quote the value: \"{key}='{value}'\".")


def _for_a_bare_word(word: str, config_name: str) -> str:
    """What was meant by a word without `=`: usually a run."""
    reads_run = config_name in ("evaluate", "generate", "convert", "export")
    if word in ("resume", "fork", "run"):
        return f"Write {word if not reads_run else 'run'}=RUN, for example {word if not reads_run else 'run'}=last."
    if word == "last" or is_run(Path(word).expanduser()):
        return f"Did you mean {argument('run', word)}?" if reads_run else f"Did you mean {argument('resume', word)} or {argument('fork', word)}?"
    return "Write key=value, for example " + ("run=last." if reads_run else "trainer.max_steps=100.")


def _missing(error: MissingConfigException) -> ConfigError | None:
    name = error.missing_cfg_file or ""
    if error.options is not None and "/" in name:
        group, _, option = name.rpartition("/")
        if group in OWN_PLUGINS:
            return ConfigError("there is no such option", group, option, fix=OWN_PLUGINS[group])
        return ConfigError("there is no such option", group, option, fix=did_you_mean(option, error.options))
    if "primary config" in str(error):
        names = [path.stem for path in conf_dir().glob("*.yaml")]
        return ConfigError("there is no such configuration", "--config-name", name, fix=did_you_mean(name, names))
    return None


def _composition(error: Exception, hydra: Hydra, config_name: str, overrides: Sequence[str]) -> ConfigError:
    text = f"{error}\n{error.__cause__ or ''}"
    if match := re.search(r"Could not override '([^'@]+)", text):
        return _unknown_key(match[1], hydra, config_name, overrides)
    if match := re.search(r"(?:Ambiguous value for argument|Sweep parameters) '([^'=]+)=(.*?)'(?: requires|\n)", text):
        fix = f"Add -m to try them in turn, write {match[1]}=[a,b] for a list, or quote the text."
        return ConfigError("several values at once", match[1], match[2], fix)
    if match := re.search(r"Could not delete from config\. '?([^' ]+)' does not exist", text):
        return _unknown_key(match[1], hydra, config_name, overrides)
    if match := re.search(r"Could not append to config\. An item is already at '([^']+)'", text):
        return ConfigError("the configuration has it already", f"+{match[1]}", fix="Leave the + out.")
    if match := re.search(r"([\w/]+) appears more than once in the final defaults list", text):
        return ConfigError("one is chosen already", f"+{match[1]}", fix="Leave the + out.")
    if match := re.search(r"Error merging override ([^=]+)=(.*)", text):
        return ConfigError(
            "is not a valid value here", match[1], match[2].rstrip("'"), fix="`meshformer train --cfg job` shows what it looks like."
        )
    if match := re.search(r"Environment variable '([^']+)' not found", text):
        return ConfigError(f"it refers to the environment variable {match[1]}, which is not set", getattr(error, "full_key", None))
    if match := re.search(r"Missing mandatory value: ([\w.]+)", text):
        return ConfigError("needs a value", match[1], fix=f"Add {match[1]}=… to the command.")
    full_key = getattr(error, "full_key", None) or getattr(error.__cause__, "full_key", None)
    if match := re.search(r"Interpolation key '([^']+)' not found", text):
        return ConfigError(
            f"it refers to ${{{match[1]}}}, which does not exist", full_key, fix=did_you_mean(match[1], keys_of(hydra, config_name))
        )
    return ConfigError(_first_line(error) or _first_line(error.__cause__), full_key or None)


def _unknown_key(key: str, hydra: Hydra, config_name: str, overrides: Sequence[str]) -> ConfigError:
    groups = groups_of(hydra)
    if "/" in key:
        return ConfigError("there is no such group", key, fix=did_you_mean(key, groups))
    if key.endswith("._target_"):
        return ConfigError("there is no such part", key, fix=f"To add one, write +{key}=….")
    option = _option_with(key)
    if option:
        return ConfigError("the chosen configuration has no such setting", key, fix=f"It comes with {option}.")
    if key.startswith("trainer.") and (instead := INSTEAD.get(key.removeprefix("trainer."))):
        return ConfigError("is an argument of Lightning's that is no setting here", key, fix=instead)
    words = keys_of(hydra, config_name, overrides)
    ending = [word for word in words if word.endswith(f".{key}")] if "." not in key else []
    fix = f"Did you mean {min(ending, key=len)}?" if ending else did_you_mean(key, words if "." in key else [*words, *groups])
    if fix is not None and fix.startswith("Choose"):  # no close match: list the settings at that level instead of all
        parent = key
        while parent and parent not in words:
            parent = parent.rpartition(".")[0]
        prefix = f"{parent}." if parent else ""
        fix = did_you_mean("", [word for word in words if word.startswith(prefix) and "." not in word[len(prefix) :]])
    return ConfigError("there is no such setting", key, fix=fix)


def groups_of(hydra: Hydra) -> list[str]:
    """List the groups of conf/ and of the user's folder by their directories. Hydra's own listing of groups would take a second."""
    roots = [Path(source.path) for source in hydra.config_loader.get_sources() if source.scheme() == "file"]
    folders = [(folder, root) for root in roots for folder in root.rglob("*") if folder.is_dir() and any(folder.glob("*.yaml"))]
    return sorted({folder.relative_to(root).as_posix() for folder, root in folders} - {"hydra"})


def keys_of(hydra: Hydra, config_name: str, overrides: Sequence[str] = ()) -> list[str]:
    """List every dotted key of the composed configuration, with the group choices of `overrides` if these can be composed."""
    groups = set(groups_of(hydra))
    for choices in ([o for o in overrides if o.partition("=")[0] in groups], []):
        try:
            cfg = compose_config(hydra, config_name, choices)
        except EXPLAINED:
            continue
        return _walk(OmegaConf.to_container(cfg, resolve=False), "")
    return []


def _walk(node: Any, path: str) -> list[str]:
    found: list[str] = [path] if path else []
    for key, value in node.items() if isinstance(node, dict) else ():
        if path or key != "hydra":
            found += _walk(value, f"{path}.{key}" if path else str(key))
    return found


def _option_with(key: str) -> str | None:
    """Return the first option of the key's group whose file has that setting, for example `data=text` for `data.files`."""
    group, _, rest = key.partition(".")
    for file in sorted((conf_dir() / group).glob("*.yaml")) if rest else ():
        node: Any = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        for part in rest.split("."):
            node = node.get(part, KeyError) if isinstance(node, dict) else KeyError
        if node is not KeyError:
            return f"{group}={file.stem}"
    return None


def _first_line(error: BaseException | None) -> str:
    return next((line.strip() for line in str(error or "").splitlines() if line.strip()), "")


class explain_errors:
    """Context manager that turns an exception of Hydra's composition into a ConfigError and lets every other one through."""

    def __init__(self, hydra: Hydra, config_name: str, overrides: Sequence[str]) -> None:
        self.arguments = hydra, config_name, overrides

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, EXPLAINED):
            raise explain(error, *self.arguments) from error
