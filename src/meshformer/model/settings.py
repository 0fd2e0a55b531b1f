"""Facts about the settings and parameter names of these models, for code that runs before torch is imported: checks, fine-tuning, foreign weights."""

from __future__ import annotations

from typing import Any

# Settings that decide the names and shapes of the weights, or how they are used. Fine-tuning must keep those of the pretrained model.
SHAPES = (
    "_target_", "n_layers", "n_heads", "n_kv_heads", "d_model", "d_ff", "norm", "norm_position", "embedding_norm", "token_types", "activation",
    "bias", "qk_norm", "tie_embeddings", "head_dim", "norm_eps", "attention_bias", "head", "head_bias", "head_transform", "mels", "subsampling",
)  # fmt: skip
FEATURES = ("sample_rate", "mels", "scaling", "frames_per_token")  # settings of the data that an encoder of speech was trained with
FREE = ("attention", "dropout", "init_std", "zero_init")  # settings that fine-tuning may change
# For a task that replaces the head: the settings it decides, and the patterns of the parameters that are initialised afresh.
HEAD = ("head", "head_bias", "head_transform", "tie_embeddings", "outputs", "classes")
HEAD_PARAMETERS = ("head.*", "norm.dense.*", "norm.norm.*")
PARTS = ("embedding", "position", "blocks", "norm", "head")  # first parts of the parameter names
SECOND_NAME = {"head.weight": "embedding.tokens.weight"}  # tied weights: the second name -> the first
# How a Plan shards a module (layout.py).
STYLES = {
    "columns": "a linear layer sharded by output features: replicated input, sharded output",
    "rows": "a linear layer sharded by input features: sharded input, and partial outputs that are summed over the ranks",
    "vocabulary": "an embedding or the head, sharded along the vocabulary",
    "sequence": "acts on each token separately, so with sequence parallelism each rank applies it to its own tokens",
    "heads": "acts on each head separately with replicated parameters, so each rank applies it to its own heads",
    "replicated": "every rank computes the same; applies to the submodules too",
}
SYNONYMS = {  # the names in transformers' `base_model_tp_plan`
    "colwise": "columns", "rowwise": "rows", "colwise_rep": "vocabulary", "colwise_gather_output": "vocabulary",
    "embedding_rowwise": "vocabulary", "sequence_parallel": "sequence", "replicated_with_grad_allreduce": "heads",
}  # fmt: skip
IGNORED = -100  # target of tokens that do not count: the default `ignore_index` of torch's cross_entropy


def feed_forward_width(d_model: int, activation: str) -> int:
    """4·C. For SwiGLU, which has three matrices instead of two, 8/3·C rounded up to a multiple of 32, which keeps the size equal (Shazeer 2020)."""
    return 4 * d_model if activation != "swiglu" else -(-8 * d_model // 3 // 32) * 32


def usual_eps(norm: str) -> float:
    """The epsilon added to the variance when `norm_eps` is None."""
    return 1e-5 if norm == "layer" else 1e-6


def sequence_length(model: dict[str, Any], context_length: int) -> int:
    """Tokens of a sample: `context_length`, or the patches of an image and its class token."""
    if not (model.get("image_size") and model.get("patch_size")):
        return context_length
    return (model["image_size"] // model["patch_size"]) ** 2 + (model.get("pooling") == "cls")
