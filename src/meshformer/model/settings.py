"""What the settings and the names of these models mean, for whoever asks before torch is imported: checks, fine-tuning, foreign weights. No torch."""

from __future__ import annotations

# Settings that decide the names and shapes of the weights, or what they compute: who starts from weights must have the same.
SHAPES = (
    "_target_", "n_layers", "n_heads", "n_kv_heads", "d_model", "d_ff", "norm", "norm_position", "embedding_norm", "token_types", "activation",
    "bias", "qk_norm", "tie_embeddings", "head_dim", "norm_eps", "attention_bias", "head", "head_bias", "head_transform",
)  # fmt: skip
FREE = ("attention", "dropout", "init_std", "zero_init")  # settings that the weights do not decide
# Of a task with a head of its own: the settings that follow from it, and patterns of the parameters that are drawn anew.
HEAD = ("head", "head_bias", "head_transform", "tie_embeddings", "outputs", "classes")
HEAD_PARAMETERS = ("head.*", "norm.dense.*", "norm.norm.*")
PARTS = ("embedding", "position", "blocks", "norm", "head")  # with which the names of parameters begin
SECOND_NAME = {"head.weight": "embedding.tokens.weight"}  # of a tied model
IGNORED = -100  # the target of a token that is not counted; torch's own default for cross_entropy's ignore_index


def feed_forward_width(d_model: int, activation: str) -> int:
    """4·C; for SwiGLU, which has three matrices instead of two, 8/3·C rounded up to a multiple of 32 (Shazeer 2020 keeps the size equal)."""
    return 4 * d_model if activation != "swiglu" else -(-8 * d_model // 3 // 32) * 32


def usual_eps(norm: str) -> float:
    """What is added to the variance where norm_eps is None."""
    return 1e-5 if norm == "layer" else 1e-6
