"""One Transformer block: attention, then a feed-forward network, each with a residual connection around it.

Shapes: B batch, T time, C channels (d_model), F feed-forward width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention, Mask, cast_once
from .cache import KeyValueCache
from .norm import make_norm
from .position import Position

ACTIVATIONS = ("gelu", "gelu_tanh", "relu2", "swiglu")


def gelu(x: Tensor, activation: str) -> Tensor:
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


class FeedForward(nn.Module):
    """The feed-forward network, (B, T, C) → (B, T, C), by `activation`:

    `gelu`: W_down gelu(W_up x); `gelu_tanh`: the same with GPT-2's tanh approximation (Hendrycks & Gimpel 2016); `relu2`: W_down relu(W_up x)²
    (So et al. 2021); `swiglu`: W_down (silu(W_gate x) ⊙ W_up x) (Shazeer 2020).
    """

    def __init__(self, d_model: int, d_ff: int, activation: str, bias: bool):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
        self.activation = activation
        self.gate = nn.Linear(d_model, d_ff, bias=bias) if activation == "swiglu" else None
        self.up = nn.Linear(d_model, d_ff, bias=bias)
        self.down = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = cast_once(x_BTC)
        h_BTF = self.up(x_BTC)
        if self.gate is not None:
            h_BTF = F.silu(self.gate(x_BTC)) * h_BTF
        elif self.activation != "relu2":
            h_BTF = gelu(h_BTF, self.activation)
        else:
            h_BTF = F.relu(h_BTF).square()
        return self.down(h_BTF)


class Block(nn.Module):
    """Pre-norm: x + f(norm(x)) (Xiong et al. 2020), or post-norm: norm(x + f(x)) as in the original paper and BERT. (B, T, C) → (B, T, C)."""

    def __init__(
        self,
        attention: Attention,
        mlp: FeedForward,
        norm: str,
        norm_position: str,
        dropout: float,
        d_model: int,
        bias: bool,
        norm_eps: float | None = None,
    ):
        super().__init__()
        if norm_position not in ("pre", "post"):
            raise ValueError(f"norm_position must be 'pre' or 'post', not {norm_position!r}")
        self.pre = norm_position == "pre"
        self.attention_norm = make_norm(norm, d_model, bias, norm_eps)
        self.attention = attention
        self.mlp_norm = make_norm(norm, d_model, bias, norm_eps)
        self.mlp = mlp
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(
        self,
        x_BTC: Tensor,
        mask: Mask,
        position: Position,
        tables: tuple[Tensor, ...],
        bias: Tensor | None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        if self.pre:
            x_BTC = x_BTC + self.dropout(self.attention(self.attention_norm(x_BTC), mask, position, tables, bias, cache))
            return x_BTC + self.dropout(self.mlp(self.mlp_norm(x_BTC)))
        x_BTC = self.attention_norm(x_BTC + self.dropout(self.attention(x_BTC, mask, position, tables, bias, cache)))
        return self.mlp_norm(x_BTC + self.dropout(self.mlp(x_BTC)))
