"""Settings that are fine alone and wrong together. Runs before a folder is made or a process started, on a resolved configuration."""

from __future__ import annotations

import math
import os
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from meshformer.config.bounds import check_bounds, check_cache, check_memory
from meshformer.config.check_layout import check_batch, check_cut, check_processes, check_settings
from meshformer.config.compilation import lacking
from meshformer.config.errors import ConfigError
from meshformer.config.foreign import read_config
from meshformer.config.paths import run_of
from meshformer.config.resolve import gpus_multiply_bf16
from meshformer.config.signature import attribute
from meshformer.config.stock import check_stock
from meshformer.config.suggest import did_you_mean
from meshformer.config.tasks import HEAD, check_labelled_files, check_task, has_own_head

Config = dict[str, Any]
# What finetuning must share with the run it starts from, or the weights do not fit.
SHAPES = (
    "_target_", "n_layers", "n_heads", "n_kv_heads", "d_model", "d_ff", "norm", "norm_position", "embedding_norm", "token_types", "activation",
    "bias", "qk_norm", "tie_embeddings", "head_dim", "norm_eps", "attention_bias", "head", "head_bias", "head_transform",
)  # fmt: skip
BF16 = ("bf16-mixed", "bf16-true")
MODEL_PARTS = ("embedding", "position", "blocks", "norm", "head")  # of a Transformer
ABSENT = {"head": True, "head_bias": False, "head_transform": False}  # values where a run is older than the setting; else null


def check(config: Config) -> None:
    """Raise ConfigError for the first impossible combination, naming what to write instead."""
    for part in (
        _finite,
        check_bounds,
        check_cache,
        check_stock,
        check_processes,
        check_settings,
        check_batch,
        _precision,
        _length,
        _files,
        check_labelled_files,
        _model,
        check_cut,
        _compile,
        check_memory,
        check_task,
        _rates,
        _patterns,
        _stage,
        _commands,
        _saving,
    ):
        part(config)


def _precision(config: Config) -> None:
    if config["trainer"]["precision"] == "16-mixed" and config["trainer"]["accelerator"] == "cpu":
        raise ConfigError("half precision needs a GPU", "trainer.precision", "16-mixed", fix="Use bf16-mixed, 32-true or auto.")
    if config["trainer"]["accelerator"] == "gpu" and config["trainer"]["precision"] in BF16 and not gpus_multiply_bf16():
        raise no_bf16(config["trainer"]["precision"])


def no_bf16(precision: str) -> ConfigError:
    """Of a GPU older than Ampere (a V100, a T4)."""
    message = "this machine's GPU has no bfloat16 matrix units, and would emulate them"
    return ConfigError(message, "trainer.precision", precision, fix="Use 32-true, or 16-mixed with strategy=single or ddp.")


def _compile(config: Config) -> None:
    missing = lacking(config["trainer"]["accelerator"])
    if config["trainer"]["compile"] and missing is not None:
        raise ConfigError(f"torch.compile needs {missing}", "trainer.compile", "true", fix="Install it, or use trainer.compile=false.")


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
    if not attribute(model["_target_"], "usual_settings"):
        return
    for key in ("attention", "position"):
        if key in model and not isinstance(model[key], dict):
            raise ConfigError("needs a _target_: the dotted name of a class or function", f"model.{key}", model[key])
    width, heads, kv_heads, head_dim = (model.get(key) for key in ("d_model", "n_heads", "n_kv_heads", "head_dim"))
    for key in ("n_layers", "n_heads", "n_kv_heads", "d_model", "d_ff", "context_length", "vocab_size", "window"):
        if model.get(key) is not None and model[key] < 1:
            raise ConfigError("must be at least 1", f"model.{key}", model[key])
    if width is not None and heads is not None and width % heads and head_dim is None:
        below, above = width // heads * heads, (width // heads + 1) * heads
        usable = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(
            f"does not divide by model.n_heads={heads}", "model.d_model", width, fix=f"Use {usable}, or another number of heads."
        )
    if kv_heads is not None and heads is not None and heads % kv_heads:
        divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ConfigError(f"model.n_heads={heads} does not divide by it", "model.n_kv_heads", kv_heads, fix=f"Use one of {divisors}.")
    even = attribute(str(model.get("position", {}).get("_target_", "")), "needs_even_heads", False)
    if even and head_dim is not None and head_dim % 2:
        raise ConfigError("rotary positions need an even head size", "model.head_dim", head_dim, fix=f"Use {head_dim + 1}.")
    if even and width is not None and heads is not None and head_dim is None and width // heads % 2:
        message = f"rotary positions need an even head size, and model.d_model={width} / model.n_heads={heads} is {width // heads}"
        raise ConfigError(message, "model.n_heads", heads, fix=f"Use model.d_model={width + heads}, or model/position=learned.")
    if model.get("head_transform"):
        for key, value in {"norm_position": "post", "head": True}.items():
            if model.get(key, value) != value:
                raise ConfigError(
                    f"belongs to models with model.{key}={_plain(value)}", "model.head_transform", "true", fix="Leave it out."
                )
    if model.get("context_length") is not None and model["context_length"] < data["context_length"]:
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
    def look(node: Any, key: str) -> None:
        if isinstance(node, float) and not math.isfinite(node):
            raise ConfigError("is no finite number", key, node)
        for name, child in node.items() if isinstance(node, dict) else ():
            look(child, f"{key}.{name}" if key else name)

    look(config, "")


def _patterns(config: Config) -> None:
    """The beginnings of patterns of parameters' names; which names there are in full is known in the job."""
    model, stage = config["model"], config["stage"]
    if stage.get("reinit") and (stage.get("lora") or {}).get("rank"):
        message = "adapters alone learn, so what is drawn anew would stay as drawn"
        raise ConfigError(message, "stage.reinit", stage["reinit"], fix="Leave it or stage.lora.rank out.")
    if not str(model["_target_"]).startswith("meshformer.model."):
        return
    for key in ("freeze", "reinit"):
        for pattern in config["stage"].get(key) or ():
            part, _, rest = pattern.partition(".")
            if not set(part) & set("*?[") and part not in MODEL_PARTS:  # (a wildcard may reach over dots)
                raise ConfigError(
                    "no parameter has such a name", f"stage.{key}", pattern, fix=f"Names begin with {', '.join(MODEL_PARTS)}."
                )
            number = rest.partition(".")[0]
            if part == "blocks" and not set(number) & set("*?") and not any(fnmatchcase(str(n), number) for n in range(model["n_layers"])):
                fix = f"Use 0 to {model['n_layers'] - 1}, or blocks.*."
                raise ConfigError("there is no such block", f"stage.{key}", pattern, fix=fix)


def _stage(config: Config) -> None:
    stage = config["stage"]
    source = stage["init_from"]
    if config["fork"] is not None and (recorded := Path(config["fork"]) / "config.yaml").is_file():
        check_fits(config, read_config(recorded.parent)["model"], "the run to fork")
    if config["resume"] is not None or config["fork"] is not None:
        return  # the weights are in the run by now; where they came from may be gone
    if stage["name"] == "pretrain":
        if source is not None:
            raise ConfigError(
                "stage=pretrain starts from scratch and would ignore it", "stage.init_from", source, fix="Add stage=finetune."
            )
        if config["data"]["tokenizer"] == "pretrained":
            raise ConfigError("comes with pretrained weights", "data.tokenizer", "pretrained", fix="Use char or bpe, or stage=finetune.")
        return
    if source is None and stage.get("pretrain"):
        message = "trains another run first, once, which a sweep or a fork does not"
        fix = "Train that run by a command of its own, and add stage.init_from=RUN stage.pretrain=null."
        raise ConfigError(message, "stage.pretrain", stage["pretrain"], fix=fix)
    if source is None:
        raise ConfigError(
            "stage=finetune needs weights to start from", "stage.init_from", fix="Add stage.init_from=RUN, a run folder or last."
        )
    if not Path(source).exists():
        raise ConfigError("there is no such run, checkpoint or model", "stage.init_from", source)
    recorded = run_of(source) / "config.yaml"
    if not recorded.is_file():  # weights from outside, which compose.py has compared
        return
    before = read_config(recorded.parent)
    check_fits(config, before["model"], "the run to start from", by_name=True)
    if config["data"]["tokenizer"] != before["data"].get("tokenizer"):
        message = f"finetuning keeps the tokenizer of the run it starts from, which is {before['data'].get('tokenizer')}"
        raise ConfigError(
            message, "data.tokenizer", config["data"]["tokenizer"], fix=f"Use data.tokenizer={before['data'].get('tokenizer')}."
        )


def is_own(node: Any) -> bool:
    """Whether a part is of a class or function of the user's."""
    return isinstance(node, dict) and not str(node.get("_target_", "meshformer.")).startswith("meshformer.")


def check_fits(config: Config, theirs: Config, who: str, by_name: bool = False) -> None:
    """ConfigError for the first of the model's settings with which the weights of `who`, whose model is `theirs`, would not fit.

    `by_name`: of a class of the user's on either side, that shares some tensors with the other, those decide that are compared when they are
    loaded, by name and shape.
    """
    left_out = HEAD if has_own_head(config) else ()
    if is_own(config["model"]) or is_own(theirs):
        shared = config["model"].keys() & theirs.keys() - ({"_target_"} if by_name else set())
        left_out = (*left_out, *(key for key in SHAPES if key not in shared))
    for key in (key for key in SHAPES if key not in left_out):
        mine, other = (node.get(key, ABSENT.get(key)) for node in (config["model"], theirs))
        if mine != other:
            raise ConfigError(
                f"{who} has model.{key}={_plain(other)}, so its weights do not fit",
                f"model.{key}",
                _plain(mine),
                fix=f"Use the model of that run: model.{key}={_plain(other)}, or the model= that its overrides.txt names.",
            )
    mine, other = (node.get("position", {}).get("_target_") for node in (config["model"], theirs))
    if mine != other:
        raise ConfigError(f"{who} has {other}, so its weights do not fit", "model.position._target_", mine)


def _commands(config: Config) -> None:
    if config["run"] is not None:
        raise ConfigError(
            "belongs to `meshformer evaluate` and `generate`", "run", config["run"], fix="To continue that run write resume=."
        )


def _saving(config: Config) -> None:
    """Rules of which checkpoints are kept, where they could never apply."""
    saving, max_steps = config["callbacks"].get("checkpoint"), config["trainer"]["max_steps"]
    if not saving or not str(saving["_target_"]).startswith("meshformer."):
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
