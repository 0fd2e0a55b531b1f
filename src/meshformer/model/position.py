"""Positional encodings, one class each. They are computed from the positions and have no buffers, so there is nothing to fill after
construction on the meta device, and only `Learned` limits the sequence length.

In each forward pass a Transformer calls `embed` once on the token embeddings, `tables` and `bias` once, and `encode` in every layer.
Shapes: B batch (or 1 where all rows agree), T time of queries, S time of keys, H heads, K key/value heads, D head dim, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Position(nn.Module):
    """The interface of an encoding; the defaults do nothing. `uses_keys` is False where queries are scored against positions instead of keys."""

    uses_keys = True
    needs_even_heads = False
    has_table = False  # whether it has a trained embedding per position

    def __init__(self, d_model: int, n_heads: int, head_dim: int, context_length: int):
        super().__init__()
        self.d_model, self.n_heads, self.head_dim, self.context_length = d_model, n_heads, head_dim, context_length

    def embed(self, x_BTC: Tensor, positions_BT: Tensor) -> Tensor:
        """Token embeddings (B, T, C) with the encoding added, if it is an additive one."""
        return x_BTC

    def tables(self, positions_BT: Tensor) -> tuple[Tensor, ...]:
        """Tensors for `encode` at these positions, computed once per forward pass and shared by all layers."""
        return ()

    def encode(self, q_BHTD: Tensor, k_BKTD: Tensor | None, v_BKTD: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Queries (B, H, T, D) and keys (B, K, T, D) with their positions applied."""
        assert k_BKTD is not None
        return q_BHTD, k_BKTD

    def slopes(self, device: torch.device) -> Tensor | None:
        """(H,) slopes m_h by which score_ij is lowered by m_h·|i − j|, or None. Flex applies them without storing a bias tensor."""
        return None

    def bias(self, q_positions_BT: Tensor, k_positions_BS: Tensor) -> Tensor | None:
        """(B, H, T, S), added to the scores before the softmax; by default −slope·|i − j|, and None without slopes."""
        slopes_H = self.slopes(q_positions_BT.device)
        return None if slopes_H is None else distance_bias(slopes_H, q_positions_BT, k_positions_BS)

    @property
    def has_own_bias(self) -> bool:
        """Whether a subclass overrides `bias`, which then replaces any inherited slopes."""
        return type(self).bias is not Position.bias

    def share_heads(self, rank: int, size: int) -> None:
        """Restricts the bias or slopes, in place, to the heads of one rank: the `rank`-th of `size` equal groups."""
        name, heads = ("bias", 1) if self.has_own_bias else ("slopes", 0)
        whole = getattr(self, name)

        def local_heads(*args: Any) -> Tensor | None:
            all_heads = whole(*args)
            return None if all_heads is None else all_heads.chunk(size, dim=heads)[rank]

        setattr(self, name, local_heads)


def distance_bias(slopes_H: Tensor, q_positions_BT: Tensor, k_positions_BS: Tensor) -> Tensor:
    """−m_h·|i − j|, (B, H, T, S)."""
    distance_B1TS = (q_positions_BT[:, None, :, None] - k_positions_BS[:, None, None, :]).abs()
    return -slopes_H[:, None, None] * distance_B1TS


class NoPosition(Position):
    """No encoding: the causal mask alone tells a decoder the order (Haviv et al. 2022)."""


def sinusoid(positions_BT: Tensor, dim: int, base: float = 10000.0, sine_only: bool = False) -> Tensor:
    """(B, T, dim). PE(i, 2j) = sin(i / base^(2j/dim)), PE(i, 2j+1) = cos(i / base^(2j/dim)): Vaswani et al. 2017, section 3.5.

    `sine_only`: PE(i, j) = sin(i / base^(2j/dim)) for every channel j.
    """
    channel = torch.arange(dim, device=positions_BT.device, dtype=torch.float32)
    exponent = 2 * channel / dim if sine_only else 2 * (channel // 2) / dim  # fp32 even where the default dtype is bf16
    angle_BTC = positions_BT[..., None].float() * base**-exponent
    if sine_only:
        return angle_BTC.sin()
    return torch.where(channel % 2 == 0, angle_BTC.sin(), angle_BTC.cos())


class Sinusoidal(Position):
    """x_i + PE(i) with fixed sinusoids whose wavelengths grow geometrically (Vaswani et al. 2017, section 3.5); see `sinusoid` for both forms."""

    def __init__(self, d_model: int, n_heads: int, head_dim: int, context_length: int, base: float = 10000.0, sine_only: bool = False):
        super().__init__(d_model, n_heads, head_dim, context_length)
        self.base, self.sine_only = base, sine_only

    def embed(self, x_BTC: Tensor, positions_BT: Tensor) -> Tensor:
        return x_BTC + sinusoid(positions_BT, self.d_model, self.base, self.sine_only).to(x_BTC.dtype)


class Learned(Position):
    """x_i + W_i with W a trained table of `context_length` rows (Gehring et al. 2017; GPT, BERT). Longer inputs are an error."""

    has_table = True

    def __init__(self, d_model: int, n_heads: int, head_dim: int, context_length: int):
        super().__init__(d_model, n_heads, head_dim, context_length)
        self.table = nn.Embedding(context_length, d_model)

    def embed(self, x_BTC: Tensor, positions_BT: Tensor) -> Tensor:
        return x_BTC + self.table(positions_BT)


class Rotary(Position):
    """q_i and k_j are rotated by angles i·θ and j·θ, θ_m = base^(-2m/D), so that q_i·k_j depends on i − j (RoPE, Su et al. 2021, eq. 34).

    Channel m is paired with channel m + D/2 (the layout of Llama and GPT-NeoX weights), which is the paper's up to a fixed permutation.
    """

    needs_even_heads = True

    def __init__(self, d_model: int, n_heads: int, head_dim: int, context_length: int, base: float = 10000.0):
        super().__init__(d_model, n_heads, head_dim, context_length)
        if head_dim % 2:
            raise ValueError(f"rotary positions rotate pairs of channels: the head size must be even, not {head_dim}")
        self.base = base

    def tables(self, positions_BT: Tensor) -> tuple[Tensor, ...]:
        pair = torch.arange(self.head_dim // 2, device=positions_BT.device, dtype=torch.float32)
        angle_BTP = positions_BT[..., None].float() * self.base ** (-2 * pair / self.head_dim)
        angle_B1TD = torch.cat((angle_BTP, angle_BTP), dim=-1)[:, None]
        sign = torch.ones(self.head_dim, device=positions_BT.device, dtype=torch.float32)
        sign[: self.head_dim // 2] = -1
        return angle_B1TD.cos(), angle_B1TD.sin() * sign

    def encode(self, q_BHTD: Tensor, k_BKTD: Tensor | None, v_BKTD: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        assert k_BKTD is not None
        return self._rotate(q_BHTD, *tables), self._rotate(k_BKTD, *tables)

    @staticmethod
    def _rotate(x_BHTD: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
        # (a, b) → (a·cos − b·sin, b·cos + a·sin): rolling by half swaps each pair, and the table holds the sign
        half = x_BHTD.shape[-1] // 2
        return torch.addcmul(x_BHTD * cos.to(x_BHTD.dtype), x_BHTD.roll(half, dims=-1), signed_sin.to(x_BHTD.dtype))


class Alibi(Position):
    """score_ij − m_h·|i − j| with one slope per head, m_h = 2^(−8h/H), h = 1 … H (Press et al. 2022, section 3)."""

    def slopes(self, device: torch.device) -> Tensor:
        head = torch.arange(1, self.n_heads + 1, device=device, dtype=torch.float32)
        return torch.exp2(-8.0 * head / self.n_heads)


class PositionalAttention(Position):
    """softmax(Q Pᵀ / √d_k) V with P_j = PE(j) the sinusoidal encoding of width d_k: queries attend by position, not by content."""

    uses_keys = False

    def __init__(self, d_model: int, n_heads: int, head_dim: int, context_length: int, base: float = 10000.0, sine_only: bool = False):
        super().__init__(d_model, n_heads, head_dim, context_length)
        self.base, self.sine_only = base, sine_only

    def tables(self, positions_BT: Tensor) -> tuple[Tensor, ...]:
        return (sinusoid(positions_BT, self.head_dim, self.base, self.sine_only)[:, None],)

    def encode(self, q_BHTD: Tensor, k_BKTD: Tensor | None, v_BKTD: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return q_BHTD, tables[0].to(q_BHTD.dtype).expand_as(v_BKTD)
