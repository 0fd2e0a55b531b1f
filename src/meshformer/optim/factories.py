"""The factories behind `optimizer=adamw|sgd|muon`: from named parameters and settings to one torch Optimizer."""

from collections.abc import Iterable, Sequence
from typing import Literal

from torch.nn import Parameter

from meshformer.config.errors import ConfigError
from meshformer.optim.groups import NO_DECAY, NamedParameters, decay_groups, split_matrices, trainable
from meshformer.optim.muon import MuonAdamW
from meshformer.optim.shardwise import ShardwiseAdamW, ShardwiseSGD, have_fused_kernels


def adamw(
    named_parameters: NamedParameters,
    lr: float = 3e-4,
    betas: Sequence[float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    no_decay: Sequence[str] = NO_DECAY,
    fused: bool | Literal["auto"] = "auto",
    all_names: Sequence[str] | None = None,
) -> ShardwiseAdamW:
    """AdamW (Loshchilov & Hutter 2019) with decay groups by name.

    `fused="auto"` uses torch's fused kernel on CPU and CUDA. `all_names`: see `decay_groups`.
    """
    _check(lr=lr, weight_decay=weight_decay)
    groups = decay_groups(named_parameters, weight_decay, no_decay, all_names)
    fused = use_fused([parameter for group in groups for _, parameter in group["params"]], fused)
    return ShardwiseAdamW(groups, lr, betas=_betas(betas, "optimizer.betas"), eps=eps, weight_decay=weight_decay, fused=fused)


def sgd(
    named_parameters: NamedParameters,
    lr: float = 0.1,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    no_decay: Sequence[str] = NO_DECAY,
    all_names: Sequence[str] | None = None,
) -> ShardwiseSGD:
    """Stochastic gradient descent. Without momentum its updates are proportional to the gradient, so parity tests detect wrong gradient scales."""
    _check(lr=lr, momentum=momentum, weight_decay=weight_decay)
    if nesterov and momentum == 0:
        raise ConfigError(
            "Nesterov's look-ahead needs momentum", "optimizer.nesterov", nesterov, "Set optimizer.momentum, for example to 0.9."
        )
    groups = decay_groups(named_parameters, weight_decay, no_decay, all_names)
    return ShardwiseSGD(groups, lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)


def muon(
    named_parameters: NamedParameters,
    lr: float = 0.02,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    nesterov: bool = True,
    scale: Literal["original", "match_rms_adamw"] = "original",
    coefficients: Literal["jordan", "polar_express"] = "jordan",
    iterations: int = 5,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    adamw_lr: float | None = None,
    adamw_betas: Sequence[float] = (0.9, 0.95),
    adamw_eps: float = 1e-8,
    adamw_weight_decay: float | None = None,
    no_decay: Sequence[str] = NO_DECAY,
    fused: bool | Literal["auto"] = "auto",
    all_names: Sequence[str] | None = None,
    blocks: str | None = "blocks",
) -> MuonAdamW:
    """Muon for the hidden matrices and AdamW for the rest, in one Optimizer (see `MuonAdamW` for the settings of Muon).

    `adamw_lr` and `adamw_weight_decay` default to `lr` and `weight_decay`. That suits `scale="match_rms_adamw"`, which gives Muon's updates the
    RMS of AdamW's; with `scale="original"` AdamW needs a smaller `adamw_lr`. Schedules multiply both learning rates.
    A config with `trainer.precision=32-true` sets `dtype` to float32 by default, so that layouts also agree on processors with bf16 units.
    The three parameter groups, in this order in every layout: matrices, AdamW with decay, AdamW without. `all_names`: see `decay_groups`;
    `blocks`: see `split_matrices`.
    Raises ConfigError when the model has no hidden matrix.
    """
    _check(lr=lr, momentum=momentum, weight_decay=weight_decay, adamw_lr=adamw_lr, adamw_weight_decay=adamw_weight_decay)
    named = trainable(named_parameters, all_names)
    matrices, others = split_matrices(named, all_names=all_names, blocks=blocks)
    groups: list[dict] = [{"params": matrices, "param_names": [], "method": "muon", "lr": lr, "weight_decay": weight_decay}]
    rate = lr if adamw_lr is None else adamw_lr
    decay = weight_decay if adamw_weight_decay is None else adamw_weight_decay
    # A pattern may match matrices only, so the patterns are checked against all names.
    rest = decay_groups(others, decay, no_decay, all_names or [name for name, _ in named])
    groups += [{**group, "method": "adamw", "lr": rate} for group in rest]
    return MuonAdamW(
        groups,
        lr=lr,
        momentum=momentum,
        nesterov=nesterov,
        scale=scale,
        coefficients=coefficients,
        iterations=iterations,
        dtype=dtype,
        betas=_betas(adamw_betas, "optimizer.adamw_betas"),
        eps=adamw_eps,
        fused=use_fused([parameter for _, parameter in others], fused),
    )


def use_fused(parameters: Iterable[Parameter], fused: bool | Literal["auto"]) -> bool:
    """Whether torch's fused AdamW can and should update these parameters."""
    if fused in (True, False):
        return bool(fused)
    if fused != "auto":
        raise ConfigError("unknown choice of kernel", "optimizer.fused", fused, "Use auto, true or false.")
    return have_fused_kernels(parameters)


def _betas(betas: Sequence[float], key: str) -> tuple[float, float]:
    values = tuple(float(beta) for beta in betas)
    if len(values) != 2 or not all(0 <= beta < 1 for beta in values):
        raise ConfigError("AdamW needs two decay rates of at least 0 and below 1", key, list(betas), "[0.9, 0.95] is usual.")
    return values[0], values[1]


def _check(**settings: float | None) -> None:
    for name, value in settings.items():
        if value is not None and not value >= 0:
            raise ConfigError("cannot be negative", f"optimizer.{name}", value)
    if (momentum := settings.get("momentum")) is not None and momentum >= 1:
        raise ConfigError("a momentum of 1 or more never forgets", "optimizer.momentum", momentum, "Use a number below 1, such as 0.95.")
