"""The output layer: hidden states to logits or, given targets, to the cross-entropy in chunks, without storing all logits at once.

Logits (B, T, V) in fp32, their softmax and its gradient are the largest tensors of a model with a large vocabulary. The gradient of the summed
cross-entropy with respect to one token's logits is softmax(logits) − one_hot(target), which depends on no other token. The forward pass
therefore computes, for one chunk of tokens at a time, both the loss and the gradients of hidden states and weight; the backward pass only
scales these by the incoming gradient (Liger Kernel, Hsu et al. 2024; torch 2.13's `linear_cross_entropy` does the same, but not for a
vocabulary sharded over ranks).

Shapes: N tokens, C channels, V vocabulary, or this rank's shard of it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .settings import IGNORED

Combine = Callable[[Tensor, Literal["max", "sum"]], None]  # an in-place all-reduce over the ranks that share the vocabulary
AT_ONCE = 2**25  # logits per chunk: 128 MiB in fp32


class Head(nn.Linear):
    """Hidden states (B, T, C) → logits (B, T, V); with `targets` (B, T) → the summed cross-entropy, a scalar. See `head_loss`."""

    def forward(self, input: Tensor, targets: Tensor | None = None) -> Tensor:
        return super().forward(input) if targets is None else self.loss(input, targets)

    def loss(self, x_BTC: Tensor, targets_BT: Tensor) -> Tensor:
        return head_loss(x_BTC, self.weight, self.bias, targets_BT)


def head_loss(
    x_BTC: Tensor,
    weight_VC: Tensor,
    bias_V: Tensor | None,
    targets_BT: Tensor,
    ignored: int = IGNORED,
    combine: Combine | None = None,
    start: int = 0,
    widest: int | None = None,
) -> Tensor:
    """The sum of −log p(target) in nats over targets that are not `ignored`, computed in fp32 (logits in autocast's dtype). A scalar.

    With the vocabulary sharded over ranks: `combine` all-reduces over them, `start` is the first vocabulary entry of this rank, and `widest` the
    largest number of entries on any rank, so that all ranks use the same chunk length. The loss is then that of the whole vocabulary, and the
    gradient of x is a partial sum. The backward pass can run once: RuntimeError the second time.
    """
    device = x_BTC.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else weight_VC.dtype
    # A power of two, so that most chunks have the same length.
    rows = 1 << max(AT_ONCE // (widest or weight_VC.shape[0]), 1).bit_length() - 1
    settings = (dtype, rows, ignored, combine, start, torch.is_grad_enabled())
    return _HeadLoss.apply(x_BTC.flatten(0, -2), weight_VC, bias_V, targets_BT.flatten(), settings)  # pyright: ignore[reportReturnType]


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, weight_VC: Tensor, bias_V: Tensor | None, targets_N: Tensor, settings: Any) -> Tensor:
        dtype, rows, ignored, combine, start, grads = settings
        for_x, for_weight, for_bias = (grads and needed for needed in ctx.needs_input_grad[:3])
        gradients: list[Tensor | None] = [
            torch.empty_like(x_NC, dtype=dtype) if for_x else None,
            torch.zeros_like(weight_VC, dtype=torch.float32) if for_weight else None,
            torch.zeros_like(bias_V, dtype=torch.float32) if for_bias and bias_V is not None else None,
        ]
        of_x, of_weight, of_bias = gradients
        weight = weight_VC.to(dtype)
        bias = None if bias_V is None else bias_V.to(dtype)
        terms = _compiled() if x_NC.is_cuda and combine is None and find_spec("triton") else _terms
        loss = torch.zeros((), device=x_NC.device)
        device = x_NC.device.type
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            for first in range(0, len(x_NC), rows):
                x, targets = x_NC[first : first + rows].to(dtype), targets_N[first : first + rows]
                part, of_logits = terms(F.linear(x, weight, bias), targets, ignored, combine, start)
                loss += part
                if of_x is not None:
                    of_x[first : first + rows] = of_logits @ weight
                if of_weight is not None and dtype == torch.float32:
                    of_weight.addmm_(of_logits.T, x)
                elif of_weight is not None:
                    of_weight += of_logits.T @ x
                if of_bias is not None:
                    of_bias += of_logits.sum(0, dtype=torch.float32)
        ctx.gradients = gradients
        return loss

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place to save memory, hence only once
        if gradients is None:
            raise RuntimeError("the loss of a head has no second backward pass: compute it anew")
        return (*(None if gradient is None else gradient.mul_(given[0]) for gradient in gradients), None, None)


def _terms(logits_NV: Tensor, targets_N: Tensor, ignored: int, combine: Combine | None, start: int) -> tuple[Tensor, Tensor]:
    """The summed loss of one chunk, and its gradient with respect to the logits, in their dtype."""
    dtype, logits_NV = logits_NV.dtype, logits_NV.float()
    counted_N1 = (targets_N != ignored)[:, None]
    here_N1 = counted_N1 & (targets_N[:, None] >= start) & (targets_N[:, None] < start + logits_NV.shape[1])
    place_N1 = (targets_N[:, None] - start).where(here_N1, 0)
    largest_N1 = logits_NV.amax(1, keepdim=True)
    if combine is not None:
        combine(largest_N1, "max")
    logits_NV = logits_NV - largest_N1
    at_target_N1 = logits_NV.gather(1, place_N1).where(here_N1, 0)
    exp_NV = logits_NV.exp_()
    both_N2 = torch.cat((exp_NV.sum(1, keepdim=True), at_target_N1), 1)
    if combine is not None:
        combine(both_N2, "sum")
    total_N1, at_target_N1 = both_N2[:, :1], both_N2[:, 1:]
    loss = (total_N1.log() - at_target_N1).where(counted_N1, 0).sum()
    softmax_NV = exp_NV.div_(total_N1)
    gradient_NV = softmax_NV.scatter(1, place_N1, softmax_NV.gather(1, place_N1) - here_N1.float())
    return loss, gradient_NV.where(counted_N1, 0).to(dtype)


@cache
def _compiled() -> Any:
    """Compiled into one pass over the logits; the eager form makes several."""
    return torch.compile(_terms, dynamic=False)
