"""Scaled dot-product attention, softmax(Q Kᵀ / √d_k) V (Vaswani et al. 2017, equation 1), and the multi-head layer around it.

Shapes: B batch, T time (queries), S time (keys), H query heads, K key/value heads (H is a multiple of K), D head dim, C channels.
`view(B, T, -1, D)` infers the number of heads, so the same code runs on all heads or, under tensor parallelism, on one rank's heads.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshformer.compat.torch import flex_operator

from .cache import KeyValueCache
from .norm import RMSNorm
from .position import Position, distance_bias


@dataclass(frozen=True)
class Mask:
    """Which keys each query attends to, stored as positions and rules instead of a (T, S) matrix: each kernel builds the form it runs fastest.

    A key is visible when all of these hold: `causal` → its position is not after the query's; `window` w → it is fewer than w positions
    away; documents given → it is in the query's document (padding is a document of its own, so every query sees at least one key).
    `*_positions` and `*_documents` are (B or 1, T or S). `natural`: both positions are 0, 1, 2, …, so a kernel's built-in causal mask is correct.
    Only `flex_attention` reads `blocks` (its BlockMask) and `slopes_H` (ALiBi), see `with_blocks`.
    """

    causal: bool
    window: int | None
    q_positions_BT: Tensor
    k_positions_BS: Tensor
    natural: bool = True
    q_documents_BT: Tensor | None = None
    k_documents_BS: Tensor | None = None
    slopes_H: Tensor | None = None
    blocks: Any = None

    @property
    def is_plain_causal(self) -> bool:
        return self.causal and self.natural and self.window is None and self.q_documents_BT is None

    @property
    def hides_nothing(self) -> bool:
        return not self.causal and self.window is None and self.q_documents_BT is None

    def visible(self) -> Tensor | None:
        """Boolean (B or 1, 1, T, S), True where the query attends to the key; None when every key is visible."""
        if self.hides_nothing:
            return None
        ahead_BTS = self.k_positions_BS[:, None, :] - self.q_positions_BT[:, :, None]
        visible_BTS = ahead_BTS <= 0 if self.causal else torch.ones_like(ahead_BTS, dtype=torch.bool)
        if self.window is not None:
            visible_BTS = visible_BTS & (ahead_BTS.abs() < self.window)
        if self.q_documents_BT is not None and self.k_documents_BS is not None:
            visible_BTS = visible_BTS & (self.q_documents_BT[:, :, None] == self.k_documents_BS[:, None, :])
        return visible_BTS[:, None]

    def with_blocks(self, slopes_H: Tensor | None = None) -> Mask:
        """A copy with the arguments of `flex_attention`: a BlockMask (which 128 × 128 blocks of scores are not fully masked) and ALiBi slopes.

        Call it once per forward pass, before the first Transformer block, so that a compiled block receives it as an ordinary input.
        """
        from torch.nn.attention.flex_attention import create_block_mask

        causal, window, ahead_of = self.causal, self.window, self._ahead()
        q_documents, k_documents = self.q_documents_BT, self.k_documents_BS

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            ahead = ahead_of(b, q, k)
            seen = ahead <= 0 if causal else ahead == ahead
            if window is not None:
                seen = seen & (ahead.abs() < window)
            if q_documents is not None and k_documents is not None:
                seen = seen & (q_documents[b, q] == k_documents[b, k])
            return seen

        batch = max(1 if x is None else x.shape[0] for x in (self.q_positions_BT, self.k_positions_BS, q_documents))
        make = _compiled(create_block_mask) if self.q_positions_BT.is_cuda else create_block_mask
        sizes = (self.q_positions_BT.shape[1], self.k_positions_BS.shape[1])
        blocks = make(mask_mod, batch if batch > 1 else None, None, *sizes, device=self.q_positions_BT.device)
        return replace(self, slopes_H=slopes_H, blocks=blocks)

    def _ahead(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """A function of (batch, query, key) indices: the position of the key minus the position of the query."""
        if self.natural:
            return lambda b, q, k: k - q
        q_positions, k_positions = self.q_positions_BT, self.k_positions_BS
        if q_positions.shape[0] == k_positions.shape[0] == 1:
            return lambda b, q, k: k_positions[0, k] - q_positions[0, q]
        return lambda b, q, k: k_positions[b, k] - q_positions[b, q]

    def score_mod(self) -> Callable[..., Tensor] | None:
        """`score_mod` of `flex_attention` for ALiBi: score − slope · |distance|; None without slopes."""
        slopes, ahead_of = self.slopes_H, self._ahead()
        return None if slopes is None else lambda score, b, h, q, k: score - slopes[h] * ahead_of(b, q, k).abs()

    def bias(self) -> Tensor | None:
        """The ALiBi slopes as a bias (B or 1, H, T, S), for the kernels that take a tensor; None without slopes."""
        return None if self.slopes_H is None else distance_bias(self.slopes_H, self.q_positions_BT, self.k_positions_BS)

    def added(self, dtype: torch.dtype) -> Tensor | None:
        """The additive mask (B or 1, 1, T, S): 0 where the key is visible, −∞ elsewhere; None when every key is visible.

        Masked scores must be finite before the addition, since ∞ − ∞ is NaN. Adding one mask for all heads takes a fifth of the time of
        `masked_fill` on every head's scores (bf16, 6 heads, 256 tokens, two CPU cores).
        """
        visible = self.visible()
        return None if visible is None else torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, float("-inf"))


# Every kernel has this signature: attend(q_BHTD, k_BKSD, v_BKSD, mask, bias, dropout) -> out_BHTD, where bias (1 or B, H, T, S) is added
# to the scores before the softmax (ALiBi) or is None.
Attend = Callable[[Tensor, Tensor, Tensor, Mask, "Tensor | None", float], Tensor]


def attend_reference(
    q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Mask, bias: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """The textbook formula: weights = softmax(Q Kᵀ / √d_k + bias), out = weights V. Returns (B, H, T, D)."""
    groups = q_BHTD.shape[1] // k_BKSD.shape[1]
    if groups > 1:  # grouped-query attention (Ainslie et al. 2023): neighbouring query heads share one key/value head
        k_BKSD = k_BKSD.repeat_interleave(groups, dim=1)
        v_BKSD = v_BKSD.repeat_interleave(groups, dim=1)
    scores_BHTS = (q_BHTD / math.sqrt(q_BHTD.shape[-1])) @ k_BKSD.transpose(-2, -1)
    bias = mask.bias() if bias is None else bias
    if bias is not None:
        scores_BHTS = scores_BHTS + bias
    hidden = mask.added(scores_BHTS.dtype)
    if hidden is not None:
        scores_BHTS = scores_BHTS + hidden
    weights_BHTS = scores_BHTS.softmax(dim=-1).to(v_BKSD.dtype)
    return F.dropout(weights_BHTS, dropout) @ v_BKSD


def attend_fused(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Mask, bias: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """`scaled_dot_product_attention` (FlashAttention, Dao et al. 2022), which does not store the T × S weights. Returns (B, H, T, D)."""
    attn_mask = None
    bias = mask.bias() if bias is None else bias
    plain_causal = mask.is_plain_causal and bias is None
    if not plain_causal:
        attn_mask = mask.visible()
        if bias is not None:
            bias = bias.to(q_BHTD.dtype)
            attn_mask = bias if attn_mask is None else bias.masked_fill(~attn_mask, float("-inf"))
    gqa = q_BHTD.shape[1] != k_BKSD.shape[1]
    return F.scaled_dot_product_attention(q_BHTD, k_BKSD, v_BKSD, attn_mask, dropout, is_causal=plain_causal, enable_gqa=gqa)


def attend_flex(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Mask, bias: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """`flex_attention` (Dong et al. 2024), which skips blocks of scores that are fully masked. Returns (B, H, T, D).

    Falls back to `scaled_dot_product_attention` where flex has no support (dropout, a head dim below 16 on a GPU, gradients of a kernel
    compiled for a CPU) or no advantage (a bias tensor, no mask at all).
    """
    stored = bias is not None or (mask.hides_nothing and mask.slopes_H is None)
    if stored or dropout or (_needs_kernel(q_BHTD) and q_BHTD.shape[-1] < 16) or _lacks_gradient(q_BHTD):
        return attend_fused(q_BHTD, k_BKSD, v_BKSD, mask, bias, dropout)
    blocks = (mask if mask.blocks is not None else mask.with_blocks(mask.slopes_H)).blocks
    # Under autocast the QK-norm returns fp32; the flex kernel needs q, k and v in one dtype.
    q_BHTD, k_BKSD = q_BHTD.to(v_BKSD.dtype), k_BKSD.to(v_BKSD.dtype)
    if not _needs_kernel(q_BHTD):
        return _flex_unfused(q_BHTD, k_BKSD, v_BKSD, mask.score_mod(), blocks)
    from torch.nn.attention.flex_attention import flex_attention

    kernel: Any = flex_attention if torch.compiler.is_compiling() else _compiled(flex_attention)
    gqa = q_BHTD.shape[1] != k_BKSD.shape[1]
    return kernel(q_BHTD, k_BKSD, v_BKSD, score_mod=mask.score_mod(), block_mask=blocks, enable_gqa=gqa)


def _needs_kernel(q: Tensor) -> bool:
    return q.device.type != "cpu"


def _lacks_gradient(q: Tensor) -> bool:
    return q.device.type == "cpu" and torch.compiler.is_compiling() and torch.is_grad_enabled()


def _flex_unfused(q: Tensor, k: Tensor, v: Tensor, score_mod: Callable[..., Tensor] | None, blocks: Any) -> Tensor:
    """The eager (unfused) operator behind `flex_attention`, for CPUs: the public function raises there when gradients are needed."""
    unchanged = lambda score, b, h, q, k: score  # noqa: E731
    return flex_operator()(q, k, v, score_mod or unchanged, blocks.as_tuple(), 1 / math.sqrt(q.shape[-1]), {"OUTPUT_LOGSUMEXP": True})[0]


@cache
def _compiled(function: Callable[..., Any]) -> Any:
    return torch.compile(function)


def attend_auto(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Mask, bias: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """The fastest of the three kernels for this device, dtype, length and mask. Returns (B, H, T, D)."""
    if mask.blocks is not None:
        kernel = attend_flex
    else:
        kernel = attend_reference if _reference_is_faster(q_BHTD, k_BKSD.shape[2]) else attend_fused
    return kernel(q_BHTD, k_BKSD, v_BKSD, mask, bias, dropout)


def needs_block_mask(attend: Attend, mask: Mask, slopes_H: Tensor | None, x_BTC: Tensor, head_dim: int) -> bool:
    """Whether `attend` will run `flex_attention` on hidden states x, so that `Mask.with_blocks` must be called before the first block."""
    kernel: Any = inspect.unwrap(attend)  # parallel/context.py wraps the kernel
    kernel = getattr(kernel, "func", kernel)  # Hydra passes a functools.partial
    if (mask.hides_nothing or (mask.is_plain_causal and kernel is not attend_flex)) and slopes_H is None:
        return False
    return kernel is attend_flex or (kernel is attend_auto and _flex_is_faster(x_BTC, mask, head_dim))


def _reference_is_faster(q: Tensor, keys: int) -> bool:
    """Whether `attend_reference` beats `attend_fused`. Time of the reference divided by the fused kernel's, forward and backward, two CPU cores:

    - bf16 on a processor with bf16 matrix units, batch 8, 6 heads, 256 tokens, head dim 64: 0.4 (batched matrix products use the units, the
      fused CPU kernel does not);
    - fp32 on AVX2 (2026-11-24): 1.3 at 64 tokens, 1.2 at 256, 1.9 at 1,024, 2.4 at 2,048.

    The reference stores H × T × S weights, so long sequences use the fused kernel in any case, and so do GPUs.
    """
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and keys <= 1024


def _flex_is_faster(x: Tensor, mask: Mask, head_dim: int) -> bool:
    """Whether flex beats SDPA for a mask that is not plainly causal: on GPUs, in 16-bit, for sequences long enough to have blocks to skip.
    Measured with `python -m meshformer.bench gpu --parts long`."""
    T, S = mask.q_positions_BT.shape[1], mask.k_positions_BS.shape[1]
    return x.is_cuda and product_type(x).itemsize == 2 and T >= 128 and S >= 1024 and head_dim >= 16


def product_type(x: Tensor) -> torch.dtype:
    """The dtype in which matrix products of x are computed: autocast's where it is enabled."""
    return torch.get_autocast_dtype(x.device.type) if _autocasts(x) else x.dtype


def cast_once(x: Tensor) -> Tensor:
    """Casts x to autocast's dtype once. Otherwise each linear layer that reads x casts it again and saves its own copy for the backward pass."""
    return x.to(product_type(x))


def keep_fp32(x: Tensor) -> Tensor:
    """Under autocast x in fp32: the residual stream starts in fp32 even where FSDP gathers the embedding table in bf16."""
    return x.float() if _autocasts(x) else x


def _autocasts(x: Tensor) -> bool:
    device = x.device.type  # torch 2.11 cannot trace `is_autocast_available`; the meta device has no autocast
    return device != "meta" and torch.is_autocast_enabled(device)


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
        # PositionalAttention scores queries against positions, so it has no key projection.
        self.k = nn.Linear(d_model, n_kv_heads * self.head_dim, bias=bias) if keys else None
        self.v = nn.Linear(d_model, n_kv_heads * self.head_dim, bias=bias)
        self.o = nn.Linear(n_heads * self.head_dim, d_model, bias=bias)
        # QK-norm (Henry et al. 2020) bounds the scores, so higher learning rates stay stable.
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
        if cache is not None:  # the cache stores keys after the positional encoding
            k_BKTD, v_BKTD = cache.append(self.layer, k_BKTD, v_BKTD)
        out_BHTD = self.attend(q_BHTD, k_BKTD, v_BKTD, mask, bias, self.dropout if self.training else 0.0)
        return self.o(out_BHTD.transpose(1, 2).reshape(B, T, -1))
