"""Elementwise updates (AdamW, SGD) of the pieces that this rank holds.

A parameter is a plain tensor or a DTensor. torch's own optimizers take DTensors, but mix them with plain tensors they do not, and fused SGD has no
DTensor form at all (torch 2.13). Arithmetic on DTensors costs more than the update itself (25 layers of 128 × 128 on two
CPU ranks: AdamW 3.6 ms instead of 0.8, SGD with momentum 8.2 instead of 1.2; on a 2 × 2 mesh 12.9 and 20.9), so updates run on the
local tensors. Optimizer state still is DTensors, which is what lets a checkpoint be read back in another layout.

A step may have to be skipped (its gradient is not finite), which only the device knows. Zeroed gradients would not do: moments decay, weights
decay, steps are counted. So all that is written in place here is written by torch's fused kernels, which change nothing where `found_inf` is 1.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.adamw import adamw as functional_adamw
from torch.optim.sgd import sgd as functional_sgd

from meshformer.compat.torch import foreach_div_


def pieces(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What this rank holds of each: the local tensor of a DTensor (maybe empty), a plain tensor itself. Call without gradients."""
    return [x.to_local() if isinstance(x, DTensor) else x for x in tensors]


def gradient_pieces(parameters: Sequence[Tensor], grad_scale: Tensor | None = None) -> list[Tensor]:
    """This rank's piece of each gradient, cut as its parameter is, and divided, in place, by `grad_scale`."""
    gradients: list[Any] = [p.grad for p in parameters]
    for i, p in enumerate(parameters):
        if isinstance(p, DTensor) and gradients[i].placements != p.placements:  # pending sums of the tensor axis, for instance
            gradients[i] = gradients[i].redistribute(p.device_mesh, p.placements)
    found = pieces(gradients)
    if grad_scale is not None:
        foreach_div_(found, grad_scale)
    return found


def laid_out_as(others: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors with the strides of the others: torch 2.13's fused kernels walk through memory on a CPU, whatever the strides."""
    return [x if x.stride() == y.stride() else torch.empty_like(y).copy_(x) for x, y in zip(tensors, others, strict=True)]


KERNELS = ("cpu", "cuda")  # device types whose fused kernels we rely on


def have_kernels(parameters: Iterable[Tensor]) -> bool:
    return all(p.device.type in KERNELS and torch.is_floating_point(p) for p in parameters)


def have_sgd_kernels(parameters: Iterable[Tensor]) -> bool:
    """On a CPU, torch 2.13's fused SGD updates 16-bit numbers by wrong amounts (by up to half a gradient, from 16 of them on)."""
    return all(have_kernels([p]) and (p.device.type != "cpu" or p.element_size() >= 4) for p in parameters)


def update_by_adamw(
    parameters: list[Tensor],
    state: dict[Tensor, Any],
    group: dict[str, Any],
    found_inf: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> None:
    """AdamW's step for parameters with gradients. State as torch.optim.AdamW keeps it: `step`, `exp_avg`, `exp_avg_sq`.

    The fused kernel divides gradients by `grad_scale` as it reads them, which spares a pass over all of them.
    """
    in_kernel, before = (grad_scale, None) if group["fused"] else (None, grad_scale)
    for p in parameters:
        if not state[p]:
            # The fused kernel counts its steps on the device; elsewhere a CPU counter spares a transfer.
            state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device if group["fused"] else "cpu")
            state[p]["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state[p]["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
    held = pieces(parameters)
    functional_adamw(
        held,
        laid_out_as(held, gradient_pieces(parameters, before)),
        pieces([state[p]["exp_avg"] for p in parameters]),
        pieces([state[p]["exp_avg_sq"] for p in parameters]),
        [],
        [state[p]["step"] for p in parameters],
        fused=bool(group["fused"]),
        grad_scale=in_kernel,
        found_inf=found_inf,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def update_by_sgd(
    parameters: list[Tensor],
    state: dict[Tensor, Any],
    group: dict[str, Any],
    found_inf: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> None:
    """SGD's step for parameters with gradients. With momentum, state is `momentum_buffer` as torch.optim.SGD keeps it."""
    buffers: list[Tensor] | None = None
    if group["momentum"]:
        for p in parameters:
            if state[p].get("momentum_buffer") is None:
                state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        buffers = pieces([state[p]["momentum_buffer"] for p in parameters])
    settings = {key: group[key] for key in ("lr", "momentum", "nesterov", "weight_decay")}
    sgd_step(pieces(parameters), gradient_pieces(parameters, grad_scale), found_inf, buffers, **settings)


def sgd_step(
    held: list[Tensor],
    gradients: list[Tensor],
    found_inf: Tensor | None,
    buffers: list[Tensor] | None = None,
    *,
    lr: float,
    weight_decay: float,
    momentum: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> None:
    """θ ← θ − lr (±gradient + weight_decay θ), in place, on plain tensors; with `buffers`, torch.optim.SGD's momentum."""
    functional_sgd(
        held,
        laid_out_as(held, gradients),
        [*buffers] if buffers is not None else [None] * len(held),
        fused=True if have_sgd_kernels(held) else None,
        found_inf=found_inf,
        weight_decay=weight_decay,
        momentum=momentum,
        lr=lr,
        dampening=0.0,
        nesterov=nesterov,
        maximize=maximize,
    )


class ShardwiseOptimizer(Optimizer):
    """A subclass says how a group's parameters that have gradients are updated, and nothing of it where `found_inf` is 1.

    `found_inf`, one number on the device, is for the next step alone; the closure may set it. Where there are no kernels that look at it
    (devices that are none of `KERNELS`, and AdamW with `fused=False`) the host reads it, and waits. `grad_scale`, another such number, is
    what the next step divides gradients by. torch's fused optimizers read two attributes of these names in the same way.
    """

    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None
    _have_kernels: bool | None = None

    def update(self, parameters: list[Tensor], group: dict[str, Any], found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient; returns what `closure` returns (Lightning runs the training step in it)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf, self.found_inf = self.found_inf, None
        grad_scale, self.grad_scale = self.grad_scale, None
        if found_inf is not None and not self.skips_on_device:
            if found_inf:
                return loss
            found_inf = None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:  # (with cpu_offload the numbers are on the GPU)
                numbers = (x if x is None else x.to(parameters[0].device, torch.float32) for x in (found_inf, grad_scale))
                self.update(parameters, group, *numbers)
        return loss

    @property
    def skips_on_device(self) -> bool:
        if self._have_kernels is None:  # asking a hundred DTensors at every step would cost
            adamw = [group for group in self.param_groups if "betas" in group and group.get("method") != "muon"]
            others = [group for group in self.param_groups if all(group is not one for one in adamw)]
            self._have_kernels = all(have_kernels(g["params"]) for g in adamw) and all(have_sgd_kernels(g["params"]) for g in others)
        return self._have_kernels and all(group["fused"] for group in self.param_groups if "betas" in group)


class ShardwiseAdamW(ShardwiseOptimizer, AdamW):
    """torch.optim.AdamW, its step on local tensors."""

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float, weight_decay: float, fused: bool
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)
        # A fused optimizer announces that it unscales 16-mixed gradients inside its own step, so Lightning refuses to clip them.
        # Without the announcement the scaler unscales first, clipping works, and the fused step is the same.
        self._step_supports_amp_scaling = False

    def update(self, parameters: list[Tensor], group: dict[str, Any], found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        update_by_adamw(parameters, self.state, group, found_inf, grad_scale)


class ShardwiseSGD(ShardwiseOptimizer, SGD):
    """torch.optim.SGD, its step on local tensors."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float, weight_decay: float, nesterov: bool) -> None:
        super().__init__(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)

    def update(self, parameters: list[Tensor], group: dict[str, Any], found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        update_by_sgd(parameters, self.state, group, found_inf, grad_scale)
