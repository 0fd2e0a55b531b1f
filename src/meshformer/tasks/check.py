"""Checks a task against the data, the model and the layout, using the class attributes that tasks/base.py documents. Imports no torch.

Takes a resolved configuration. For a task without `learns_from` only the attributes that it does declare are checked.
"""

from __future__ import annotations

from math import lcm
from typing import Any

from meshformer.config.arguments import places
from meshformer.config.degrees import Degrees
from meshformer.config.errors import ConfigError
from meshformer.config.signature import attribute, defaults, method

Config = dict[str, Any]
HOME = "meshformer.tasks."
KINDS = {"corpus": "running text", "texts": "single texts", "images": "images", "speech": "recordings", "own": "a LightningDataModule"}
EXAMPLES = {"corpus": "data=shakespeare", "texts": "data=sentiment", "images": "data=digits", "speech": "data=prompts"}
READ = {"tokens": ("corpus", "texts"), "images": ("images",), "speech": ("speech",)}  # what a model declares that it reads: the kinds of data
MODELS = {"corpus": "nano", "texts": "nano", "images": "vit_tiny", "speech": "speech_nano"}
CALLS = ("inputs", "phase_inputs", "arguments", "losses", "forward", "training_step")  # methods of a task that decide how the model is called
COLUMNS = {"label_column": "labels", "pair_column": "pairs"}


def declared(config: Config, name: str, default: Any = None) -> Any:
    """A class attribute of the task, its own or inherited, read from source."""
    return attribute(str(config["task"].get("_target_", "")), name, default)


def has_own_head(config: Config) -> bool:
    """Whether the task trains a new head, so that the head of pretrained weights is not loaded."""
    return bool(declared(config, "own_head")) or config["model"].get("outputs") is not None


def writes_text(config: Config) -> bool:
    """Whether the model of this run predicts next tokens. True for a user's task without `learns_from`, about which nothing is known."""
    judged = declared(config, "learns_from") is not None
    if declared(config, "calls_steps"):  # a LightningModule, whose forward nobody knows
        return False
    return (not judged or bool(declared(config, "writes_text"))) and config["model"].get("causal", True) is not False


def padding_multiple(config: Config) -> int:
    """Batches of texts are padded to a multiple of this: 16, and the number of ranks that shard the time dimension."""
    return lcm(16, config["strategy"].get("tensor", 1) * config["strategy"].get("context", 1))


def check_task(config: Config) -> None:
    """Raises ConfigError for a task that does not work with the data, the model or the layout."""
    judged = (_data,) if declared(config, "learns_from") else ()
    for part in (*judged, _reads, _images, _speech, _head, _causal, _own_model, _packing, _layout, _groups):
        part(config)


def _data(config: Config) -> None:
    data, task, kinds = config["data"], _option(config), declared(config, "learns_from")
    if data["kind"] not in (*kinds, "own"):  # of a LightningDataModule only its batches can tell
        given = str(data["source"].get("_target_", "")).rpartition(".")[2]
        message = f"learns from {' or '.join(KINDS[k] for k in kinds)}, and the data ({given}) is {KINDS[data['kind']]}"
        other = {"images": "task=image_classification", "speech": "task=speech_recognition"}.get(data["kind"])
        more = f", or {other} model={MODELS[data['kind']]}" if other else ""
        lacks_label = "texts" in kinds and data["kind"] == "corpus" and data["text_feature"] is not None
        fix = "Add data.label_feature=…." if lacks_label else f"Use {' or '.join(EXAMPLES[k] for k in kinds)}{more}."
        raise ConfigError(message, "task", task, fix=fix)
    column, source = declared(config, "needs_column"), data["source"]
    if column is not None and column in source and source[column] is None:
        message = f"task={task} learns from {COLUMNS[column]}: say which column holds them"
        raise ConfigError(message, f"data.{column}", fix=f"Add data.{column}=… to the command.")
    if declared(config, "objective") == "pairs" and column not in source:
        raise ConfigError("learns from pairs, and this data has none", "task", task, fix="Use data=csv data.pair_column=….")


def _reads(config: Config) -> None:
    model, kinds = config["model"], declared(config, "learns_from")
    reads = attribute(str(model.get("_target_", "")), "reads")
    if reads in READ and kinds is not None and not set(kinds) & set(READ[reads]):
        about = {"images": "images", "speech": "speech"}.get(kinds[0], "texts")
        message = f"reads {reads}, and the task is about {about}"
        raise ConfigError(message, "model._target_", model["_target_"], fix=f"Use model={MODELS[kinds[0]]}.")


def _images(config: Config) -> None:
    model, data = config["model"], config["data"]
    reads = attribute(str(model.get("_target_", "")), "reads")
    if reads == "images" and data["kind"] == "images" and data["image_size"] not in (None, model.get("image_size")):
        message = f"the images have {data['image_size']} × {data['image_size']} pixels (data.image_size)"
        raise ConfigError(message, "model.image_size", model.get("image_size"), fix=f"Use model.image_size={data['image_size']}.")


def _speech(config: Config) -> None:
    """Checks that the model reads the features that the data makes."""
    model, data = config["model"], config["data"]
    if data["kind"] != "speech":
        return
    for key, own, what in (("mels", "mels", "bands"), ("frames_per_token", "subsampling", "frames for a token")):
        if model.get(own) not in (None, data[key]):
            message = f"the model reads {model[own]} {what} (model.{own})"
            raise ConfigError(message, f"data.{key}", data[key], fix=f"Use data.{key}={model[own]}.")
    rate = data["sample_rate"]
    if rate % 100 or not 4000 <= rate <= 48000:
        message = "must be a multiple of 100 from 4,000 to 48,000, since there are 100 frames a second"
        raise ConfigError(message, "data.sample_rate", rate, fix="16000 is usual for speech.")
    if data["mels"] is not None and data["mels"] > 128:
        raise ConfigError("so many bands would hold no frequency each", "data.mels", data["mels"], fix="Use 80.")
    if data["scaling"] == "whisper" and (rate != 16000 or data["mels"] not in (80, 128)):
        message = "is that of Whisper, which reads 80 (or 128) bands of sound at 16,000 Hz"
        raise ConfigError(message, "data.scaling", "whisper", fix="Use data.sample_rate=16000 data.mels=80, or data.scaling=clip.")
    if config["trainer"]["deterministic"] and config["trainer"]["accelerator"] == "gpu":
        raise ConfigError("torch has no deterministic CTC loss on a GPU", "trainer.deterministic", "true", fix="Leave it out.")
    if not data["speeds"] or not all(0.5 <= speed <= 2 for speed in data["speeds"]):
        raise ConfigError("must be one or more speeds from 0.5 to 2", "data.speeds", data["speeds"], fix="[0.9,1.0,1.1] is usual.")


def _head(config: Config) -> None:
    model = config["model"]
    if model.get("outputs") is not None and model.get("tie_embeddings"):
        message = "a head of model.outputs classes cannot be the embedding's matrix"
        raise ConfigError(message, "model.tie_embeddings", "true", fix="Use model.tie_embeddings=false.")
    if declared(config, "needs_column") == "label_column":
        if model.get("tie_embeddings"):
            raise ConfigError("the classes need a head of their own", "model.tie_embeddings", "true", fix="Use model.tie_embeddings=false.")
        if model.get("head") is False:
            raise ConfigError(f"task={_option(config)} needs a head", "model.head", "false", fix="Leave it out.")


def _causal(config: Config) -> None:
    model = config["model"]
    if declared(config, "objective") == "mask" and model.get("causal") is True:
        message = "masked tokens are predicted from both sides, and a causal model sees only the left one"
        raise ConfigError(message, "model.causal", "true", fix="Use model.causal=false.")
    if declared(config, "writes_text") and model.get("causal") is False and attribute(model["_target_"], "usual_settings"):
        message = "next-token prediction is trivial for a model that sees the next token"
        raise ConfigError(message, "model.causal", False, fix="Use model.causal=true.")


def _own_model(config: Config) -> None:
    """Checks that the forward of a user's model accepts the arguments that a task of ours passes."""
    target, task = str(config["model"]["_target_"]), str(config["task"]["_target_"])
    calls = [method(task, name) for name in CALLS]
    if declared(config, "calls_steps"):
        return
    forward = None if target.startswith(("meshformer.", "torch.")) else method(target, "forward")
    if forward is None or not all(found is not None and found.module.startswith("meshformer.") for found in calls):
        return  # a user's task may pass other arguments
    texts, cut = config["data"]["kind"] in ("texts", "speech"), config["strategy"]["context"] > 1
    # Argument -> whether tasks/ passes it. Documents separate texts from padding; positions are for sequence slices and packed texts.
    holds = {
        {("images",): "images", ("speech",): "features"}.get(declared(config, "learns_from"), "tokens_BT"): True,
        "positions_BT": config["data"]["kind"] != "speech" and (cut or config["data"]["packing"]) and not declared(config, "pooled"),
        "documents_BT": texts,
    }
    held, empty = ([name for name, there in holds.items() if there is kind] for kind in (True, False))
    required = {name: parameter.required for name, parameter in forward.parameters.items()}
    try:
        places(required, forward.open_ended, held, empty)
    except ValueError as error:
        raise ConfigError(str(error), "model._target_", target, fix="Let it take them, or give what else it takes a default.") from None


def _packing(config: Config) -> None:
    texts = config["data"]["kind"] == "texts"
    if config["data"]["packing"] and (not texts or declared(config, "own_head")):
        why = "running text has no gaps" if config["data"]["kind"] == "corpus" else "the task has a result for each text"
        raise ConfigError(f"puts several texts into a sample, and {why}", "data.packing", "true", fix="Leave it out.")


def _layout(config: Config) -> None:
    strategy = config["strategy"]
    if strategy["context"] > 1 and (message := refuses_context(config)) is not None:
        raise ConfigError(message, "strategy.context", strategy["context"], fix="Use another layout, such as strategy=fsdp or tensor.")
    if strategy["loss_parallel"] and declared(config, "learns_from") and not declared(config, "writes_text"):
        message = f"is for next-token prediction with large vocabularies, and task={_option(config)} needs unsharded outputs"
        raise ConfigError(message, "strategy.loss_parallel", "true", fix="Leave it out.")
    if strategy["tensor"] > 1 and strategy["sequence_parallel"] and config["model"].get("head") is False:
        message = "leaves the last hidden states cut along time, and a model without a head returns them"
        raise ConfigError(message, "strategy.sequence_parallel", "true", fix="Use strategy.sequence_parallel=false.")


def refuses_context(config: Config) -> str | None:
    """Why samples of this data and task cannot be cut along time; None where they can."""
    kind = config["data"]["kind"]
    if kind in ("images", "speech"):
        why = "the data is images" if kind == "images" else "the loss of speech recognition is over a whole recording"
        return f"cuts sequences of tokens over processes, and {why}"
    if declared(config, "pooled"):
        return f"cuts each text over processes, and task={_option(config)} takes the mean over all of it"
    return None


def _groups(config: Config) -> None:
    """Checks that groups of pairs fit into one micro-batch."""
    if declared(config, "objective") != "pairs":
        return
    strategy, batch = config["strategy"], config["data"]["batch_size"]
    group = {**defaults(config["task"]["_target_"]), **config["task"]}["group"]
    slices = Degrees.from_config(strategy).data * config["trainer"]["accumulate_grad_batches"]
    slices *= strategy["microbatches"] if strategy["pipeline"] > 1 else 1
    if batch % (slices * group):
        have = f"data.batch_size={batch}" + (f" / {slices}" if slices > 1 else "")
        message = f"what a process computes at once, {have} = {batch / slices:g} pairs, is no multiple of it"
        raise ConfigError(message, "task.group", group, fix=f"Use data.batch_size={-(-batch // (slices * group)) * slices * group}.")


def _option(config: Config) -> str:
    """The task as typed on the command line: sequence_classification for SequenceClassification; the full class name of a user's task."""
    target = str(config["task"]["_target_"])
    if not target.startswith(HOME):
        return target
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in target.rpartition(".")[2]).lstrip("_")
