"""BERT (Devlin et al. 2019) and models of its architecture such as MiniLM: post-norm, learned positions, token types, embedding norm.

Our model has a head and returns logits if the folder has a masked-word predictor (`cls.predictions`); else it returns hidden states. Poolers
and the heads of other tasks are not loaded.
"""

from __future__ import annotations

import re
from typing import Any

from .parts import GELU_NAMES, GELUS, LEARNED, TEXT, Model, Part, differences, expect, linear, norm, position, size

NAME, TYPES, CLASS = "BERT", ("bert",), TEXT
LEFT_OUT = re.compile(
    r"pooler\..*|embeddings\.position_ids|cls\.seq_relationship\..*|classifier\..*|qa_outputs\..*"  # position_ids: 0, 1, 2, …
)
TIED = {"cls.predictions.decoder.weight": "embeddings.word_embeddings.weight"}
HEAD = "cls.predictions"


def canonical(name: str) -> str:
    name = re.sub(r"LayerNorm\.(gamma|beta)$", lambda m: f"LayerNorm.{'weight' if m[1] == 'gamma' else 'bias'}", name.removeprefix("bert."))
    return name.replace(f"{HEAD}.decoder.bias", f"{HEAD}.bias")


def stored_name(name: str, model: Model) -> str:
    return name if not model["head"] or name.startswith("cls.") else f"bert.{name}"


def settings(config: dict[str, Any], names: set[str]) -> Model:
    expect(config, "position_embedding_type", "absolute")
    expect(config, "is_decoder", False)
    expect(config, "add_cross_attention", False)
    head = f"{HEAD}.transform.dense.weight" in names
    return {
        "_target_": TEXT,
        "vocab_size": size(config, "vocab_size"),
        "n_layers": size(config, "num_hidden_layers"),
        "n_heads": size(config, "num_attention_heads"),
        "n_kv_heads": None,
        "d_model": size(config, "hidden_size"),
        "d_ff": size(config, "intermediate_size"),
        "context_length": size(config, "max_position_embeddings"),
        "position": position(LEARNED),
        "causal": False,
        "window": None,
        "norm": "layer",
        "norm_position": "post",
        "norm_eps": float(config.get("layer_norm_eps", 1e-12)),
        "embedding_norm": True,
        "token_types": size(config, "type_vocab_size"),
        "activation": GELUS[expect(config, "hidden_act", "gelu", "gelu_new", "gelu_pytorch_tanh")],
        "bias": True,
        "qk_norm": False,
        "tie_embeddings": head and bool(config.get("tie_word_embeddings", True)),
        "head": head,
        "head_bias": head,
        "head_transform": head,
    }


def parts(model: Model) -> dict[str, Part]:
    found = {
        "embedding.tokens.weight": Part("embeddings.word_embeddings.weight"),
        "embedding.types.weight": Part("embeddings.token_type_embeddings.weight"),
        "position.table.weight": Part("embeddings.position_embeddings.weight"),
        **norm("embedding.norm", "embeddings.LayerNorm"),
    }
    for i in range(model["n_layers"]):
        block, theirs = f"blocks.{i}", f"encoder.layer.{i}"
        for ours, name in zip("qkv", ("query", "key", "value"), strict=True):
            found |= linear(f"{block}.attention.{ours}", f"{theirs}.attention.self.{name}")
        found |= linear(f"{block}.attention.o", f"{theirs}.attention.output.dense")
        found |= norm(f"{block}.attention_norm", f"{theirs}.attention.output.LayerNorm")
        found |= linear(f"{block}.mlp.up", f"{theirs}.intermediate.dense")
        found |= linear(f"{block}.mlp.down", f"{theirs}.output.dense")
        found |= norm(f"{block}.mlp_norm", f"{theirs}.output.LayerNorm")
    if model["head"]:
        found |= linear("norm.dense", f"{HEAD}.transform.dense") | norm("norm.norm", f"{HEAD}.transform.LayerNorm")
        found |= {"head.bias": Part(f"{HEAD}.bias")}
        found |= {} if model["tie_embeddings"] else {"head.weight": Part(f"{HEAD}.decoder.weight")}
    return found


def unfit(model: Model) -> Model:
    required = {
        "position": LEARNED, "norm": "layer", "norm_position": "post", "bias": True, "attention_bias": True, "qk_norm": False,
        "activation": ("gelu", "gelu_tanh"), "causal": False, "window": None, "embedding_norm": True, "outputs": None,
        "head_bias": model["head"], "head_transform": model["head"], "n_kv_heads": model["n_heads"], "head_dim": model["d_model"] // model["n_heads"],
    }  # fmt: skip
    found = differences(model, required)
    return found if model["token_types"] else found | {"token_types": "one or more"}


def config(model: Model) -> dict[str, Any]:
    return {
        "architectures": ["BertForMaskedLM" if model["head"] else "BertModel"],
        "model_type": "bert",
        "vocab_size": model["vocab_size"],
        "num_hidden_layers": model["n_layers"],
        "num_attention_heads": model["n_heads"],
        "hidden_size": model["d_model"],
        "intermediate_size": model["d_ff"],
        "max_position_embeddings": model["context_length"],
        "type_vocab_size": model["token_types"],
        "hidden_act": GELU_NAMES[model["activation"]],
        "layer_norm_eps": model["norm_eps"],
        "hidden_dropout_prob": model["dropout"],
        "attention_probs_dropout_prob": model["dropout"],
        "tie_word_embeddings": model["tie_embeddings"] or not model["head"],
    }
