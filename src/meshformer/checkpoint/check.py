"""Whether the weights that a run starts from exist and fit its model, decided from the two configurations. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from meshformer.config.errors import ConfigError
from meshformer.config.foreign import read_config
from meshformer.config.paths import run_of
from meshformer.config.signature import defaults
from meshformer.model.settings import HEAD, SHAPES

Config = dict[str, Any]


def check_start(config: Config, own_head: bool) -> None:
    """ConfigError unless the weights that the run starts from exist and fit its model. `own_head`: as for `check_fits`."""
    stage = config["stage"]
    source = stage["init_from"]
    if config["fork"] is not None and (recorded := Path(config["fork"]) / "config.yaml").is_file():
        check_fits(config["model"], read_config(recorded.parent)["model"], "the run to fork", own_head)
    if config["resume"] is not None or config["fork"] is not None:
        return  # the run has the weights itself now; the path they came from may no longer exist
    if stage["name"] == "pretrain":
        if source is not None and config["model"].get("path") != source:
            raise ConfigError(
                "stage=pretrain starts from scratch and would ignore it", "stage.init_from", source, fix="Add stage=finetune."
            )
        if config["data"]["tokenizer"] == "pretrained" and source is None:
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
    if not recorded.is_file():  # weights of another program, which compose.py has compared
        return
    before = read_config(recorded.parent)
    check_fits(config["model"], before["model"], "the run to start from", own_head, by_name=True)
    if config["data"]["tokenizer"] != before["data"].get("tokenizer"):
        message = f"finetuning keeps the tokenizer of the run it starts from, which is {before['data'].get('tokenizer')}"
        raise ConfigError(
            message, "data.tokenizer", config["data"]["tokenizer"], fix=f"Use data.tokenizer={before['data'].get('tokenizer')}."
        )


def is_own(node: Any) -> bool:
    """Whether the node's `_target_` is a class or function of the user's."""
    return isinstance(node, dict) and not str(node.get("_target_", "meshformer.")).startswith("meshformer.")


def check_fits(model: Config, theirs: Config, who: str, own_head: bool, by_name: bool = False) -> None:
    """ConfigError for the first setting in which `model` differs from `theirs`, the model of `who`, so that its weights would not fit.

    Args:
        own_head: the task trains a head of its own, so the settings of the other model's head do not matter.
        by_name: if one of the two is a class of the user's, compare only the settings that both have. Their tensors are compared by name and
            shape when they are loaded.
    """
    left_out = HEAD if own_head else ()
    if is_own(model) or is_own(theirs):
        shared = model.keys() & theirs.keys() - ({"_target_"} if by_name else set())
        left_out = (*left_out, *(key for key in SHAPES if key not in shared))
    both = [(node, defaults(str(node.get("_target_", "")))) for node in (model, theirs)]  # an older run may lack a setting
    for key in (key for key in SHAPES if key not in left_out):
        mine, other = (node.get(key, usual.get(key)) for node, usual in both)
        if mine != other:
            raise ConfigError(
                f"{who} has model.{key}={_plain(other)}, so its weights do not fit",
                f"model.{key}",
                _plain(mine),
                fix=f"Use the model of that run: model.{key}={_plain(other)}, or the model= that its overrides.txt names.",
            )
    mine, other = (node.get("position", {}).get("_target_") for node in (model, theirs))
    if mine != other:
        raise ConfigError(f"{who} has {other}, so its weights do not fit", "model.position._target_", mine)


def _plain(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
