"""Muon for matrices and AdamW for the rest, as one Optimizer.

Muon (Jordan et al. 2024) replaces the momentum M = U S Vᵀ of a matrix's gradient by an approximation of U Vᵀ, computed by a few Newton-Schulz
iterations X ← aX + b(XXᵀ)X + c(XXᵀ)²X. On a CPU nearly all of the time goes into matrix products, so matrices of the same shape are batched, and
wide matrices iterate on their smaller Gram matrix XXᵀ. Measured on two AVX2 cores, fp32, five iterations:
    16 × (128, 128): 20.7 ms one by one, 15.9 ms batched;    8 × (128, 512): 26.7 one by one, 24.3 batched, 14.3 on the Gram matrix;
    1 × (128, 128) in bfloat16, as in torch.optim.Muon: 25.3 ms instead of 1.3, since these cores emulate bfloat16.
Exploiting the symmetry of the Gram matrices gains nothing at these sizes.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from meshformer.config.errors import ConfigError
from meshformer.optim.gather_compute_scatter import gather_compute_scatter
from meshformer.optim.shardwise import ShardwiseOptimizer, local_gradients, local_tensors, sgd_step, update_by_adamw

# (a, b, c) of each iteration; further iterations repeat the last. `jordan` maximises the slope at zero and leaves singular values at about
# 0.7 … 1.2. `polar_express` (Amsel et al. 2025, their table with its 2 % safety margin) converges uniformly fastest for singular values
# in 1e-3 … 1, so three or four iterations can be enough.
COEFFICIENTS: dict[str, tuple[tuple[float, float, float], ...]] = {
    "jordan": ((3.4445, -4.7750, 2.0315),),
    "polar_express": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
}
SAFETY = {"jordan": 1.0, "polar_express": 1.02}
# Scale of the update as a function of (rows, columns), like torch.optim.Muon's adjust_lr_fn.
SCALES: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EPS = 1e-7
# From this ratio r = columns / rows on, the Gram form needs fewer operations: 2r + 17 instead of 5(2r + 1) at five iterations.
GRAM_RATIO = 1.5


class MuonAdamW(ShardwiseOptimizer):
    """One optimizer over groups with `method="muon"` (2-D parameters) or `method="adamw"`.

    Args:
        groups: dicts with `params` (tensors or (name, tensor) pairs), `method`, and any setting that differs.
        lr, weight_decay: defaults for groups without them. Weight decay is decoupled: θ ← (1 − lr·weight_decay) θ.
        momentum: M ← momentum·M + (1 − momentum)·gradient. `nesterov` orthogonalises gradient + momentum·(M − gradient).
        scale: `original` multiplies updates by √max(1, rows/columns), `match_rms_adamw` by 0.2·√max(rows, columns).
        coefficients: `jordan` (torch.optim.Muon's) or `polar_express`. `iterations`: usually 5.
        dtype: of the orthogonalisation; `auto` is bfloat16 where the device has bfloat16 matrix units, else float32.
        betas, eps, fused: AdamW's.

    For sharded parameters (DTensors with any placements) each rank updates the momentum of its shard; every full matrix is gathered on one rank,
    orthogonalised there and scattered, so the update equals that of one process. Orthogonalising each shard by itself would be wrong.

    State, by parameter: `momentum_buffer`, or AdamW's `step`, `exp_avg`, `exp_avg_sq`, as torch.optim's own classes keep them.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float = 0.02,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        scale: str = "original",
        coefficients: str = "jordan",
        iterations: int = 5,
        dtype: str = "auto",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        fused: bool = False,
    ) -> None:
        choices = {"scale": (scale, SCALES), "coefficients": (coefficients, COEFFICIENTS), "dtype": (dtype, ["auto", *DTYPES])}
        for key, (value, known) in choices.items():
            if value not in known:
                raise ConfigError("unknown value", f"optimizer.{key}", value, f"Use one of {', '.join(known)}.")
        if iterations < 1:
            raise ConfigError("Muon needs at least one iteration", "optimizer.iterations", iterations, "5 is usual.")
        muon = {"momentum": momentum, "nesterov": nesterov, "scale": scale, "coefficients": coefficients, "iterations": iterations}
        defaults = {"lr": lr, "weight_decay": weight_decay, **muon, "dtype": dtype, "betas": betas, "eps": eps, "fused": fused}
        super().__init__(list(groups), defaults)
        for group in self.param_groups:
            if group.get("method") not in ("muon", "adamw"):
                raise ValueError(f"each group names its method, muon or adamw; got {group.get('method')!r}")
            if group["method"] == "muon" and any(p.ndim != 2 for p in group["params"]):
                raise ValueError("a muon group holds 2-D parameters only")

    def update(self, parameters: list[Tensor], group: dict[str, Any], found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        update = self._muon if group["method"] == "muon" else partial(update_by_adamw, state=self.state)
        update(parameters, group=group, found_inf=found_inf, grad_scale=grad_scale)

    def _muon(self, parameters: list[Tensor], group: dict[str, Any], found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        lr, momentum = float(group["lr"]), group["momentum"]
        held, gradients = local_tensors(parameters), local_gradients(parameters, grad_scale)
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        buffers = local_tensors([self.state[p]["momentum_buffer"] for p in parameters])
        # M ← M − (1 − momentum)(M − gradient) written as an SGD step with weight decay 1, because the fused SGD kernel leaves M unchanged where
        # `found_inf` is 1. The non-finite values computed below are then dropped by the last SGD kernel, which leaves the parameters unchanged.
        sgd_step(buffers, gradients, found_inf, lr=1 - momentum, weight_decay=1.0, maximize=True)
        updates = [g.lerp(b, momentum) for g, b in zip(gradients, buffers, strict=True)] if group["nesterov"] else buffers
        directions = _directions(parameters, updates, group)
        for (shape, dtype, _), indices in _alike(parameters).items():
            scale = SCALES[group["scale"]](*shape)
            found = [directions[i].to(dtype) for i in indices]
            sgd_step([held[i] for i in indices], found, found_inf, lr=lr * scale, weight_decay=group["weight_decay"] / scale)


def _directions(parameters: list[Tensor], updates: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """This rank's shard of each orthogonalised update, in the dtype of the orthogonalisation; `updates` are its shards of the inputs."""
    together: dict[tuple, list[int]] = {}
    for i, p in enumerate(parameters):
        together.setdefault((p.device_mesh if isinstance(p, DTensor) else None, p.dtype, p.device), []).append(i)
    work = partial(_orthogonalised, coefficients=group["coefficients"], iterations=group["iterations"])
    found: dict[int, Tensor] = {}
    for (mesh, dtype, device), indices in together.items():
        kind = orthogonalisation_dtype(group["dtype"], device, dtype)
        given = [updates[i].to(kind) for i in indices]
        some = work(given) if mesh is None else gather_compute_scatter(work, given, [parameters[i] for i in indices])  # pyright: ignore[reportArgumentType]
        found.update(zip(indices, some, strict=True))
    return [found[i] for i in range(len(parameters))]


def _orthogonalised(matrices: list[Tensor], coefficients: str, iterations: int) -> list[Tensor]:
    """Orthogonalises each matrix; matrices of the same shape and dtype form one batch."""
    found: dict[int, Tensor] = {}
    for indices in _alike(matrices).values():
        batch = orthogonalise(torch.stack([matrices[i] for i in indices]), coefficients, iterations)
        found.update(zip(indices, batch.unbind(), strict=True))
    return [found[i] for i in range(len(matrices))]


def _alike(tensors: list[Tensor]) -> dict[tuple[torch.Size, torch.dtype, torch.device], list[int]]:
    same: dict[tuple[torch.Size, torch.dtype, torch.device], list[int]] = {}
    for i, x in enumerate(tensors):
        same.setdefault((x.shape, x.dtype, x.device), []).append(i)
    return same


def orthogonalise(matrices: Tensor, coefficients: str = "jordan", iterations: int = 5) -> Tensor:
    """Approximates U Vᵀ for each matrix U S Vᵀ in `matrices` (N, rows, columns), in their dtype.

    The error against exact arithmetic is about 1e-5 in float32 and 1e-2 in bfloat16, small beside the 0.3 by which five
    `jordan` iterations miss U Vᵀ itself.
    """
    table = COEFFICIENTS[coefficients]
    polynomials = [table[min(k, len(table) - 1)] for k in range(iterations)]
    rows, columns = matrices.shape[-2:]
    tall = rows > columns
    norm = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)
    x = matrices / (norm * SAFETY[coefficients]).clamp_(min=EPS)
    # Not in bfloat16: rounding destroys the small squared singular values of the Gram matrix.
    if matrices.dtype == torch.bfloat16 or max(rows, columns) < GRAM_RATIO * min(rows, columns):
        x = x.mT if tall else x
        for a, b, c in polynomials:
            gram = torch.bmm(x, x.mT)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.mT if tall else x
    gram = torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT)
    total = None
    for k, (a, b, c) in enumerate(polynomials):
        # X ← P X with P = aI + bG + cG². P, G and their products are symmetric and commute, so G ← P G P and Q ← P Q.
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        total = factor if total is None else torch.bmm(factor, total)
        if k + 1 < iterations:
            gram = torch.bmm(torch.bmm(factor, gram), factor)
    assert total is not None
    return torch.bmm(x, total) if tall else torch.bmm(total, x)


def orthogonalisation_dtype(choice: str, device: torch.device, parameter_dtype: torch.dtype) -> torch.dtype:
    """The dtype of the orthogonalisation. `auto`: float64 for float64 parameters, else bfloat16 on a device with bfloat16 units, else float32."""
    if choice != "auto":
        return DTYPES[choice]
    if parameter_dtype == torch.float64:
        return torch.float64
    return torch.bfloat16 if multiplies_bfloat16(device.type) else torch.float32


def multiplies_bfloat16(device_type: str) -> bool:
    """Whether the device has bfloat16 matrix units. A CPU without them emulates bfloat16 products about 25 times slower than float32."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "cpu":
        known = torch.cpu.get_capabilities()
        return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
    return False
