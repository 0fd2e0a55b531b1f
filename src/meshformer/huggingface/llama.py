"""Llama (Touvron et al. 2023): RMSNorm, rotary positions in halves (as ours), SwiGLU, grouped-query attention; Mistral: a window besides."""

from __future__ import annotations

import re
from typing import Any

from meshformer.config.errors import ConfigError

from .parts import ROTARY, TEXT, Model, Part, differences, expect, linear, norm, position, size

NAME, TYPES, CLASS = "Llama", ("llama", "mistral"), TEXT
LEFT_OUT = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq|score\..*|qa_outputs\..*")  # angles; heads of other tasks
TIED = {"lm_head.weight": "model.embed_tokens.weight"}


def canonical(name: str) -> str:
    return name if name.startswith(("model.", "lm_head.", "score.", "qa_outputs.")) else f"model.{name}"


def stored_name(name: str, model: Model) -> str:
    return name


def settings(config: dict[str, Any], names: set[str]) -> Model:
    expect(config, "hidden_act", "silu", "swish")
    rotary = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or rotary
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"config.json has rope scaling of type {kind!r}, which is not read here (but 'default', none)")
    if (share := rotary.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))) not in (1.0, None):
        raise ConfigError(f"config.json has partial_rotary_factor={share}, which is not read here (but 1.0)")
    mistral = config["model_type"] == "mistral"
    width, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    head_dim = config.get("head_dim") or width // heads
    linear_bias = bool(config.get("mlp_bias", False))
    attention_bias = bool(config.get("attention_bias", False))
    tied = config.get("tie_word_embeddings", False)
    return {
        "_target_": TEXT,
        "vocab_size": size(config, "vocab_size"),
        "n_layers": size(config, "num_hidden_layers"),
        "n_heads": heads,
        "n_kv_heads": config.get("num_key_value_heads") or heads,
        "d_model": width,
        "d_ff": size(config, "intermediate_size"),
        "head_dim": None if head_dim * heads == width else head_dim,
        "context_length": size(config, "max_position_embeddings"),
        "position": position(ROTARY, base=float(rotary.get("rope_theta") or config.get("rope_theta") or 10000.0)),
        "causal": True,
        "window": config.get("sliding_window") if mistral else None,
        "norm": "rms",
        "norm_position": "pre",
        "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "embedding_norm": False,
        "token_types": 0,
        "activation": "swiglu",
        "bias": linear_bias,
        "attention_bias": None if attention_bias == linear_bias else attention_bias,
        "qk_norm": False,
        "tie_embeddings": bool(tied),
        "head": bool(tied) or "lm_head.weight" in names,
    }


def parts(model: Model) -> dict[str, Part]:
    found = {"embedding.tokens.weight": Part("model.embed_tokens.weight")}
    for i in range(model["n_layers"]):
        block, theirs = f"blocks.{i}", f"model.layers.{i}"
        found |= norm(f"{block}.attention_norm", f"{theirs}.input_layernorm", bias=False)
        for name in "qkvo":
            found |= linear(f"{block}.attention.{name}", f"{theirs}.self_attn.{name}_proj", model["attention_bias"])
        found |= norm(f"{block}.mlp_norm", f"{theirs}.post_attention_layernorm", bias=False)
        for name in ("gate", "up", "down"):
            found |= linear(f"{block}.mlp.{name}", f"{theirs}.mlp.{name}_proj", model["bias"])
    found |= norm("norm", "model.norm", bias=False)
    return found if model["tie_embeddings"] or not model["head"] else found | {"head.weight": Part("lm_head.weight")}


def unfit(model: Model) -> Model:
    required = {
        "position": ROTARY, "norm": "rms", "norm_position": "pre", "activation": "swiglu", "qk_norm": False, "causal": True,
        "embedding_norm": False, "token_types": 0, "head": True, "head_bias": False, "head_transform": False, "outputs": None,
    }  # fmt: skip
    if model["window"] is not None:  # Mistral's, which has no biases
        required |= {"bias": False, "attention_bias": False}
    return differences(model, required)


def config(model: Model) -> dict[str, Any]:
    mistral = model["window"] is not None
    about = {
        "architectures": ["MistralForCausalLM" if mistral else "LlamaForCausalLM"],
        "model_type": "mistral" if mistral else "llama",
        "vocab_size": model["vocab_size"],
        "num_hidden_layers": model["n_layers"],
        "num_attention_heads": model["n_heads"],
        "num_key_value_heads": model["n_kv_heads"],
        "hidden_size": model["d_model"],
        "intermediate_size": model["d_ff"],
        "head_dim": model["head_dim"],
        "max_position_embeddings": model["context_length"],
        "hidden_act": "silu",
        "rms_norm_eps": model["norm_eps"],
        "rope_theta": model["base"],  # where transformers 4 looks, and where 5 does
        "rope_parameters": {"rope_type": "default", "rope_theta": model["base"]},
        "attention_dropout": model["dropout"],
        "tie_word_embeddings": model["tie_embeddings"],
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return about | (
        {"sliding_window": model["window"]} if mistral else {"attention_bias": model["attention_bias"], "mlp_bias": model["bias"]}
    )
