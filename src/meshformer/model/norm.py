"""Normalisation of the last dimension: what keeps the residual stream, queries and keys at a scale that training can bear."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """x → x / rms(x) · g with rms(x) = √(mean(x²) + ε), the mean over the last dimension and at least in fp32 (Zhang & Sennrich 2019).

    Any shape (…, dim), in and out in the same type on a CPU. There torch's own is these operations and three more, each a pass over x, and
    about as many again for the gradient, which `_Normed` halves. GPUs have a fused kernel for it.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not self.elementwise_affine or len(self.normalized_shape) > 1:
            return super().forward(x)
        gain = self.weight.to(x.dtype)
        if torch.is_grad_enabled() and type(x) is Tensor and not torch.compiler.is_compiling():
            return _Normed.apply(x, gain, self.eps)[0]  # pyright: ignore[reportOptionalSubscript]
        return x * _over_rms(x, self.eps) * gain


def _over_rms(x: Tensor, eps: float | None) -> Tensor:
    """1 / rms(x), one number a row."""
    wide = torch.promote_types(x.dtype, torch.float32)
    mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square() / x.shape[-1]
    return torch.rsqrt(mean_square + (torch.finfo(wide).eps if eps is None else eps)).to(x.dtype)


class _Normed(torch.autograd.Function):
    """(x / rms(x) · g, 1 / rms(x)). The gradient of layer norm at mean 0, for which a CPU has a fused kernel, differs from this one's by what
    flows through the mean, one number a row: that is added back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, gain: Tensor, eps: float | None) -> tuple[Tensor, Tensor]:
        over_rms = _over_rms(x, eps)
        return (x * over_rms).mul_(gain), over_rms

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, gain, ctx.eps = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, gain, output[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, gain, over_rms = ctx.saved_tensors
        if torch.is_grad_enabled():  # this gradient is itself to be differentiated
            over_rms = _over_rms(x, ctx.eps)
            normed = x * over_rms
            dx = over_rms * (dy * gain - normed * (dy * gain * normed).mean(-1, keepdim=True))
            return dx, (dy * normed).flatten(0, -2).sum(0), None
        backward = torch.ops.aten.native_layer_norm_backward
        dx, dgain, _ = backward(dy, x, gain.shape, torch.zeros_like(over_rms), over_rms, gain, None, [True, True, False])
        return dx.add_((dy @ gain)[..., None].mul_(over_rms / x.shape[-1])), dgain, None


class LayerNorm(nn.LayerNorm):
    """torch's, also where FSDP gathers gain and bias in less precision than x has, which torch's CPU kernel refuses."""

    def forward(self, input: Tensor) -> Tensor:
        if self.weight is None or torch.promote_types(self.weight.dtype, input.dtype) == self.weight.dtype:
            return super().forward(input)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.layer_norm(input, self.normalized_shape, self.weight.to(input.dtype), bias, self.eps)


def make_norm(kind: str, dim: int, bias: bool, eps: float | None = None) -> nn.Module:
    """`layer`: LayerNorm (Ba et al. 2016), x → (x − mean)/std · g (+ b). `rms`: RMSNorm.

    `eps` is added to the variance; None: 1e-5 for `layer`, 1e-6 for `rms`.
    """
    if kind == "layer":
        return LayerNorm(dim, eps=1e-5 if eps is None else eps, bias=bias)
    if kind == "rms":
        return RMSNorm(dim, eps=1e-6 if eps is None else eps)
    raise ValueError(f"norm must be 'layer' or 'rms', not {kind!r}")
