"""Settings that are fine alone and wrong together. Runs before a folder is made or a process started, on a resolved configuration."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import yaml

from meshformer.config.check_layout import check_batch, check_cut, check_processes, check_settings
from meshformer.config.errors import ConfigError
from meshformer.config.paths import run_of
from meshformer.config.suggest import did_you_mean

Config = dict[str, Any]
PAIRED = ("Rotary",)  # positions that need an even head size
# What finetuning must share with the run it starts from, or the weights do not fit.
SHAPES = (
    "_target_", "n_layers", "n_heads", "n_kv_heads", "d_model", "d_ff", "norm", "norm_position", "embedding_norm", "token_types", "activation",
    "bias", "qk_norm", "tie_embeddings",
)  # fmt: skip


def check(config: Config) -> None:
    """Raise ConfigError for the first impossible combination, naming what to write instead."""
    for part in (
        check_processes,
        check_settings,
        check_batch,
        _precision,
        _length,
        _files,
        _model,
        check_cut,
        _rates,
        _stage,
        _commands,
        _saving,
    ):
        part(config)


def _precision(config: Config) -> None:
    if config["trainer"]["precision"] == "16-mixed" and config["trainer"]["accelerator"] == "cpu":
        raise ConfigError("half precision needs a GPU", "trainer.precision", "16-mixed", fix="Use bf16-mixed, 32-true or auto.")


def _length(config: Config) -> None:
    trainer, schedule = config["trainer"], config["schedule"]
    if trainer["max_steps"] is None and trainer["max_epochs"] is None:
        raise ConfigError("trainer.max_steps and trainer.max_epochs are both null: training would never end", fix="Set one of them.")
    warmup = schedule.get("warmup_steps")
    # A warm-up longer than training is allowed: `trainer.max_steps=2` is what everybody tries first, and the ramp just ends early.
    if warmup is not None and warmup < 0:
        raise ConfigError("must not be negative", "schedule.warmup_steps", warmup)


def _files(config: Config) -> None:
    files = config["data"]["files"]
    if files is None:
        return
    if not files:
        raise ConfigError("names no file", "data.files", fix="Use data.files=[a.txt,b.txt].")
    for name in files:
        path = Path(name)
        if path.is_dir():
            raise ConfigError("is a folder", "data.files", name, fix=f"Use data.files='{name}/*.txt' for the texts in it.")
        if not path.exists():
            nearby = sorted(p.name for p in path.parent.iterdir() if p.is_file()) if path.parent.is_dir() else []
            raise ConfigError("there is no such file", "data.files", name, fix=did_you_mean(path.name, nearby))
        if not os.access(path, os.R_OK):
            raise ConfigError("may not be read", "data.files", name)
        if path.stat().st_size == 0:
            raise ConfigError("is empty", "data.files", name)


def _model(config: Config) -> None:
    model, data = config["model"], config["data"]
    if model["_target_"] != "meshformer.model.Transformer":
        return
    width, heads, kv_heads = model["d_model"], model["n_heads"], model.get("n_kv_heads")
    for key in ("n_layers", "n_heads", "n_kv_heads", "d_model", "d_ff", "context_length", "vocab_size", "window"):
        if model.get(key) is not None and model[key] < 1:
            raise ConfigError("must be at least 1", f"model.{key}", model[key])
    if width % heads:
        below, above = width // heads * heads, (width // heads + 1) * heads
        sizes = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(
            f"does not divide by model.n_heads={heads}", "model.d_model", width, fix=f"Use {sizes}, or another number of heads."
        )
    if kv_heads is not None and heads % kv_heads:
        divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ConfigError(f"model.n_heads={heads} does not divide by it", "model.n_kv_heads", kv_heads, fix=f"Use one of {divisors}.")
    position = str(model.get("position", {}).get("_target_", "")).rpartition(".")[2]
    if position in PAIRED and (width // heads) % 2:
        message = f"rotary positions need an even head size, and model.d_model={width} / model.n_heads={heads} is {width // heads}"
        raise ConfigError(message, "model.n_heads", heads, fix=f"Use model.d_model={width + heads}, or model/position=learned.")
    if model.get("causal") is False and config["task"].get("_target_") == "meshformer.tasks.LanguageModelling":
        raise ConfigError(
            "predicting the next token is no task when the model sees it", "model.causal", False, fix="Use model.causal=true."
        )
    if not 0 <= model.get("dropout", 0.0) < 1:
        raise ConfigError("must be at least 0 and below 1", "model.dropout", model["dropout"])
    if model["context_length"] < data["context_length"]:
        message = f"the model sees fewer tokens than a sample has (data.context_length={data['context_length']})"
        raise ConfigError(message, "model.context_length", model["context_length"], fix="Leave it out, or make it at least as long.")
    if data["tokenizer"] == "bpe" and model.get("vocab_size") is not None and model["vocab_size"] < data["vocab_size"]:
        message = f"the tokenizer has more entries (data.vocab_size={data['vocab_size']})"
        raise ConfigError(message, "model.vocab_size", model["vocab_size"], fix="Leave it out: the tokenizer's size is taken.")


def _rates(config: Config) -> None:
    for key in ("lr", "adamw_lr"):
        rate = config["optimizer"].get(key)
        if isinstance(rate, int | float) and rate <= 0:
            raise ConfigError("a learning rate must be above 0", f"optimizer.{key}", rate)


def _stage(config: Config) -> None:
    stage = config["stage"]
    source = stage["init_from"]
    if config["resume"] is not None or config["fork"] is not None:
        return  # the weights are in the run by now; where they came from may be gone
    if stage["name"] == "pretrain":
        if source is not None:
            raise ConfigError(
                "stage=pretrain starts from scratch and would ignore it", "stage.init_from", source, fix="Add stage=finetune."
            )
        return
    if source is None:
        raise ConfigError(
            "stage=finetune needs weights to start from", "stage.init_from", fix="Add stage.init_from=RUN, a run folder or last."
        )
    recorded = run_of(source) / "config.yaml"
    if not recorded.is_file():
        raise ConfigError("is not a run folder: it holds no config.yaml", "stage.init_from", source)
    before = yaml.safe_load(recorded.read_text(encoding="utf-8"))
    for key in SHAPES:
        mine, theirs = config["model"].get(key), before["model"].get(key)
        if mine != theirs:
            raise ConfigError(
                f"the run to start from has model.{key}={_plain(theirs)}, so its weights do not fit",
                f"model.{key}",
                _plain(mine),
                fix=f"Use the model of that run: model.{key}={_plain(theirs)}, or the model= that its overrides.txt names.",
            )
    mine, theirs = (node["model"].get("position", {}).get("_target_") for node in (config, before))
    if mine != theirs:
        raise ConfigError(f"the run to start from has {theirs}, so its weights do not fit", "model.position._target_", mine)
    if config["data"]["tokenizer"] != before["data"]["tokenizer"]:
        message = f"finetuning keeps the tokenizer of the run it starts from, which is {before['data']['tokenizer']}"
        raise ConfigError(message, "data.tokenizer", config["data"]["tokenizer"], fix=f"Use data.tokenizer={before['data']['tokenizer']}.")


def _commands(config: Config) -> None:
    if config["run"] is not None:
        raise ConfigError(
            "belongs to `meshformer evaluate` and `generate`", "run", config["run"], fix="To continue that run write resume=."
        )


def _saving(config: Config) -> None:
    """Rules of which checkpoints are kept, where they could never apply."""
    saving, max_steps = config["callbacks"].get("checkpoint"), config["trainer"]["max_steps"]
    if not saving or saving["_target_"] != "meshformer.callbacks.Checkpoint":
        return
    key, every = "callbacks.checkpoint", saving.get("every_n_steps", 500)
    best, often = saving.get("keep_best", 0), saving.get("keep_every_n_steps")
    for name in ("keep_best", "keep_every_n_steps"):
        if saving.get(name) and saving.get("keep_last") == 0:
            raise ConfigError(f"{key}.keep_last=0 keeps every checkpoint", f"{key}.{name}", saving[name], fix="Leave one of them out.")
    if often and often % every:
        raise ConfigError(
            f"no multiple of {key}.every_n_steps={every}, so the checkpoints of those steps are not there to keep",
            f"{key}.keep_every_n_steps",
            often,
            fix=f"Use {often // every * every or every} or {(often // every + 1) * every}.",
        )
    both = math.lcm(every, config["trainer"]["val_check_interval"])
    if best and not str(saving.get("monitor", "val/loss")).startswith("val/"):
        raise ConfigError("is no validation metric", f"{key}.monitor", saving["monitor"], fix="Use val/loss.")
    if best and max_steps is not None and every <= max_steps < both:
        message = (
            f"the first step that is saved ({key}.every_n_steps={every}) and validated "
            f"(trainer.val_check_interval={config['trainer']['val_check_interval']}) is {both}, after the last"
        )
        raise ConfigError(message, f"{key}.keep_best", best, fix="Give both the same interval.")


def _plain(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
