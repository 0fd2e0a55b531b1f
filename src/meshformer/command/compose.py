"""Turn a command line into one resolved plain dict: Hydra's composition, our schema and checks, and a recorded run's settings. Without torch.

This uses the `Hydra` object rather than `hydra.main`, which prints tracebacks, exits with code 1 and composes again in each process.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from meshformer.checkpoint.check import is_own
from meshformer.checkpoint.find import candidates, is_foreign
from meshformer.command.check import check, resolve
from meshformer.command.hydra_object import Hydra as Hydra
from meshformer.command.hydra_object import make_hydra as make_hydra
from meshformer.command.lightning_parts import keys_as_typed, settled
from meshformer.command.recorded import without_option
from meshformer.config import ConfigError, did_you_mean, validate
from meshformer.config.foreign import confine, read_config, refuse_links
from meshformer.config.paths import conf_dir, run_of
from meshformer.config.signature import TargetNotFound, attribute, signature
from meshformer.huggingface import pinned
from meshformer.huggingface.source import derive, tokenizer_of
from meshformer.huggingface.transformers_config import from_the_folder, inline, is_transformers
from meshformer.model.settings import FEATURES, FREE, HEAD, SHAPES
from meshformer.record import RunNotFound, find_run
from meshformer.tasks.check import has_own_head

Config = dict[str, Any]
Refuse = Callable[[str, Any], ConfigError]
WHOLE_ENV = re.compile(r"\$\{oc\.env:[^${}]*\}")
SECRET = re.compile(r"\$\{oc\.env:\s*([^,}\s]*(?:secret|token|passw|api_?key|access_?key|private_?key|credential)[^,}\s]*)", re.IGNORECASE)

# Settings that a resumed run may change (CONTRACTS 6); any other change would make it a different run.
RESUMABLE = (
    "strategy", "trainer.devices", "trainer.num_nodes", "trainer.accelerator", "trainer.threads", "trainer.max_steps", "trainer.max_epochs",
    "trainer.accumulate_grad_batches", "trainer.progress", "trainer.compile", "trainer.val_check_interval",
    "trainer.detect_anomaly", "trainer.profiler", "callbacks", "logger", "paths", "launch", "data.source.cache",
    "data.workers", "data.eval_batch_size", "allow",
)  # fmt: skip
EVALUABLE = (
    "trainer.threads", "trainer.precision", "trainer.accelerator", "trainer.limit_val_batches", "data", "task.decoding", "task.beam_width",
    "paths", "allow",
)  # fmt: skip
OF_TASKS = ("causal", "head", "tie_embeddings")  # settings of the model in conf/task/
PER_MACHINE = (
    "strategy",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.threads",
)  # config.yaml holds the values resolved for the machine that wrote it


def compose_config(hydra: Hydra, config_name: str, overrides: Sequence[str], multirun: bool = False) -> DictConfig:
    mode = RunMode.MULTIRUN if multirun else RunMode.RUN
    # hydra.mode comes last, so that the command's mode wins over one in the overrides.
    try:
        cfg = hydra.compose_config(config_name, [*overrides, f"hydra.mode={mode.name}"], mode)
    except UnicodeDecodeError as error:
        raise _not_utf8(hydra, error) from error
    except ValueError as error:  # Hydra raises a bare ValueError for `group=null`
        if "Config group override must be" not in str(error):
            raise
        nulls = [override.partition("=")[0] for override in overrides if override.endswith("=null")]
        if not nulls:
            raise _not_an_option(overrides, error) from error
        raise ConfigError("a group cannot be null", fix=f"Leave it out with {' '.join(f'~{name}' for name in nulls)}.") from error
    HydraConfig.instance().set_config(cfg)
    return cfg


def _not_utf8(hydra: Hydra, error: UnicodeDecodeError) -> ConfigError:
    """Find the file with the bad byte, which Hydra's error does not name."""
    folders = [Path(item.path.removeprefix("file://")) for item in hydra.config_loader.get_search_path().get_path() if item.path.startswith("file://")]
    for file in (file for folder in folders for file in sorted(folder.rglob("*.yaml"))):
        contents = file.read_bytes()
        try:
            contents.decode("utf-8")
        except UnicodeDecodeError as found:
            line = contents.count(b"\n", 0, found.start) + 1
            fix = f"Convert it: iconv -f latin1 -t utf-8 {shlex.quote(str(file))}"
            return ConfigError(f"{file}, line {line}, is not UTF-8 (byte 0x{contents[found.start]:02x})", fix=fix)
    return ConfigError(f"a configuration file is not UTF-8 ({error.reason})")


def _not_an_option(overrides: Sequence[str], error: Exception) -> ConfigError:
    """Return the error for a group that was given a number, a list or a boolean instead of the name of an option."""
    for name, _, value in (override.lstrip("+").partition("=") for override in overrides):
        options = sorted(file.stem for file in (conf_dir() / name).glob("*.yaml")) if name.replace("/", "").isidentifier() else []
        if options and value not in options:
            return ConfigError("there is no such option", name, value, fix=f"Choose from {', '.join(options)}.")
    return ConfigError(str(error))


def _refuse_groups_as_values(config: Config) -> None:
    """Raise ConfigError for `model.position=rotary`, which replaces a group of settings by a text; `model/position=rotary` was meant."""
    for folder in sorted(folder for folder in conf_dir().rglob("*") if folder.is_dir()):
        path = folder.relative_to(conf_dir()).parts
        node: Any = config
        for part in path:
            node = node.get(part) if isinstance(node, dict) else None
        if len(path) > 1 and node is not None and not isinstance(node, dict):
            options = sorted(file.stem for file in folder.glob("*.yaml"))
            group = "/".join(path)
            fix = f"Write {group}={node}." if node in options else f"Write {group}= and one of {', '.join(options)}."
            raise ConfigError("is a group of settings", ".".join(path), node, fix=fix)


def plain(cfg: DictConfig) -> Config:
    """Return the job's part of a composed configuration as a plain dict with interpolations resolved. Needs HydraConfig to be set."""
    job = copy.copy(cfg)
    OmegaConf.set_struct(job, False)
    job.pop("hydra", None)
    _refuse_secrets(OmegaConf.to_container(job, resolve=False))
    job.pop("sweep", None)
    config = OmegaConf.to_container(job, resolve=True)
    assert isinstance(config, dict)
    _decode_environment(OmegaConf.to_container(job, resolve=False), config)
    if config.get("experiment", "") is None:
        config["experiment"] = "unnamed"
    return {str(key): value for key, value in config.items()}


def _decode_environment(written: Any, resolved: Any) -> None:
    """Parse values that come whole from an environment variable (`optimizer.lr='${oc.env:LR}'`): OmegaConf leaves them as strings."""
    for name in written if isinstance(written, dict) else range(len(written)) if isinstance(written, list) else ():
        if isinstance(resolved[name], dict | list):
            _decode_environment(written[name], resolved[name])
        elif isinstance(resolved[name], str) and isinstance(written[name], str) and WHOLE_ENV.fullmatch(written[name]):
            with suppress(ValueError):
                resolved[name] = json.loads(resolved[name])


def _refuse_secrets(node: Any, key: str = "") -> None:
    """Raise ConfigError for a value read from a secret environment variable: config.yaml, TensorBoard and checkpoints would store it."""
    if isinstance(node, str) and (found := SECRET.search(node)):
        message = f"the value of {found[1]}, which looks like a secret, would be written to the run's records"
        raise ConfigError(message, key, fix="Leave it out: libraries read such variables from the environment themselves.")
    for name, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        _refuse_secrets(child, f"{key}.{name}" if key else str(name))


def settle(config: Config, overrides: Sequence[str] = ()) -> Config:
    """Validate, resolve and check a plain train configuration. Raises ConfigError; changes nothing on disk.

    `overrides` are those the user typed: when fine-tuning adopts settings of the run it starts from, these keep the user's values.
    """
    if config.get("allow") and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # the user's own modules lie in the current folder; appended last so that they shadow nothing
    _refuse_groups_as_values(config)
    typed = _without_task_settings(config, overrides)
    config = settled(typed, overrides)
    with keys_as_typed(typed, config):
        config = validate(from_the_folder(config))
    if is_transformers(config["model"]):
        config = inline(config, attribute(config["task"]["_target_"], "objective", "next"))
    if config["stage"]["name"] == "finetune" and config["resume"] is None:
        foreign = False
        if config["fork"] is None and config["stage"]["init_from"] is not None:
            spec, paths = config["stage"]["init_from"], config["paths"]
            found = locate_foreign(spec, paths["data"])
            foreign = found is not None
            source = found or locate_weights(spec, paths["runs"], "stage.init_from")
            config = {**config, "stage": {**config["stage"], "init_from": str(source)}}
        if (source := config["fork"] or config["stage"]["init_from"]) is not None:
            if foreign and is_transformers(config["model"]):
                config = adopt_tokenizer(config, Path(source), overrides)
            else:
                config = adopt_foreign(config, Path(source), overrides) if foreign else adopt(config, read_config(run_of(source)), overrides)
            config = validate(config)
    elif is_transformers(config["model"]) and config["stage"]["init_from"] is not None and config["resume"] is None and config["fork"] is None:
        config = adopt_tokenizer(config, Path(config["stage"]["init_from"]), overrides)
    config = resolve(config)
    check(config)
    return config


def _without_task_settings(config: Config, overrides: Sequence[str]) -> Config:
    """Drop the settings that a file of conf/task/ gives to every model (`causal`, say) where the model's class has none of that name."""
    model = config.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("_target_"), str):
        return config
    try:
        accepted = signature(model["_target_"])
    except TargetNotFound:  # validate() says so
        return config
    if accepted.open_ended:
        return config
    typed = {override.lstrip("+~").partition("=")[0] for override in overrides}
    dropped = {key for key in OF_TASKS if key not in accepted.parameters and f"model.{key}" not in typed}
    return {**config, "model": {key: value for key, value in model.items() if key not in dropped}}


def adopt(config: Config, source: Config, overrides: Sequence[str]) -> Config:
    """Take the model's shape and the tokenizer from the run that fine-tuning starts from, except those that the command sets itself.

    If that run uses the user's own model class, all settings are taken except those that the weights do not determine (FREE). The user's own
    attention may have weights, so it counts as part of the shape.
    """
    typed = [override.lstrip("+~").partition("=")[0] for override in overrides]
    named = {name.replace("/", ".").split(".")[1] for name in typed if name.replace("/", ".").startswith("model.")}
    config = {**config, "model": dict(config["model"]), "data": dict(config["data"])}
    if is_transformers(source["model"]):
        mine = {key: config["model"][key] for key in named & config["model"].keys()}
        config["model"] = {**source["model"], "auto_class": "auto", "outputs": None, "context_length": config["data"]["context_length"], **mine}
        config = inline(config, attribute(config["task"]["_target_"], "objective", "next"))
    elif "model" not in typed:
        theirs, own_head = source["model"], HEAD if has_own_head(config) else ()
        keys = {*SHAPES, "position", "causal"}
        if is_own(config["model"]) and config["model"]["_target_"] != theirs["_target_"]:
            keys -= {"_target_"}  # a class chosen e.g. by the experiment: weights that both models have are matched by name
        elif is_own(theirs) and "_target_" not in named:
            free = theirs.keys() & {*FREE, *own_head, "vocab_size", "context_length"}
            config["model"] = {key: value for key, value in config["model"].items() if key in named | free}
            keys = theirs.keys() - (free & config["model"].keys())
        if is_own(theirs.get("attention")) and not is_own(config["model"].get("attention")):
            keys = keys | {"attention"}
        for key in (key for key in theirs if key in keys and key not in {*own_head, *named}):
            config["model"][key] = copy.deepcopy(theirs[key])
        if "model.context_length" not in typed and source["model"].get("context_length", 0) >= config["data"]["context_length"]:
            config["model"]["context_length"] = source["model"]["context_length"]  # a learned position table has that many rows
    for key in ("tokenizer", "vocab_size", *(FEATURES if config["data"]["kind"] == source["data"].get("kind") == "speech" else ())):
        if f"data.{key}" not in typed:
            config["data"][key] = source["data"][key]
    return config


def adopt_foreign(config: Config, source: Path, overrides: Sequence[str]) -> Config:
    """Take the whole model and the tokenizer from foreign weights. Raises ConfigError for an override that contradicts them."""
    try:
        theirs = derive(source)
    except ConfigError as error:
        raise ConfigError(error.message, "stage.init_from", fix=error.fix) from None
    names = [override.lstrip("+~").partition("=")[0].replace("/", ".") for override in overrides]
    if "model" in names:
        message = "fine-tuning takes the model from the weights it starts from"
        raise ConfigError(message, "model", value_of(overrides, "model"), fix="Leave it out.")
    own = config["model"] if config["model"]["_target_"] == theirs["_target_"] else {k: v for k, v in config["model"].items() if k in FREE}
    if has_own_head(config):  # the task has its own head, so that of the weights is dropped
        theirs = {key: value for key, value in theirs.items() if key not in HEAD}
    typed = {name.split(".")[1] for name in names if name.startswith("model.")} & config["model"].keys()
    model = {**own, **theirs, **{key: own[key] for key in FREE if key in own}, **{key: config["model"][key] for key in typed}}
    for key in sorted(typed & theirs.keys() - {*FREE, "context_length"}):
        if model[key] != theirs[key]:
            has = theirs[key]["_target_"].rpartition(".")[2] if key == "position" else theirs[key]
            message = f"the weights in {source} have {has}"
            raise ConfigError(message, f"model.{key}", None if key == "position" else model[key], fix="Leave it out.")
    if config["data"]["kind"] == "speech":
        return {**config, "model": model, "data": _features(config["data"], model, names)}
    return adopt_tokenizer({**config, "model": model}, source, overrides)


def _features(data: Config, model: Config, typed: Sequence[str]) -> Config:
    """The data settings with the features that a pretrained encoder of speech reads, Whisper's; a setting that was typed stays, to be checked."""
    theirs = {"sample_rate": 16000, "mels": model.get("mels"), "scaling": "whisper", "frames_per_token": model.get("subsampling")}
    theirs["context_length"] = model.get("context_length")
    return {**data, **{key: value for key, value in theirs.items() if value is not None and f"data.{key}" not in typed}}


def adopt_tokenizer(config: Config, source: Path, overrides: Sequence[str]) -> Config:
    """Take the tokenizer of foreign weights. Raises ConfigError for another one that was typed."""
    data, names = dict(config["data"]), [override.lstrip("+~").partition("=")[0] for override in overrides]
    if tokenizer_of(source) is not None and "tokenizer" in data:
        if "data.tokenizer" in names and data["tokenizer"] != "pretrained":
            message = "finetuning keeps the tokenizer of the weights it starts from"
            raise ConfigError(message, "data.tokenizer", data["tokenizer"], fix="Leave it out.")
        data["tokenizer"] = "pretrained"
    return {**config, "data": data}


def compose(overrides: Sequence[str] = (), config_name: str = "train", config_dir: str | None = None) -> Config:
    """Return the resolved configuration that `meshformer train OVERRIDES` would use. For tests and notebooks."""
    return settle(plain(compose_config(make_hydra(config_dir), config_name, overrides)), overrides)


def locate(spec: str, runs: str, key: str) -> Path:
    """Return the absolute folder of the run named by `spec`."""
    try:
        run = find_run(spec, runs).absolute()
    except RunNotFound as error:
        raise ConfigError(str(error), key, spec) from None
    refuse_links(run, key, spec)
    return run


def locate_foreign(spec: str, cache: str) -> Path | None:
    """Return the absolute path of the foreign weights named by `spec`, or None if it names none. Downloads known models given by name."""
    path = Path(spec).expanduser()
    if spec in pinned.MODELS and not path.exists():
        return pinned.folder(spec, Path(cache)).absolute()
    return path.absolute() if path.exists() and is_foreign(path) else None


def locate_weights(spec: str, runs: str, key: str) -> Path:
    """Return the absolute path named by `spec`: an existing checkpoint RUN/checkpoints/step-… or a run folder."""
    path = Path(spec).expanduser().absolute()
    if run_of(path) == path:
        return locate(spec, runs, key)
    if not path.exists():
        have = [found.name for found in candidates(run_of(path))]
        raise ConfigError("there is no such checkpoint", key, spec, fix=did_you_mean(path.name, have) if have else None)
    refuse_links(run_of(path), key, spec)
    return path


def take(overrides: Sequence[str], *keys: str) -> tuple[dict[str, str], list[str]]:
    """Separate the `key=value` overrides of these keys from the rest. Values stay as typed, without surrounding quotes; null is dropped."""
    taken: dict[str, str] = {}
    rest: list[str] = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or key.lstrip("+") not in keys:
            rest.append(override)
            continue
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        if value != "null":
            taken[key.lstrip("+")] = value
    return taken, rest


def value_of(overrides: Sequence[str], key: str, default: Any = None) -> Any:
    """Return the value of the last override of `key`."""
    found = [override for override in overrides if override.lstrip("+").startswith(f"{key}=")]
    return OverridesParser.create().parse_overrides(found)[-1].value() if found else default


def quoted(text: str) -> str:
    """Quote `text` so that Hydra reads it literally."""
    return QuotedString(text, Quote.single).with_quotes()


def combine(hydra: Hydra, config_name: str, before: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Combine a run's recorded overrides with new ones.

    A new option of a group drops the recorded settings that the old option's file has; a new `strategy=` drops all of the strategy's.
    """
    roots = [Path(source.path) for source in hydra.config_loader.get_sources() if source.scheme() == "file"]
    chosen = dict(override.split("=", 1) for override in overrides if re.match(r"[\w/]+=", override))
    chosen = {group: option for group, option in chosen.items() if any((root / group).is_dir() for root in roots)}
    old = compose_config(hydra, config_name, before).hydra.runtime.choices if chosen else {}
    for group in chosen:
        if group == "strategy":
            before = [override for override in before if override.lstrip("+~").partition("=")[0].partition(".")[0] != "strategy"]
        elif isinstance(old.get(group), str) and old[group] != chosen[group]:
            before = without_option(before, group, [root / group / f"{old[group]}.yaml" for root in roots])
    # Hydra refuses to add (+) or delete (~) a key twice, so a recorded override that is typed again is dropped.
    again = {override.partition("=")[0] for override in overrides if override.startswith(("+", "~"))}
    return [*(override for override in before if override.partition("=")[0] not in again), *overrides]


def recorded(
    hydra: Hydra, config_name: str, run: Path, before: Sequence[str], overrides: Sequence[str], allowed: Sequence[str], refuse: Refuse
) -> Config:
    """Apply new overrides to a run's recorded configuration; the result is neither confined nor resolved. `before`: the run's own overrides.

    The base is the recorded config.yaml, so that a later edit under conf/ does not change an old run. The new overrides contribute the difference
    between composing with and without them. `refuse(key, recorded value)` makes the error for a changed key that is not in `allowed`.
    """
    config = read_config(run)
    old = plain(compose_config(hydra, config_name, before))
    new = plain(compose_config(hydra, config_name, combine(hydra, config_name, before, overrides)))
    changed = differences(old, new)
    nodes = [key.removesuffix("_target_") for key in changed if key.endswith("._target_")]
    changed = [key for key in changed if key != "experiment"]  # a run keeps the name of its folder
    for key in (key for key in changed if key.endswith("._target_") or not key.startswith(tuple(nodes))):
        part = next((part for part in allowed if key == part or key.startswith(f"{part}.")), None)
        if part is None:
            raise refuse(key, _get(config, key))
        # Another class takes other arguments, so a node with another `_target_` is replaced whole.
        target = key.removesuffix("._target_") if part in ("trainer", "data", "paths") and "." in key else part
        _set(config, target, copy.deepcopy(_get(new, target)))
        if key.startswith("data.") and not _holds(new, key):
            _get(config, "data").pop(key.removeprefix("data."), None)  # a setting of the old option alone: validation gives its default
    for key in PER_MACHINE:
        _set(config, key, copy.deepcopy(_get(new, key)))
    # A run folder is not trusted: its `allow` list counts only if this command repeats it.
    config["allow"] = value_of(overrides, "allow", [])
    return config


def own(hydra: Hydra, config_name: str, overrides: Sequence[str]) -> Config:
    """Compose the command without the folder it continues, to learn its own paths and the loggers and callbacks that it names."""
    try:
        return plain(compose_config(hydra, config_name, overrides))
    except (HydraException, OmegaConfBaseException):  # an override that is valid only on top of the recorded ones
        own = [o for o in overrides if o.lstrip("+").startswith(("paths.", "logger=", "callbacks=", "+logger.", "+callbacks."))]
        return plain(compose_config(hydra, config_name, own))


def within(config: Config, mine: Config, overrides: Sequence[str]) -> Config:
    """Confine `config`, read from a folder, to the paths of this command, whose `overrides` compose to `mine`."""
    return confine(config, mine["paths"], mine, value_of(overrides, "data.source.cache"))


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Return the dotted keys whose values differ."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [path]
    keys = list(dict.fromkeys([*old, *new]))
    return [key for name in keys for key in differences(old.get(name), new.get(name), f"{path}.{name}" if path else str(name))]


def _get(config: Config, key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _holds(config: Config, key: str) -> bool:
    parent, _, last = key.rpartition(".")
    node = _get(config, parent)
    return isinstance(node, dict) and last in node


def _set(config: Config, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    node = config
    for part in parents:
        node = node.setdefault(part, {})
    node[last] = value
