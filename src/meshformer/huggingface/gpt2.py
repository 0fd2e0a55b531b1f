"""GPT-2 (Radford et al. 2019): pre-norm, learned positions, q, k and v in one matrix, matrices stored as (in, out)."""

from __future__ import annotations

import re
from typing import Any

from .parts import GELU_NAMES, GELUS, LEARNED, TEXT, Model, Part, differences, expect, linear, norm, position, size

NAME, TYPES, CLASS = "GPT-2", ("gpt2",), TEXT
LEFT_OUT = re.compile(r"transformer\.h\.\d+\.attn\.(masked_)?bias|(?!lm_head)[^.]*_head\..*|score\..*")  # masks; heads of other tasks
TIED = {"lm_head.weight": "transformer.wte.weight"}


def canonical(name: str) -> str:
    return name if name.startswith(("transformer.", "lm_head.", "score.")) or "_head." in name else f"transformer.{name}"


def stored_name(name: str, model: Model) -> str:
    return name


def settings(config: dict[str, Any], names: set[str]) -> Model:
    expect(config, "scale_attn_weights", True)
    expect(config, "scale_attn_by_inverse_layer_idx", False)
    expect(config, "add_cross_attention", False)
    width = size(config, "n_embd")
    return {
        "_target_": TEXT,
        "vocab_size": size(config, "vocab_size"),
        "n_layers": size(config, "n_layer"),
        "n_heads": size(config, "n_head"),
        "n_kv_heads": None,
        "d_model": width,
        "d_ff": config.get("n_inner") or 4 * width,
        "context_length": size(config, "n_positions"),
        "position": position(LEARNED),
        "causal": True,
        "window": None,
        "norm": "layer",
        "norm_position": "pre",
        "norm_eps": float(config.get("layer_norm_epsilon", 1e-5)),
        "embedding_norm": False,
        "token_types": 0,
        "activation": GELUS[expect(config, "activation_function", "gelu_new", "gelu", "gelu_pytorch_tanh")],
        "bias": True,
        "qk_norm": False,
        "tie_embeddings": bool(config.get("tie_word_embeddings", True)),
    }


def parts(model: Model) -> dict[str, Part]:
    found = {"embedding.tokens.weight": Part("transformer.wte.weight"), "position.table.weight": Part("transformer.wpe.weight")}
    for i in range(model["n_layers"]):
        block, theirs = f"blocks.{i}", f"transformer.h.{i}"
        found |= norm(f"{block}.attention_norm", f"{theirs}.ln_1")
        for part, name in enumerate("qkv"):
            found |= linear(f"{block}.attention.{name}", f"{theirs}.attn.c_attn", transposed=True, part=part, of=3)
        found |= linear(f"{block}.attention.o", f"{theirs}.attn.c_proj", transposed=True)
        found |= norm(f"{block}.mlp_norm", f"{theirs}.ln_2")
        found |= linear(f"{block}.mlp.up", f"{theirs}.mlp.c_fc", transposed=True)
        found |= linear(f"{block}.mlp.down", f"{theirs}.mlp.c_proj", transposed=True)
    found |= norm("norm", "transformer.ln_f")
    return found if model["tie_embeddings"] else found | {"head.weight": Part("lm_head.weight")}


def unfit(model: Model) -> Model:
    required = {
        "position": LEARNED, "norm": "layer", "norm_position": "pre", "bias": True, "attention_bias": True, "qk_norm": False,
        "activation": ("gelu", "gelu_tanh"), "causal": True, "window": None, "embedding_norm": False, "token_types": 0, "head": True,
        "head_bias": False, "head_transform": False, "outputs": None, "n_kv_heads": model["n_heads"],
        "head_dim": model["d_model"] // model["n_heads"],
    }  # fmt: skip
    return differences(model, required)


def config(model: Model) -> dict[str, Any]:
    dropout = model["dropout"]
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": model["vocab_size"],
        "n_layer": model["n_layers"],
        "n_head": model["n_heads"],
        "n_embd": model["d_model"],
        "n_inner": model["d_ff"],
        "n_positions": model["context_length"],
        "activation_function": GELU_NAMES[model["activation"]],
        "layer_norm_epsilon": model["norm_eps"],
        "resid_pdrop": dropout,
        "embd_pdrop": dropout,
        "attn_pdrop": dropout,
        "tie_word_embeddings": model["tie_embeddings"],
        "bos_token_id": None,
        "eos_token_id": None,
    }
