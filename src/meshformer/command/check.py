"""Resolve `auto` values and run every configuration check, in one fixed order, without importing torch.

Each package checks its own settings (`check.py` in model/, data/, checkpoint/, parallel/ and tasks/). This module holds the checks that belong to
no package, or to one whose import loads torch. All checks run before a folder is made or a process is started.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from meshformer.checkpoint.check import check_start
from meshformer.command.lightning_parts import check_lightning_parts
from meshformer.command.stock import check_stock
from meshformer.config.bounds import Range, check_ranges, setting
from meshformer.config.errors import ConfigError
from meshformer.config.resolve import cores
from meshformer.config.resolve import resolve as resolve_machine
from meshformer.config.signature import attribute, defaults
from meshformer.data.check import check_cache, check_files, check_labelled_files, check_room, check_tfrecord, check_tokenizer
from meshformer.huggingface.transformers_config import check as check_transformers
from meshformer.model import check as model_check
from meshformer.parallel.check import check_batch, check_cut, check_precision, check_processes, check_settings
from meshformer.parallel.compilation import check_compile, compiles
from meshformer.parallel.memory import check_memory
from meshformer.profile.check import check_profile
from meshformer.tasks.check import check_task, has_own_head

Config = dict[str, Any]
# Ranges of component settings: their annotations are plain `int` and `float`, which cannot express a range.
RANGES: dict[str, Range] = {
    "task.beam_width": (1, True, math.inf, False),
    "optimizer.eps": (0, True, 1, False),
    "optimizer.adamw_eps": (0, True, 1, False),
    "optimizer.momentum": (0, True, 1, False),
    "callbacks.throughput.measure_seconds": (0, False, 60, True),
    "callbacks.ema.decay": (0, True, 1, False),
    "callbacks.samples.max_tokens": (1, True, math.inf, False),
    "callbacks.samples.every_n_validations": (1, True, math.inf, False),
    "callbacks.checkpoint.every_n_steps": (1, True, math.inf, False),
    "callbacks.checkpoint.keep_last": (0, True, math.inf, False),
    "callbacks.checkpoint.keep_best": (0, True, math.inf, False),
    "callbacks.spike.window": (2, True, math.inf, False),
}
THREADS_PER_CORE = 8


def resolve(config: Config, env: Mapping[str, str] | None = None) -> Config:
    """Return a copy of a validated configuration with every `auto` and -1 replaced; trainer.compile comes last because it depends on the others."""
    config = resolve_machine(config, env)
    if config["trainer"]["compile"] == "auto":
        config["trainer"]["compile"], _ = compiles(config)
    return config


def check(config: Config) -> None:
    """Raise ConfigError for the first setting of a resolved configuration that is invalid by itself or in combination with the others."""
    for part in (
        _finite,
        _ranges,
        check_cache,
        check_stock,
        check_processes,
        check_lightning_parts,
        check_transformers,
        check_settings,
        check_batch,
        check_precision,
        _length,
        _schedule,
        check_files,
        check_labelled_files,
        check_tfrecord,
        _model,
        check_cut,
        check_compile,
        check_memory,
        check_task,
        _rates,
        _patterns,
        _start,
        _commands,
        _saving,
        check_profile,
    ):
        part(config)


def _ranges(config: Config) -> None:
    check_ranges(config, {**model_check.RANGES, **RANGES})
    for key in ("optimizer.betas", "optimizer.adamw_betas"):
        betas = setting(config, key)
        if betas is None:
            continue
        if not isinstance(betas, list) or len(betas) != 2 or not all(isinstance(b, int | float) and 0 <= b < 1 for b in betas):
            raise ConfigError("must be two numbers from 0 to below 1", key, betas, fix=f"[0.9,0.95] is usual: {key}=[0.9,0.95].")
    check_tokenizer(config)
    threads, most = config["trainer"]["threads"], THREADS_PER_CORE * cores()
    if threads > most:
        raise ConfigError(f"this machine has {cores()} cores", "trainer.threads", threads, fix=f"Use {cores()} at most, or auto.")


def _length(config: Config) -> None:
    trainer, schedule = config["trainer"], config["schedule"]
    if trainer["max_steps"] is None and trainer["max_epochs"] is None:
        raise ConfigError("trainer.max_steps and trainer.max_epochs are both null: training would never end", fix="Set one of them.")
    warmup = schedule.get("warmup_steps")
    # A warm-up longer than the training is allowed: many users first try `trainer.max_steps=2`, and the ramp then simply ends early.
    if warmup is not None and warmup < 0:
        raise ConfigError("must not be negative", "schedule.warmup_steps", warmup)


def _schedule(config: Config) -> None:
    """Refuse what a scheduler of torch cannot do here."""
    target = str(config["schedule"]["_target_"])
    if not target.startswith("torch.optim.lr_scheduler."):
        return
    name = target.rpartition(".")[2]
    if name == "ReduceLROnPlateau":
        message = "steps on a metric, and a schedule here is a function of the step"
        raise ConfigError(message, "schedule._target_", target, fix="Use schedule=wsd, or another class of torch.optim.lr_scheduler.")
    if name in ("LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler"):
        message = "is made of functions or of other schedulers, which a configuration cannot hold"
        fix = "Write a function of max_steps that returns a function from the step to the multiplier: docs/make_it_yours/task.md."
        raise ConfigError(message, "schedule._target_", target, fix=fix)
    if config["stage"].get("unfreeze_every"):
        message = "layers join by multipliers of the learning rate, and this schedule has none"
        raise ConfigError(message, "stage.unfreeze_every", config["stage"]["unfreeze_every"], fix="Use schedule=linear, cosine, wsd or constant.")


def _model(config: Config) -> None:
    if attribute(config["model"]["_target_"], "usual_settings"):
        for problem in model_check.problems(config["model"], attribute):
            raise ConfigError(*problem)
        check_room(config)


def _rates(config: Config) -> None:
    for key in ("lr", "adamw_lr"):
        rate = config["optimizer"].get(key)
        if isinstance(rate, int | float) and rate <= 0:
            raise ConfigError("a learning rate must be above 0", f"optimizer.{key}", rate)
    for group, key in (("optimizer", "momentum"), ("optimizer", "weight_decay"), ("schedule", "min_ratio"), ("schedule", "decay_fraction")):
        value = config[group].get(key)
        if isinstance(value, int | float) and (value < 0 or (group == "schedule" and value > 1)):
            raise ConfigError("must be from 0 to 1" if group == "schedule" else "must not be negative", f"{group}.{key}", value)
    if (config["callbacks"].get("ema") or {}).get("decay") == 1:
        raise ConfigError("such an average never moves", "callbacks.ema.decay", 1, fix="0.999 is usual.")
    threshold = (config["callbacks"].get("spike") or {}).get("threshold")
    if isinstance(threshold, int | float) and threshold <= 1:
        raise ConfigError("would skip about every other step", "callbacks.spike.threshold", threshold, fix="5 is a cautious start.")


def _finite(config: Config) -> None:
    def visit(node: Any, key: str) -> None:
        if isinstance(node, float) and not math.isfinite(node):
            raise ConfigError("is not a finite number", key, node)
        for name, child in node.items() if isinstance(node, dict) else ():
            visit(child, f"{key}.{name}" if key else name)

    visit(config, "")


def _patterns(config: Config) -> None:
    stage = config["stage"]
    if stage.get("reinit") and (stage.get("lora") or {}).get("rank"):
        message = "only the adapters are trained, so reinitialised weights would stay random"
        raise ConfigError(message, "stage.reinit", stage["reinit"], fix="Leave it or stage.lora.rank out.")
    if str(config["model"]["_target_"]).startswith("meshformer.model."):
        for key in ("freeze", "reinit"):
            for problem in model_check.misnamed(config["model"], f"stage.{key}", stage.get(key) or ()):
                raise ConfigError(*problem)


def _start(config: Config) -> None:
    check_start(config, has_own_head(config))


def _commands(config: Config) -> None:
    if config["run"] is not None:
        raise ConfigError(
            "belongs to `meshformer evaluate` and `generate`", "run", config["run"], fix="To continue that run write resume=."
        )


def _saving(config: Config) -> None:
    """Refuse rules for keeping checkpoints that could never take effect."""
    saving, max_steps = config["callbacks"].get("checkpoint"), config["trainer"]["max_steps"]
    if not saving or not str(saving["_target_"]).startswith("meshformer.callbacks."):
        return
    key, saving = "callbacks.checkpoint", {**defaults(saving["_target_"]), **saving}
    if saving.get("every_n_steps") is None:  # saves nothing, or another callback uses that name
        return
    every, best, often = (saving[name] for name in ("every_n_steps", "keep_best", "keep_every_n_steps"))
    for name in ("keep_best", "keep_every_n_steps"):
        if saving.get(name) and saving["keep_last"] == 0:
            raise ConfigError(f"{key}.keep_last=0 keeps every checkpoint", f"{key}.{name}", saving[name], fix="Leave one of them out.")
    if often and often % every:
        raise ConfigError(
            f"no multiple of {key}.every_n_steps={every}, so the checkpoints of those steps are not there to keep",
            f"{key}.keep_every_n_steps",
            often,
            fix=f"Use {often // every * every or every} or {(often // every + 1) * every}.",
        )
    if best and not str(saving["monitor"]).startswith("val/"):
        raise ConfigError("is not a validation metric", f"{key}.monitor", saving["monitor"], fix="Use val/loss.")
    if best and max_steps is not None and every <= max_steps < (both := math.lcm(every, config["trainer"]["val_check_interval"])):
        message = (
            f"the first step that is saved ({key}.every_n_steps={every}) and validated "
            f"(trainer.val_check_interval={config['trainer']['val_check_interval']}) is {both}, after the last"
        )
        raise ConfigError(message, f"{key}.keep_best", best, fix="Give both the same interval.")
