"""Scaled dot-product attention, softmax(Q Kᵀ / √d_k) V (Vaswani et al. 2017, equation 1), and the multi-head layer around it.

Shapes: B batch, T time (queries), S time (keys), H query heads, K key/value heads (H is a multiple of K), D head dim, C channels.
The number of heads is never divided by anything: `view(B, T, -1, D)` infers it, so the same code runs on all heads or on one rank's share of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import KeyValueCache
from .norm import RMSNorm
from .position import Position


@dataclass(frozen=True)
class Mask:
    """Which keys a query may see, kept as its ingredients so that a kernel can use the cheapest equivalent form.

    A key is visible when all of these hold: `causal` → its position is not after the query's; `window` w → it is fewer than w positions
    away; documents given → it is in the query's document (padding is a document of its own, so no row is ever empty).
    `*_positions` are (B or 1, T or S); `natural` says both are 0, 1, 2, … which allows the kernels' built-in causal mask.
    """

    causal: bool
    window: int | None
    q_positions_BT: Tensor
    k_positions_BS: Tensor
    natural: bool = True
    q_documents_BT: Tensor | None = None
    k_documents_BS: Tensor | None = None

    @property
    def is_plain_causal(self) -> bool:
        return self.causal and self.natural and self.window is None and self.q_documents_BT is None

    @property
    def hides_nothing(self) -> bool:
        return not self.causal and self.window is None and self.q_documents_BT is None

    def visible(self) -> Tensor | None:
        """Boolean (B or 1, 1, T, S), True where the query may look; None when it may look everywhere."""
        if self.hides_nothing:
            return None
        ahead_BTS = self.k_positions_BS[:, None, :] - self.q_positions_BT[:, :, None]
        visible_BTS = ahead_BTS <= 0 if self.causal else torch.ones_like(ahead_BTS, dtype=torch.bool)
        if self.window is not None:
            visible_BTS = visible_BTS & (ahead_BTS.abs() < self.window)
        if self.q_documents_BT is not None and self.k_documents_BS is not None:
            visible_BTS = visible_BTS & (self.q_documents_BT[:, :, None] == self.k_documents_BS[:, None, :])
        return visible_BTS[:, None]

    @cached_property
    def blocks(self) -> Any:
        """The same for `flex_attention`: which blocks of 128 queries × 128 keys hold something to see. Made once a mask, not once a layer."""
        from torch.nn.attention.flex_attention import create_block_mask

        q_positions, k_positions = self.q_positions_BT, self.k_positions_BS
        q_documents, k_documents = self.q_documents_BT, self.k_documents_BS
        positions_batch = q_positions.shape[0] > 1

        def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            row = b if positions_batch else 0
            ahead = k_positions[row, k] - q_positions[row, q]
            seen = ahead <= 0 if self.causal else ahead == ahead
            if self.window is not None:
                seen = seen & (ahead.abs() < self.window)
            if q_documents is not None and k_documents is not None:
                seen = seen & (q_documents[b, q] == k_documents[b, k])
            return seen

        batch = q_documents.shape[0] if q_documents is not None else q_positions.shape[0]
        make = _compiled(create_block_mask) if q_positions.is_cuda else create_block_mask
        return make(sees, batch, None, q_positions.shape[1], k_positions.shape[1], device=q_positions.device)

    def added(self, dtype: torch.dtype) -> Tensor | None:
        """The same as a number to add to scores, (B or 1, 1, T, S): 0 where the query may look, −∞ elsewhere; None when it may look everywhere.

        Hidden scores must be finite (∞ − ∞ is not hidden). One mask serves all heads, so adding it costs a fifth of filling every head's scores
        (bf16, 6 heads, 256 tokens, two CPU cores).
        """
        visible = self.visible()
        return None if visible is None else torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, float("-inf"))


# Every kernel has this signature: attend(q_BHTD, k_BKSD, v_BKSD, mask, bias, dropout) -> out_BHTD, where bias (1 or B, H, T, S) is added
# to the scores before the softmax (ALiBi) or is None.
Attend = Callable[[Tensor, Tensor, Tensor, Mask, "Tensor | None", float], Tensor]


def attend_reference(
    q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Mask, bias: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """The formula, line by line: weights = softmax(Q Kᵀ / √d_k + bias), out = weights V. Returns (B, H, T, D)."""
    groups = q_BHTD.shape[1] // k_BKSD.shape[1]
    if groups > 1:  # grouped-query attention (Ainslie et al. 2023): neighbouring query heads share one key/value head
        k_BKSD = k_BKSD.repeat_interleave(groups, dim=1)
        v_BKSD = v_BKSD.repeat_interleave(groups, dim=1)
    scores_BHTS = (q_BHTD / math.sqrt(q_BHTD.shape[-1])) @ k_BKSD.transpose(-2, -1)
    if bias is not None:
        scores_BHTS = scores_BHTS + bias
    hidden = mask.added(scores_BHTS.dtype)
    if hidden is not None:
        scores_BHTS = scores_BHTS + hidden
    weights_BHTS = scores_BHTS.softmax(dim=-1).to(v_BKSD.dtype)
    return F.dropout(weights_BHTS, dropout) @ v_BKSD


def attend_fused(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Mask, bias: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """The same through `scaled_dot_product_attention` (Dao et al. 2022): the T × S weights are never stored. Returns (B, H, T, D)."""
    attn_mask = None
    plain_causal = mask.is_plain_causal and bias is None
    if not plain_causal:
        attn_mask = mask.visible()
        if bias is not None:
            bias = bias.to(q_BHTD.dtype)
            attn_mask = bias if attn_mask is None else bias.masked_fill(~attn_mask, float("-inf"))
    gqa = q_BHTD.shape[1] != k_BKSD.shape[1]
    return F.scaled_dot_product_attention(q_BHTD, k_BKSD, v_BKSD, attn_mask, dropout, is_causal=plain_causal, enable_gqa=gqa)


def attend_flex(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Mask, bias: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """The same through `flex_attention` (Dong et al. 2024), which skips blocks of keys that no query of a block sees. Returns (B, H, T, D).

    Compiled on a GPU, as it must be to be fast; torch has no gradient of it on a CPU. It has no dropout, and a bias, stored whole, leaves it
    nothing to save: both are left to `scaled_dot_product_attention`.
    """
    if bias is not None or dropout or mask.hides_nothing:
        return attend_fused(q_BHTD, k_BKSD, v_BKSD, mask, bias, dropout)
    from torch.nn.attention.flex_attention import flex_attention

    kernel: Any = _compiled(flex_attention) if q_BHTD.is_cuda and not torch.compiler.is_compiling() else flex_attention
    # Autocast may leave queries and keys in fp32, behind their norm: this kernel takes one type.
    q_BHTD, k_BKSD = q_BHTD.to(v_BKSD.dtype), k_BKSD.to(v_BKSD.dtype)
    gqa = q_BHTD.shape[1] != k_BKSD.shape[1]
    return kernel(q_BHTD, k_BKSD, v_BKSD, block_mask=mask.blocks, enable_gqa=gqa)


@cache
def _compiled(function: Callable[..., Any]) -> Any:
    return torch.compile(function, dynamic=False)


def attend_auto(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Mask, bias: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """The fastest of the three for this device, type, length and mask. Returns (B, H, T, D)."""
    if bias is None and not dropout and _blocks_are_faster(q_BHTD, v_BKSD, mask):
        kernel = attend_flex
    else:
        kernel = attend_reference if _written_out_is_faster(q_BHTD, k_BKSD.shape[2]) else attend_fused
    return kernel(q_BHTD, k_BKSD, v_BKSD, mask, bias, dropout)


def _written_out_is_faster(q: Tensor, keys: int) -> bool:
    """Measured on two CPU cores, forward and backward, time of the written-out form relative to the fused kernel:

    - bf16 on a processor with bf16 matrix units, batch 8, 6 heads, 256 tokens, head size 64: 0.4 (batched products use the units, the
      fused CPU kernel does not);
    - fp32 without them (AVX2, 2026-11-24): 1.3 at 64 tokens, 1.2 at 256, 1.9 at 1,024, 2.4 at 2,048.

    The written-out form stores H x T x S weights, so long inputs take the fused kernel in any case. GPUs always do.
    """
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and keys <= 1024


def _blocks_are_faster(q: Tensor, v: Tensor, mask: Mask) -> bool:
    """On a GPU, in half precision, where the mask is more than the triangle that the flash kernel knows and long enough to have blocks to skip
    (`python -m meshformer.bench gpu --parts long`). Not inside a compiled block, where the block mask would be made anew in each layer."""
    if not q.is_cuda or torch.compiler.is_compiling():
        return False
    return v.element_size() == 2 and q.shape[2] == v.shape[2] >= 1024 and q.shape[3] >= 16 and not mask.is_plain_causal and not mask.hides_nothing


def cast_once(x: Tensor) -> Tensor:
    """Under autocast x in the type of its products. Each linear layer that reads x would else cast it again, and keep a copy for its gradient."""
    device = x.device.type
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return x.to(torch.get_autocast_dtype(device)) if casts else x


def stay_wide(x: Tensor) -> Tensor:
    """Under autocast x in fp32: what the residual stream begins with, also where a layout hands the embedding over in bf16."""
    device = x.device.type
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return x.float() if casts else x


class Attention(nn.Module):
    """Multi-head (and grouped-query) attention with separate q, k, v, o projections. (B, T, C) → (B, T, C)."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int,
        layer: int,
        *,
        attend: Attend,
        keys: bool = True,
        bias: bool = False,
        qk_norm: bool = False,
        dropout: float = 0.0,
        head_dim: int | None = None,
    ):
        super().__init__()
        self.head_dim = head_dim or d_model // n_heads
        self.layer = layer
        self.attend = attend
        self.dropout = dropout
        self.q = nn.Linear(d_model, n_heads * self.head_dim, bias=bias)
        # Positional attention scores queries against positions alone: it has no keys to project.
        self.k = nn.Linear(d_model, n_kv_heads * self.head_dim, bias=bias) if keys else None
        self.v = nn.Linear(d_model, n_kv_heads * self.head_dim, bias=bias)
        self.o = nn.Linear(n_heads * self.head_dim, d_model, bias=bias)
        # QK-norm (Henry et al. 2020): bounded scores, so that higher learning rates stay stable.
        self.q_norm = RMSNorm(self.head_dim) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim) if qk_norm and keys else None

    def forward(
        self,
        x_BTC: Tensor,
        mask: Mask,
        position: Position,
        tables: tuple[Tensor, ...],
        bias: Tensor | None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        B, T, _ = x_BTC.shape
        x_BTC = cast_once(x_BTC)
        q_BTHD = self.q(x_BTC).view(B, T, -1, self.head_dim)
        v_BKTD = self.v(x_BTC).view(B, T, -1, self.head_dim).transpose(1, 2)
        k_BTKD = self.k(x_BTC).view(B, T, -1, self.head_dim) if self.k is not None else None
        if self.q_norm is not None:
            q_BTHD = self.q_norm(q_BTHD)
        if self.k_norm is not None and k_BTKD is not None:
            k_BTKD = self.k_norm(k_BTKD)
        q_BHTD = q_BTHD.transpose(1, 2)
        k_BKTD = k_BTKD.transpose(1, 2) if k_BTKD is not None else None
        q_BHTD, k_BKTD = position.encode(q_BHTD, k_BKTD, v_BKTD, tables)
        if cache is not None:  # keys are stored with their positions already applied
            k_BKTD, v_BKTD = cache.append(self.layer, k_BKTD, v_BKTD)
        out_BHTD = self.attend(q_BHTD, k_BKTD, v_BKTD, mask, bias, self.dropout if self.training else 0.0)
        return self.o(out_BHTD.transpose(1, 2).reshape(B, T, -1))
