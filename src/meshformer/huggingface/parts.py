"""The vocabulary in which gpt2.py, llama.py, bert.py, vit.py and whisper.py describe their layouts. No torch.

A layout is a module with these names. Some tensors are stored under several names, depending on the class that saved them; a layout reduces
them to one canonical name.
    NAME, TYPES, CLASS          its name in messages; the values of `model_type` in config.json that it reads; our model class for them
    LEFT_OUT                    pattern of stored names that are not loaded: buffers, poolers, heads of other tasks
    TIED                        {name: the name of which it is a copy} in a tied model that is stored with both; the two must be equal
    canonical(name)             the canonical name of a stored name
    settings(config, names)     a model node as in conf/model/, from config.json and the canonical names that are stored
    parts(model)                {our parameter: Part} for a complete model node
    unfit(model)                {key: required value} for each setting of a model node that the layout cannot express
    config(model)               config.json for a model node that the layout can express
    stored_name(name, model)    the name under which a canonical name is written
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from meshformer.config.errors import ConfigError
from meshformer.config.signature import defaults
from meshformer.model.settings import feed_forward_width, usual_eps

Model = dict[str, Any]  # a node as in conf/model/: arguments of Transformer, VisionTransformer or SpeechTransformer, and their `_target_`
TEXT, VISION, SPEECH = "meshformer.model.Transformer", "meshformer.model.VisionTransformer", "meshformer.model.SpeechTransformer"
POSITIONS = "meshformer.model.position."
LEARNED, ROTARY = "Learned", "Rotary"  # the two of these classes that the layouts use


@dataclass(frozen=True)
class Part:
    """Where one of our parameters is stored."""

    name: str  # canonical name of the stored tensor
    transposed: bool = False  # stored as (in, out), where ours is (out, in)
    part: int = 0  # after transposing, our rows are part number `part` of `of` equal parts
    of: int = 1
    stored: tuple[int, ...] | None = None  # shape of the stored tensor where it differs from `ours`; the values are in the same order
    ours: tuple[int, ...] | None = None


def linear(ours: str, theirs: str, bias: bool = True, transposed: bool = False, part: int = 0, of: int = 1) -> dict[str, Part]:
    """A linear layer's weight and bias."""
    found = {f"{ours}.weight": Part(f"{theirs}.weight", transposed, part, of)}
    return found | ({f"{ours}.bias": Part(f"{theirs}.bias", False, part, of)} if bias else {})


def norm(ours: str, theirs: str, bias: bool = True) -> dict[str, Part]:
    return linear(ours, theirs, bias)


def position(name: str, **options: Any) -> Model:
    return {"_target_": f"{POSITIONS}{name}", "_partial_": True, **options}


def complete(model: Model) -> Model:
    """The node with every argument filled in, those that follow from others too. `position` becomes the name of its class, `base` a key."""
    vision, speech = model["_target_"] == VISION, model["_target_"] == SPEECH
    whole = {**defaults(model["_target_"]), **model}
    place = model.get("position") or position(LEARNED if vision else ROTARY)
    home, _, name = str(place["_target_"]).rpartition(".")
    whole["position"] = name if home.startswith("meshformer.") else str(place["_target_"])  # a class of the user's may have the same name
    whole["base"] = float(place.get("base", 10000.0))
    whole["d_ff"] = whole["d_ff"] or feed_forward_width(whole["d_model"], whole["activation"])
    whole["norm_eps"] = usual_eps(whole["norm"]) if whole["norm_eps"] is None else whole["norm_eps"]
    if not vision and not speech:
        whole["n_kv_heads"] = whole["n_kv_heads"] or whole["n_heads"]
        whole["head_dim"] = whole["head_dim"] or whole["d_model"] // whole["n_heads"]
        whole["attention_bias"] = whole["bias"] if whole["attention_bias"] is None else whole["attention_bias"]
    return whole


def differences(model: Model, required: Mapping[str, Any]) -> Model:
    """{key: required value} for the arguments of a complete node that have another value. A tuple in `required` lists accepted values."""
    return {k: wanted for k, wanted in required.items() if model[k] not in (wanted if isinstance(wanted, tuple) else (wanted,))}


def size(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"config.json lacks {key}" if value is None else f"config.json has {key}={value}")
    return value


def expect(config: Mapping[str, Any], key: str, *read: Any) -> Any:
    """The value of `key` in config.json, by default the first of `read`. ConfigError when the value is not one of `read`."""
    value = config.get(key, read[0])
    if value is None and None not in read:
        value = read[0]
    if value not in read:
        raise ConfigError(f"config.json has {key}={value!r}, which is not read here (but {', '.join(map(repr, read))})")
    return value


GELUS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}  # transformers' name: ours
GELU_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_new"}
