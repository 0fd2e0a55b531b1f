"""Normalisation over the last dimension: RMSNorm and LayerNorm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .settings import usual_eps


class RMSNorm(nn.RMSNorm):
    """x → x / rms(x) · g with rms(x) = √(mean(x²) + ε), the mean over the last dimension and at least in fp32 (Zhang & Sennrich 2019).

    Any shape (…, dim). On a CPU the output has the input's dtype, and this class replaces torch's implementation, which runs more operations in
    both passes. GPUs use torch's fused kernels, and torch.compile fuses the operations by itself.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not self.elementwise_affine or len(self.normalized_shape) > 1:
            return super().forward(x)
        eps = torch.finfo(_wide(x)).eps if self.eps is None else self.eps
        if _is_plain(x) and _is_plain(self.weight) and not torch.compiler.is_compiling():
            return _ByLayerNormKernel.apply(x, self.weight, eps)
        return x * _inverse_rms(x, eps).to(x.dtype) * self.weight.to(x.dtype)


def _is_plain(x: Tensor) -> bool:
    return type(x) in (Tensor, nn.Parameter) or hasattr(x, "fake_mode")  # a fake tensor stands for a plain one (plan/live_memory.py)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return (torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_wide(x)).square() / x.shape[-1] + eps).rsqrt()


class _ByLayerNormKernel(torch.autograd.Function):
    """RMSNorm whose backward pass calls torch's fused LayerNorm kernel. With mean 0 and r = 1/rms(x), the LayerNorm gradient is the RMSNorm
    gradient minus r · mean(g · dy), which is added back. On two cores with `amx_bf16` (2026-11-29) a bf16 step of 6 layers, width 384, takes
    12 % less time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        inverse = _inverse_rms(x, eps)
        ctx.save_for_backward(x, gain, inverse)
        return (x * inverse.to(x.dtype)).mul_(gain.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, gain, inverse = ctx.saved_tensors
        n, wide_gain, zero = x.shape[-1], gain.to(inverse.dtype), torch.zeros_like(inverse)
        dx, dgain, _ = torch.ops.aten.native_layer_norm_backward(
            dy.contiguous(), x.contiguous(), [n], zero, inverse, wide_gain, None, [True, True, False]
        )
        mean = (dy @ gain.to(dy.dtype)).unsqueeze(-1) / n
        return dx.add_(mean * inverse.to(dy.dtype)), dgain.to(gain.dtype), None


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm, which also runs where FSDP gathers gain and bias in a lower precision than x: torch's CPU kernel raises there."""

    def forward(self, input: Tensor) -> Tensor:
        if self.weight is None or torch.promote_types(self.weight.dtype, input.dtype) == self.weight.dtype:
            return super().forward(input)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.layer_norm(input, self.normalized_shape, self.weight.to(input.dtype), bias, self.eps)


def make_norm(kind: str, dim: int, bias: bool, eps: float | None = None) -> nn.Module:
    """`layer`: LayerNorm (Ba et al. 2016), x → (x − mean)/std · g (+ b). `rms`: RMSNorm.

    `eps` is added to the variance; None means `usual_eps`.
    """
    eps = usual_eps(kind) if eps is None else eps
    if kind == "layer":
        return LayerNorm(dim, eps=eps, bias=bias)
    if kind == "rms":
        return RMSNorm(dim, eps=eps)
    raise ValueError(f"norm must be 'layer' or 'rms', not {kind!r}")
