"""The encoder of Whisper (Radford et al. 2022): two convolutions, learned positions, pre-norm blocks. Its decoder is not loaded.

Our model returns the encoder's hidden states; a task of speech recognition adds a head of its own. Nothing is exported in this layout, since a
Whisper folder needs a decoder.
"""

from __future__ import annotations

import re
from typing import Any

from .parts import GELUS, LEARNED, SPEECH, Model, Part, differences, expect, linear, norm, position, size

NAME, TYPES, CLASS = "Whisper", ("whisper",), SPEECH
LEFT_OUT = re.compile(r"decoder\..*|proj_out\..*")
TIED: dict[str, str] = {}


def canonical(name: str) -> str:
    return name.removeprefix("model.")


def stored_name(name: str, model: Model) -> str:
    return f"model.{name}"


def settings(config: dict[str, Any], names: set[str]) -> Model:
    expect(config, "scale_embedding", False)
    return {
        "_target_": SPEECH,
        "mels": size(config, "num_mel_bins"),
        "subsampling": 2,
        "vocab_size": None,
        "n_layers": size(config, "encoder_layers"),
        "n_heads": size(config, "encoder_attention_heads"),
        "d_model": size(config, "d_model"),
        "d_ff": size(config, "encoder_ffn_dim"),
        "context_length": size(config, "max_source_positions"),
        "position": position(LEARNED),
        "norm": "layer",
        "norm_eps": 1e-5,
        "activation": GELUS[expect(config, "activation_function", "gelu")],
        "bias": True,
        "qk_norm": False,
        "head": False,
    }


def parts(model: Model) -> dict[str, Part]:
    found = {"position.table.weight": Part("encoder.embed_positions.weight")}
    for i in (1, 2):
        found |= linear(f"embedding.conv{i}", f"encoder.conv{i}")
    for i in range(model["n_layers"]):
        block, theirs = f"blocks.{i}", f"encoder.layers.{i}"
        found |= norm(f"{block}.attention_norm", f"{theirs}.self_attn_layer_norm")
        for ours, name in zip("qkvo", ("q_proj", "k_proj", "v_proj", "out_proj"), strict=True):
            found |= linear(f"{block}.attention.{ours}", f"{theirs}.self_attn.{name}", bias=ours != "k")
        found |= norm(f"{block}.mlp_norm", f"{theirs}.final_layer_norm")
        found |= linear(f"{block}.mlp.up", f"{theirs}.fc1") | linear(f"{block}.mlp.down", f"{theirs}.fc2")
    return found | norm("norm", "encoder.layer_norm")


def unfit(model: Model) -> Model:
    required = {"position": LEARNED, "norm": "layer", "bias": True, "qk_norm": False, "subsampling": 2, "head": "Whisper's decoder"}
    return differences(model, required)


def config(model: Model) -> dict[str, Any]:
    raise AssertionError("`unfit` refuses every model")
