"""AdamW and SGD on the local shards of DTensor parameters.

torch's optimizers cannot mix DTensors with plain tensors, and fused SGD does not support DTensors (torch 2.13). Arithmetic on DTensors also
costs more than the update itself (25 layers of 128 × 128 on two CPU ranks: AdamW 3.6 ms instead of 0.8, SGD with momentum 8.2 instead of 1.2; on
a 2 × 2 mesh 12.9 and 20.9). The updates therefore run on the local tensors. The optimizer state is kept as DTensors, so that a checkpoint
can be loaded in another layout.

A step with a non-finite gradient is skipped by a flag on the device, without a host sync. Zeroing the gradients would not skip it: moments and
weights would still decay, and the step would be counted. All in-place writes are therefore left to torch's fused kernels, which change nothing
where `found_inf` is 1.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.adamw import adamw as functional_adamw
from torch.optim.sgd import sgd as functional_sgd


def local_tensors(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The local tensor of each DTensor (it may be empty); plain tensors as they are. Call it under no_grad."""
    return [x.to_local() if isinstance(x, DTensor) else x for x in tensors]


def local_gradients(parameters: Sequence[Tensor], grad_scale: Tensor | None = None) -> list[Tensor]:
    """The local shard of each gradient, with its parameter's placements, divided in place by `grad_scale`."""
    gradients: list[Any] = [p.grad for p in parameters]
    for i, p in enumerate(parameters):
        if isinstance(p, DTensor) and gradients[i].placements != p.placements:  # partial sums over the tensor axis, for example
            gradients[i] = gradients[i].redistribute(p.device_mesh, p.placements)
    found = local_tensors(gradients)
    if grad_scale is not None:
        for gradient in found:
            gradient.div_(grad_scale)
    return found


def with_strides_of(others: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """`tensors` with the strides of `others`, copied where they differ: torch 2.13's fused CPU kernels ignore strides."""
    return [x if x.stride() == y.stride() else torch.empty_like(y).copy_(x) for x, y in zip(tensors, others, strict=True)]


FUSED_DEVICES = ("cpu", "cuda")  # device types with fused optimizer kernels


def have_fused_kernels(parameters: Iterable[Tensor]) -> bool:
    return all(p.device.type in FUSED_DEVICES and torch.is_floating_point(p) for p in parameters)


def have_fused_sgd_kernels(parameters: Iterable[Tensor]) -> bool:
    """False for 16-bit parameters on a CPU: torch 2.13's fused SGD is wrong there by up to half a gradient, for tensors of 16 elements or more."""
    return all(have_fused_kernels([p]) and (p.device.type != "cpu" or p.element_size() >= 4) for p in parameters)


def update_by_adamw(
    parameters: list[Tensor],
    state: dict[Tensor, Any],
    group: dict[str, Any],
    found_inf: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> None:
    """One AdamW step on parameters with gradients. The state is torch.optim.AdamW's: `step`, `exp_avg`, `exp_avg_sq`.

    The fused kernel divides gradients by `grad_scale` as it reads them, which saves a pass over all gradients.
    """
    in_kernel, before = (grad_scale, None) if group["fused"] else (None, grad_scale)
    for p in parameters:
        if not state[p]:
            # The fused kernel needs its step counter on the device; the other one reads a CPU counter without a sync.
            state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device if group["fused"] else "cpu")
            state[p]["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state[p]["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
    held = local_tensors(parameters)
    functional_adamw(
        held,
        with_strides_of(held, local_gradients(parameters, before)),
        local_tensors([state[p]["exp_avg"] for p in parameters]),
        local_tensors([state[p]["exp_avg_sq"] for p in parameters]),
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
    """One SGD step on parameters with gradients. With momentum, the state is torch.optim.SGD's `momentum_buffer`."""
    buffers: list[Tensor] | None = None
    if group["momentum"]:
        for p in parameters:
            if state[p].get("momentum_buffer") is None:
                state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        buffers = local_tensors([state[p]["momentum_buffer"] for p in parameters])
    settings = {key: group[key] for key in ("lr", "momentum", "nesterov", "weight_decay")}
    sgd_step(local_tensors(parameters), local_gradients(parameters, grad_scale), found_inf, buffers, **settings)


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
    """θ ← θ − lr (±gradient + weight_decay θ), in place, on plain tensors; `buffers` holds torch.optim.SGD's momentum."""
    functional_sgd(
        held,
        with_strides_of(held, gradients),
        [*buffers] if buffers is not None else [None] * len(held),
        fused=True if have_fused_sgd_kernels(held) else None,
        found_inf=found_inf,
        weight_decay=weight_decay,
        momentum=momentum,
        lr=lr,
        dampening=0.0,
        nesterov=nesterov,
        maximize=maximize,
    )


class ShardwiseOptimizer(Optimizer):
    """Base class: a subclass implements `update` for one parameter group; it must change nothing where `found_inf` is 1.

    `found_inf` and `grad_scale` are scalars on the device that apply to the next step only (the closure may set them): whether to skip it, and
    the divisor of its gradients. torch's fused optimizers use attributes of the same names. Without a fused kernel (other devices than
    `FUSED_DEVICES`, AdamW with `fused=False`) the host reads `found_inf`, which is a sync.
    """

    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None
    _all_fused: bool | None = None

    def update(self, parameters: list[Tensor], group: dict[str, Any], found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates every parameter that has a gradient; returns the result of `closure`, in which Lightning runs the training step."""
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
            if parameters:  # with cpu_offload the scalars are on the GPU and the parameters are not
                numbers = (x if x is None else x.to(parameters[0].device, torch.float32) for x in (found_inf, grad_scale))
                self.update(parameters, group, *numbers)
        return loss

    @property
    def skips_on_device(self) -> bool:
        if self._all_fused is None:  # cached: checking hundreds of DTensors at every step is slow
            adamw = [group for group in self.param_groups if "betas" in group and group.get("method") != "muon"]
            others = [group for group in self.param_groups if all(group is not one for one in adamw)]
            self._all_fused = all(have_fused_kernels(g["params"]) for g in adamw) and all(have_fused_sgd_kernels(g["params"]) for g in others)
        return self._all_fused and all(group["fused"] for group in self.param_groups if "betas" in group)


class ShardwiseAdamW(ShardwiseOptimizer, AdamW):
    """torch.optim.AdamW on local tensors."""

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float, weight_decay: float, fused: bool
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)
        # torch sets this flag for fused optimizers, which unscale 16-mixed gradients inside `step`; Lightning then refuses gradient clipping.
        # Cleared, the GradScaler unscales before the step, so clipping works.
        self._step_supports_amp_scaling = False

    def update(self, parameters: list[Tensor], group: dict[str, Any], found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        update_by_adamw(parameters, self.state, group, found_inf, grad_scale)


class ShardwiseSGD(ShardwiseOptimizer, SGD):
    """torch.optim.SGD on local tensors."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float, weight_decay: float, nesterov: bool) -> None:
        super().__init__(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)

    def update(self, parameters: list[Tensor], group: dict[str, Any], found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        update_by_sgd(parameters, self.state, group, found_inf, grad_scale)
