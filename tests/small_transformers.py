"""Small models of the transformers library, and a recipe that trains them to a lower loss in six steps."""

from __future__ import annotations

from typing import Any

# A test's ranks are forked from this process: what it has imported they need not import, each for itself.
from transformers import (  # noqa: F401
    AutoModelForCausalLM,
    BertForMaskedLM,
    GPT2LMHeadModel,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SMALL, "num_key_value_heads": 2},
    "llama_tied": {"model_type": "llama", **SMALL, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **SMALL, "num_key_value_heads": 2, "head_dim": 8},
    "qwen3_moe": {
        "model_type": "qwen3_moe", **SMALL, "num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 32, "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "mistral": {"model_type": "mistral", **SMALL, "num_key_value_heads": 2, "sliding_window": 4},
    "gpt2": {"model_type": "gpt2", **GPT2},
    "gpt_neox": {"model_type": "gpt_neox", **SMALL, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    "bert": {"model_type": "bert", **SMALL},
}
LM = [
    "model=transformers", "optimizer=sgd", "optimizer.lr=0.3", "schedule=constant", "trainer.max_steps=6", "trainer.gradient_clip_val=0.5",
    "data.batch_size=16", "~callbacks.checkpoint",
]  # fmt: skip
