"""Positional encodings, one class each. All of them are computed from the positions themselves: no buffers, so nothing to fill after
meta-device construction and nothing that limits the length except `Learned`.

A Transformer calls, in this order: `embed` once on the token embeddings, `tables` and `bias` once a forward pass, `encode` in every layer.
Shapes: B batch (or 1 where all rows agree), T time of queries, S time of keys, H heads, K key/value heads, D head dim, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Position(nn.Module):
    """What every encoding may do; the defaults do nothing. `uses_keys` is False where queries meet positions instead of keys."""

    uses_keys = True
    needs_even_heads = False
    has_table = False  # trained rows, one for each position

    def __init__(self, d_model: int, n_heads: int, head_dim: int, context_length: int):
        super().__init__()
        self.d_model, self.n_heads, self.head_dim, self.context_length = d_model, n_heads, head_dim, context_length

    def embed(self, x_BTC: Tensor, positions_BT: Tensor) -> Tensor:
        """Token embeddings with their positions added."""
        return x_BTC

    def tables(self, positions_BT: Tensor) -> tuple[Tensor, ...]:
        """What `encode` needs for these positions, computed once and shared by all layers."""
        return ()

    def encode(self, q_BHTD: Tensor, k_BKTD: Tensor | None, v_BKTD: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Queries and keys with their positions in them."""
        assert k_BKTD is not None
        return q_BHTD, k_BKTD

    def slopes(self, device: torch.device) -> Tensor | None:
        """(H,) m_h, where score_ij falls by m_h·|i − j|: a kernel that computes it on the way (flex) stores no bias."""
        return None

    def bias(self, q_positions_BT: Tensor, k_positions_BS: Tensor) -> Tensor | None:
        """(B, H, T, S), added to the scores before the softmax; by default what the slopes say."""
        slopes_H = self.slopes(q_positions_BT.device)
        return None if slopes_H is None else falling_bias(slopes_H, q_positions_BT, k_positions_BS)

    @property
    def has_own_bias(self) -> bool:
        """A class that writes its own `bias` means that one, whatever slopes it inherits."""
        return type(self).bias is not Position.bias

    def share_heads(self, rank: int, size: int) -> None:
        """Of the bias or slopes, which are computed for all heads, keep those of the `rank`-th of `size` equal groups from now on. In place."""
        name, heads = ("bias", 1) if self.has_own_bias else ("slopes", 0)
        whole = getattr(self, name)

        def of_own_heads(*args: Any) -> Tensor | None:
            of_all = whole(*args)
            return None if of_all is None else of_all.chunk(size, dim=heads)[rank]

        setattr(self, name, of_own_heads)


def falling_bias(slopes_H: Tensor, q_positions_BT: Tensor, k_positions_BS: Tensor) -> Tensor:
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
    exponent = 2 * channel / dim if sine_only else 2 * (channel // 2) / dim  # in fp32, also where the default type is bf16
    angle_BTC = positions_BT[..., None].float() * base**-exponent
    if sine_only:
        return angle_BTC.sin()
    return torch.where(channel % 2 == 0, angle_BTC.sin(), angle_BTC.cos())


class Sinusoidal(Position):
    """x_i + PE(i), fixed waves of geometrically growing length (Vaswani et al. 2017, section 3.5); see `sinusoid` for both forms."""

    def __init__(self, d_model: int, n_heads: int, head_dim: int, context_length: int, base: float = 10000.0, sine_only: bool = False):
        super().__init__(d_model, n_heads, head_dim, context_length)
        self.base, self.sine_only = base, sine_only

    def embed(self, x_BTC: Tensor, positions_BT: Tensor) -> Tensor:
        return x_BTC + sinusoid(positions_BT, self.d_model, self.base, self.sine_only).to(x_BTC.dtype)


class Learned(Position):
    """x_i + W_i with W a trained table of `context_length` rows (Gehring et al. 2017; GPT, BERT). Longer inputs are refused."""

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
        # (a, b) → (a·cos − b·sin, b·cos + a·sin); rolling by half swaps the members of every pair, the sign sits in the table
        half = x_BHTD.shape[-1] // 2
        return torch.addcmul(x_BHTD * cos.to(x_BHTD.dtype), x_BHTD.roll(half, dims=-1), signed_sin.to(x_BHTD.dtype))


class Alibi(Position):
    """score_ij − m_h·|i − j| with one slope a head, m_h = 2^(−8h/H), h = 1 … H (Press et al. 2022, section 3)."""

    def slopes(self, device: torch.device) -> Tensor:
        head = torch.arange(1, self.n_heads + 1, device=device, dtype=torch.float32)
        return torch.exp2(-8.0 * head / self.n_heads)


class PositionalAttention(Position):
    """softmax(Q Pᵀ / √d_k) V with P_j = PE(j) the sinusoidal encoding at head size: queries choose *where* to look, not at what."""

    uses_keys = False

    def __init__(self, d_model: int, n_heads: int, head_dim: int, context_length: int, base: float = 10000.0, sine_only: bool = False):
        super().__init__(d_model, n_heads, head_dim, context_length)
        self.base, self.sine_only = base, sine_only

    def tables(self, positions_BT: Tensor) -> tuple[Tensor, ...]:
        return (sinusoid(positions_BT, self.head_dim, self.base, self.sine_only)[:, None],)

    def encode(self, q_BHTD: Tensor, k_BKTD: Tensor | None, v_BKTD: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return q_BHTD, tables[0].to(q_BHTD.dtype).expand_as(v_BKTD)
