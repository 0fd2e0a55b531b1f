"""Builds the objects of a resolved configuration (a plain dict). The only module that calls `hydra.utils.instantiate`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import hydra.utils
import lightning.pytorch as pl
from hydra.errors import InstantiationException
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.profilers import AdvancedProfiler, PassThroughProfiler, Profiler, SimpleProfiler

from meshformer.callbacks import EMA, Checkpoint, ExactResume, Layout, Profile, ProgressBar, Rows, Samples
from meshformer.checkpoint.lightning_io import FolderCheckpointIO
from meshformer.compat.lightning import disable_signal_handling
from meshformer.config.allow import check_object, check_target
from meshformer.config.errors import ConfigError
from meshformer.config.foreign import refuse_interpolations
from meshformer.config.resolve import external_launcher
from meshformer.config.signature import signature
from meshformer.data import Features, ImageData, OwnData, SampledData, SequenceData, SpeechData, TextData
from meshformer.job.loggers import given_by_run, one_at_a_time, refuse_others
from meshformer.model.layout import Plan
from meshformer.model.lora import ADAPTERS, add_adapters
from meshformer.model.settings import HEAD_PARAMETERS
from meshformer.optim.groups import LayerRates
from meshformer.parallel.strategies import make_strategy
from meshformer.profile.parts import FOLDER
from meshformer.tasks.check import has_own_head, padding_multiple
from meshformer.tasks.plain import Hosted
from meshformer.training.precision import LossScaling

Config = dict[str, Any]
UNEXPECTED = re.compile(r"unexpected keyword argument '?(.*?)'?$")  # the TypeError of a class that forwards **kwargs


def instantiate(node: Config, config: Config, key: str, **values: Any) -> Any:
    """Builds `node["_target_"]` with the node's settings and `values`. ConfigError if a target inside is not on the allow-list."""
    refuse_interpolations(node, "the configuration", key)
    for where, target in _targets(node, key):
        check_target(target, config.get("allow", ()), where)
        check_object(hydra.utils.get_object(target), target, config.get("allow", ()), where)
    return _make(node, values)


def _make(node: Config, values: dict[str, Any]) -> Any:
    inner = {name: _make(child, {}) for name, child in node.items() if isinstance(child, dict) and "_target_" in child}
    try:
        made = hydra.utils.instantiate(node, **inner, **values, _convert_="all")
    except InstantiationException as error:  # Hydra wraps the component's own error
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        if isinstance(error.__cause__, TypeError) and (taken := UNEXPECTED.search(str(error.__cause__))):
            raise ConfigError(f"{node['_target_']} takes no argument {taken[1]}", fix="Leave it out.") from None
        raise
    if isinstance(made, partial):
        # Hydra's partial checks its target at every call, which takes 0.1 ms per attention layer and step.
        return partial(made.func, *made.args, **made.keywords) if made.args or made.keywords else made.func
    return made


def _targets(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield f"{key}._target_", node["_target_"]
        for name, child in node.items():
            yield from _targets(child, f"{key}.{name}")
    elif isinstance(node, list):
        for index, child in enumerate(node):
            yield from _targets(child, f"{key}[{index}]")


def build_data(config: Config, fixed_tokenizer: Any = None) -> SampledData:
    """The data module for `data.kind`, with batches as the task needs them."""
    data = _data_of_kind(config, fixed_tokenizer)
    data.overfit_batches = config["trainer"]["overfit_batches"]
    return data


def _data_of_kind(config: Config, fixed_tokenizer: Any) -> SampledData:
    data = config["data"]
    shared = {
        "source": instantiate(data["source"], config, "data.source"),
        "batch_size": data["batch_size"],
        "seed": config["seed"],
        "eval_batch_size": data["eval_batch_size"],
        "workers": data["workers"],
        "accumulation": config["trainer"]["accumulate_grad_batches"],
    }
    if data["kind"] == "own":
        lock = Path(config["paths"]["data"]).expanduser() / "own-data.lock"
        source = shared.pop("source")
        if not isinstance(source, pl.LightningDataModule):
            raise ConfigError("is no LightningDataModule", "data.source._target_", data["source"]["_target_"])
        return OwnData(source, lock, dicts=not getattr(task_class(config), "calls_steps", False), **shared)
    if data["kind"] == "images":
        return ImageData(**shared, **{key: data[key] for key in ("image_size", "shift", "rotate", "zoom")})
    text = {
        "context_length": data["context_length"],
        "tokenizer": data["tokenizer"],
        "vocab_size": data["vocab_size"],
        "cache": Path(config["paths"]["data"]).expanduser(),
        "fixed_tokenizer": fixed_tokenizer,
        "unknown": "replace" if config["stage"]["name"] == "finetune" else "error",
    }
    if data["kind"] == "speech":
        features = Features(data["sample_rate"], data["mels"], data["scaling"])
        augmented = {key: data[key] for key in ("frames_per_token", "speeds", "mask_mels", "mask_frames", "skip_bad")}
        return SpeechData(**shared, **text, **augmented, features=features, pad_to=math.lcm(8, config["strategy"].get("tensor", 1)))
    objective = task_class(config).objective
    if data["kind"] == "corpus":
        return TextData(**shared, **text, masked=objective == "mask")
    group, microbatches = config["task"].get("group", 1), config["strategy"].get("microbatches", 1)
    return SequenceData(
        **shared,
        **text,
        objective=objective,
        packing=data["packing"],
        classes=data["classes"],
        pad_to=padding_multiple(config),
        eval_multiple=group * microbatches if objective == "pairs" else 1,
    )


def task_class(config: Config) -> Any:
    target = config["task"]["_target_"]
    check_target(target, config.get("allow", ()), "task._target_")
    return hydra.utils.get_object(target)


def build_model(config: Config) -> Any:
    """The model, with the LoRA adapters and the frozen parameters that `stage` configures."""
    node, plan = dict(config["model"]), None
    accepted = signature(node["_target_"])
    if "plan" not in accepted.parameters and (said := node.pop("plan", None)) is not None:
        plan = build_plan(said, config)
    # A user's model without an argument `seed` draws its weights from torch's global generator, seeded in job/train.py.
    seed = {"seed": config["seed"]} if accepted.open_ended or "seed" in accepted.parameters else {}
    model = instantiate(node, config, "model", **seed)
    if plan is not None:
        model.plan = plan
    stage = config["stage"]
    if (lora := stage.get("lora") or {}).get("rank"):
        if not hasattr(model, "initial_value"):
            raise ConfigError(
                "adapters are for models that draw each weight by its name, as Transformer does", "stage.lora.rank", lora["rank"]
            )
        try:
            add_adapters(model, lora["rank"], lora["alpha"], lora["targets"], config["seed"])
        except ValueError as error:
            raise ConfigError(str(error), "stage.lora.targets", lora["targets"]) from None
        trained = (*ADAPTERS, *(getattr(model, "head_parameters", HEAD_PARAMETERS) if has_own_head(config) else ()))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in trained))
    freeze(model, stage.get("freeze") or ())
    fitting((name for name, _ in model.named_parameters()), stage.get("reinit") or (), "stage.reinit")  # checked here; load_weights applies it
    return Hosted(model) if isinstance(model, pl.LightningModule) else model


def build_plan(said: Config | str, config: Config) -> Plan:
    """The Plan in `model.plan`: a dict of its settings, or the dotted name of a Plan in an allowed module."""
    if isinstance(said, str):
        check_target(said, config.get("allow", ()), "model.plan")
        try:
            found = hydra.utils.get_object(said)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"there is no such plan ({error})", "model.plan", said) from None
        if not isinstance(found, Plan):
            raise ConfigError(f"is no Plan, but {type(found).__name__}", "model.plan", said)
        return found
    try:
        return Plan(**said)
    except (TypeError, ValueError) as error:  # an unknown setting or style
        raise ConfigError(str(error), "model.plan") from None


def freeze(model: Any, patterns: Sequence[str]) -> None:
    """Freezes the parameters whose names match a pattern. ConfigError for a pattern without a match."""
    parameters = dict(model.named_parameters())
    for name in fitting(parameters, patterns, "stage.freeze"):
        parameters[name].requires_grad_(False)


def fitting(names: Iterable[str], patterns: Sequence[str], key: str) -> list[str]:
    """The names that match one of the patterns. ConfigError for a pattern without a match."""
    names, found = list(names), []
    for pattern in patterns:
        fit = [name for name in names if fnmatchcase(name, pattern)]
        if not fit:
            kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
            raise ConfigError("no parameter has such a name", key, pattern, fix=f"Names are {', '.join(kinds)}.")
        found += fit
    return found


def build_task(config: Config, max_steps: int) -> pl.LightningModule:
    """The task with factories for its model, optimizer and schedule; Lightning builds the model later, through `configure_model`."""
    optimizer = dict(config["optimizer"])
    for key in optimizer:
        if key == "lr" or key.endswith("_lr"):
            optimizer[key] *= config["stage"].get("lr_scale", 1.0)
    stage = config["stage"]
    rates = LayerRates(stage.get("layer_decay", 1.0), stage.get("head_lr_scale", 1.0), stage.get("unfreeze_every"), HEAD_PARAMETERS)
    task = instantiate(
        config["task"],
        config,
        "task",
        model=partial(build_model, config),
        optimizer=rates.of(instantiate(optimizer, config, "optimizer")),
        schedule=instantiate({**config["schedule"], "_partial_": True}, config, "schedule"),
        max_steps=max_steps,
        seed=config["seed"],
        tokens_per_step=config["data"]["batch_size"] * config["data"]["context_length"],
    )
    task.gradient_clip_val = config["trainer"]["gradient_clip_val"]
    return task


def build_callbacks(config: Config, folder: Path, steps_per_epoch: int) -> list[pl.Callback]:
    """The configured callbacks and those of every run. Rows must come after the callbacks that measure and before those that save."""
    configured: list[Any] = [instantiate(node, config, f"callbacks.{name}") for name, node in config["callbacks"].items() if node]
    configured = [c for c in configured if not (isinstance(c, Checkpoint) and c.every_n_steps is None)]
    for callback in configured:
        if isinstance(callback, Checkpoint):
            callback.folder = folder / "checkpoints"
        if isinstance(callback, Samples):
            callback.folder = folder / "samples"
        if isinstance(callback, Profile):
            callback.folder = folder / FOLDER
    saving = [c for kind in (EMA, Checkpoint) for c in configured if isinstance(c, kind)]
    rows = Rows(folder, config["trainer"]["log_every_n_steps"])
    rows.tolerant = any(isinstance(c, Checkpoint) and c.on_failure == "warn" for c in configured)
    progress = [Layout(config["strategy"]), ProgressBar(rows)] if config["trainer"]["progress"] else []
    return [c for c in configured if c not in saving] + [ExactResume(steps_per_epoch), rows, *progress, *saving]


def build_loggers(config: Config, folder: Path) -> dict[str, Any]:
    """Name -> logger. They write into the run folder or the runs folder, or send. The Rows callback writes metrics.csv in any case."""
    nodes = {name: node for name, node in (config.get("logger") or {}).items() if node}
    with one_at_a_time(nodes.values(), config):
        made = {name: instantiate(node, config, f"logger.{name}", **given_by_run(name, node, config, folder)) for name, node in nodes.items()}
        refuse_others(made, config, folder)
    return made


class NoProfiler(PassThroughProfiler):
    """Lightning enters about fifty profiler contexts a step. Its pass-through profiler creates a generator for each: 0.9 ms a step on a slow core."""

    _context = nullcontext()

    def profile(self, action_name: str) -> Any:
        return self._context


def _validation_batches(config: Config) -> int | None:
    """`trainer.limit_val_batches` as a number of the data module's evaluation batches. With data.eval_batch_size=null the setting counts batches of
    data.batch_size samples, but evaluation batches have the size of a micro-batch."""
    limit, accumulation = config["trainer"]["limit_val_batches"], config["trainer"]["accumulate_grad_batches"]
    return limit if limit is None or config["data"]["eval_batch_size"] is not None else limit * accumulation


def _same_graph(config: Config) -> bool:
    """Whether DDP may use static_graph: our models and tasks (a user's may have branches) without gradient accumulation."""
    own = all(config[part]["_target_"].startswith("meshformer.") for part in ("model", "task"))
    return own and config["trainer"]["accumulate_grad_batches"] == 1


def _profiler(kind: str | None, folder: Path) -> Profiler:
    """Lightning's profiler of its hooks, which writes RUN/fit-hooks.txt at the end of training."""
    if kind is None:
        return NoProfiler()
    return (SimpleProfiler if kind == "simple" else AdvancedProfiler)(dirpath=folder, filename="hooks")


def build_trainer(config: Config, folder: Path, max_steps: int, callbacks: list[pl.Callback], loggers: list[Any]) -> pl.Trainer:
    trainer = config["trainer"]
    device = "cuda:0" if trainer["accelerator"] == "gpu" else "cpu"
    scaled = [LossScaling("16-mixed", device)] if trainer["precision"] == "16-mixed" else []
    made = pl.Trainer(
        accelerator=trainer["accelerator"],
        devices=trainer["devices"],
        num_nodes=trainer["num_nodes"],
        strategy=make_strategy(config["strategy"], trainer["compile"], config["data"]["context_length"], _same_graph(config), device),
        precision=None if scaled else trainer["precision"],
        max_steps=max_steps,
        max_epochs=-1,
        val_check_interval=min(trainer["val_check_interval"], max_steps),
        check_val_every_n_epoch=None,  # count steps over all epochs
        limit_val_batches=_validation_batches(config),
        deterministic=trainer["deterministic"],
        callbacks=callbacks,
        logger=loggers,
        # In the shell of a SLURM allocation, Lightning would see SLURM_NTASKS and take this process for one of several tasks.
        plugins=[FolderCheckpointIO(), *scaled, *([LightningEnvironment()] if external_launcher() is None else [])],
        profiler=_profiler(trainer["profiler"], folder),
        detect_anomaly=trainer["detect_anomaly"],
        log_every_n_steps=trainer["log_every_n_steps"],
        default_root_dir=folder,
        num_sanity_val_steps=0,
        enable_checkpointing=False,  # callbacks.Checkpoint does it
        enable_progress_bar=False,  # callbacks.ProgressBar does it
        enable_model_summary=False,
        use_distributed_sampler=False,  # data/ shards one global order over the ranks
    )
    disable_signal_handling(made)
    return made
