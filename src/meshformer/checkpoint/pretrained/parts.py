"""What a description of a foreign layout is made of: where each of our tensors lies in it, and how its settings read in our words. No torch.

A layout is a module with
    NAME, TYPES, CLASS          for messages; the `model_type`s of config.json that it reads; the class of ours that they become
    LEFT_OUT                    names that may be there and are not needed: buffers, poolers, heads of other tasks
    TIED                        {name: the name that it is a copy of} where a tied model is stored with both: left out where they are equal
    canonical(name)             the one name for what is stored under several
    settings(config, names)     a model node as in conf/model/, from config.json and the canonical names that are stored
    parts(model)                {our name: Part} for a complete model node
    unfit(model)                what of a model node the layout has no place for: {key: what it has instead}
    config(model)               config.json for a model node that fits
    stored_name(name, model)    the name to store a canonical one under
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from meshformer.config.errors import ConfigError
from meshformer.config.signature import defaults
from meshformer.model.settings import feed_forward_width, usual_eps

Model = dict[str, Any]  # a node as in conf/model/: arguments of Transformer or VisionTransformer, and their `_target_`
TEXT, VISION = "meshformer.model.Transformer", "meshformer.model.VisionTransformer"
POSITIONS = "meshformer.model.position."
LEARNED, ROTARY = "Learned", "Rotary"  # its classes that foreign layouts have


@dataclass(frozen=True)
class Part:
    """One of our tensors in a foreign one: `name` is the canonical name there.

    `transposed`: stored (in, out), where ours is (out, in). `part` of `of` equal parts of the rows, after that. `stored`: its shape there, where
    ours is `ours`, with the same numbers in the same order.
    """

    name: str
    transposed: bool = False
    part: int = 0
    of: int = 1
    stored: tuple[int, ...] | None = None
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
    """The node with every argument spelled out, also those that follow from others. `position` becomes its class's name, `base` a key."""
    vision = model["_target_"] == VISION
    whole = {**defaults(model["_target_"]), **model}
    place = model.get("position") or position(LEARNED if vision else ROTARY)
    home, _, name = str(place["_target_"]).rpartition(".")
    whole["position"] = name if home.startswith("meshformer.") else str(place["_target_"])  # a class of the user's may have any name
    whole["base"] = float(place.get("base", 10000.0))
    whole["d_ff"] = whole["d_ff"] or feed_forward_width(whole["d_model"], whole["activation"])
    whole["norm_eps"] = usual_eps(whole["norm"]) if whole["norm_eps"] is None else whole["norm_eps"]
    if not vision:
        whole["n_kv_heads"] = whole["n_kv_heads"] or whole["n_heads"]
        whole["head_dim"] = whole["head_dim"] or whole["d_model"] // whole["n_heads"]
        whole["attention_bias"] = whole["bias"] if whole["attention_bias"] is None else whole["attention_bias"]
    return whole


def differences(model: Model, required: Mapping[str, Any]) -> Model:
    """{key: what is required} for the arguments of a complete node that have another value. A tuple lists what would do."""
    return {k: wanted for k, wanted in required.items() if model[k] not in (wanted if isinstance(wanted, tuple) else (wanted,))}


def size(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"config.json lacks {key}" if value is None else f"config.json has {key}={value}")
    return value


def expect(config: Mapping[str, Any], key: str, *read: Any) -> Any:
    """The value of `key`, the first of `read` where it is absent. ConfigError when it is none of them."""
    value = config.get(key, read[0])
    if value is None and None not in read:
        value = read[0]
    if value not in read:
        raise ConfigError(f"config.json has {key}={value!r}, which is not read here (but {', '.join(map(repr, read))})")
    return value


GELUS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}  # transformers' name: ours
GELU_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_new"}
