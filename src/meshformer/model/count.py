"""The size of a model: its parameters, and the FLOPs of training per token."""

from __future__ import annotations

from .transformer import Transformer


def parameter_count(model: Transformer, embeddings: bool = True) -> int:
    """Number of parameters; tied matrices count once. `embeddings=False` leaves out token and position tables (Kaplan et al. 2020)."""
    total = sum(p.numel() for p in model.parameters())
    if not embeddings:
        total -= model.embedding.tokens.weight.numel()
        total -= sum(p.numel() for p in model.position.parameters())
    return total


def matrix_parameters(model: Transformer) -> int:
    """Number of weights in matrix products: every linear layer and the head (also where it is tied), but no embedding lookup."""
    blocks = sum(p.numel() for name, p in model.blocks.named_parameters() if p.ndim == 2)
    return blocks + (model.head.weight.numel() if model.head is not None else 0)


def training_flops_per_token(model: Transformer, context_length: int) -> int:
    """FLOPs of the forward and backward matrix products per token, as `torch.utils.flop_counter` counts them (a multiply-add is two).

    Forward: 2 per matrix parameter, and in each layer 2·S·C for Q Kᵀ and 2·S·C for weights·V over all S keys (causal masks do not halve the
    count, as is usual). The backward pass costs twice the forward (Kaplan et al. 2020; Chowdhery et al. 2022, app. B).
    """
    per_product = 2 * context_length * model.n_heads * model.position.head_dim * model.n_layers
    total = 3 * (2 * matrix_parameters(model) + 2 * per_product)
    return total if model.position.uses_keys else total - per_product  # positions are constants, so Q Pᵀ has no gradient for P
