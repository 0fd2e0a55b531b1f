"""Lists every layout of a model on a number of cards that the checks allow, with micro-batches, accumulation, checkpointing and schedules."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from meshformer.config.degrees import AXES, Degrees
from meshformer.config.errors import ConfigError
from meshformer.config.resolve import microbatch_counts
from meshformer.parallel.check import check_cut, check_settings
from meshformer.plan.cluster import Cluster
from meshformer.plan.memory import Memory, estimate
from meshformer.plan.sizes import Sizes
from meshformer.plan.steptime import Constants, Step, StepLayout, step_time
from meshformer.tasks.check import refuses_context

Config = dict[str, Any]
CHECKPOINTING = ("none", "selective", "full")
# Shares of products, attention and other operations of a block that its backward pass repeats (parallel/memory_options.py).
RECOMPUTED = {"none": (0.0, 0.0, 0.0), "selective": (0.0, 0.0, 1.0), "full": (1.0, 1.0, 1.0)}
SCHEDULES = ("1f1b", "gpipe", "interleaved_1f1b", "interleaved_zero_bubble")
SHORTEST = 512  # the fewest tokens of a sequence on a rank of the context axis
SAME = 0.03  # the mean error of the predictions: of layouts whose times differ by less, the one with fewer axes comes first
SPARE = 0.9  # share of a card's memory that a plan may fill


@dataclass(frozen=True)
class Candidate:
    """A layout with its predicted time and memory."""

    layout: StepLayout
    checkpointing: str
    step: Step
    memory: Memory
    fits: bool

    @property
    def degrees(self) -> Degrees:
        return Degrees(**{axis: getattr(self.layout, axis) for axis in AXES})

    @property
    def axes(self) -> int:
        """The number of axes in use. Of two layouts that are about as fast, the one with fewer is listed first."""
        return sum(getattr(self.layout, axis) > 1 for axis in AXES)


@dataclass(frozen=True)
class Request:
    """A request to `plan`: a composed training configuration, the axes and settings that the user typed, and the cluster."""

    config: Config
    sizes: Sizes
    cluster: Cluster
    constants: Constants
    fixed: dict[str, Any]  # typed settings of the strategy, and trainer.accumulate_grad_batches as `accumulation`
    optimizer_bytes: float


def candidates(request: Request, only_fitting: bool = False) -> list[Candidate]:
    """All candidates: those that fit first, each part sorted by predicted step time, in steps of 3 %. `only_fitting`: the first part, sooner."""
    requests = [request]
    if request.cluster.alone and "cards" not in request.fixed:
        requests.append(replace(request, cluster=request.cluster.one_process()))
    every = (_judged(one, layout, checkpointing, only_fitting) for one in requests for layout, checkpointing in layouts(one, only_fitting))
    found = [candidate for candidate in every if candidate is not None]
    best = min((candidate.step.total for candidate in found if candidate.fits), default=1.0)

    def order(candidate: Candidate) -> tuple[bool, int, int, float]:
        band = int(math.log(candidate.step.total / best) / math.log(1 + SAME)) if candidate.fits else 0
        return not candidate.fits, band, candidate.axes, candidate.step.total

    return sorted(found, key=order)


def _judged(request: Request, layout: StepLayout, checkpointing: str, only_fitting: bool) -> Candidate | None:
    memory = estimate(request.sizes, layout, checkpointing, request.optimizer_bytes, layout.precision == "bf16")
    fits = memory.total <= SPARE * request.cluster.memory
    if only_fitting and not fits:
        return None
    return Candidate(layout, checkpointing, step_time(request.sizes, layout, request.cluster, request.constants), memory, fits)


def _state_fits(request: Request, axes: dict[str, int]) -> bool:
    """Whether weights and optimizer state alone leave enough of a card free."""
    state = request.sizes.parameters * (4 + request.optimizer_bytes)
    return state / (axes["tensor"] * axes["pipeline"] * axes["shard"] * axes["context"]) <= SPARE * request.cluster.memory


def layouts(request: Request, only_fitting: bool = False) -> Iterator[tuple[StepLayout, str]]:
    """Every (layout, activation checkpointing) that the checks of the configuration allow. `only_fitting`: without products of degrees whose
    weights and optimizer state do not fit."""
    base = _base(request.config)
    batch = request.config["data"]["batch_size"]
    allowed: dict[tuple[int, int, bool, bool], bool] = {}  # the checks, which are slow, depend on the degrees only
    for axes in _products(request):
        if only_fitting and not _state_fits(request, axes):
            continue
        data = axes["replicate"] * axes["shard"]
        key = (axes["tensor"], axes["context"], axes["pipeline"] > 1, data > 1)
        if batch % data or not (allowed[key] if key in allowed else allowed.setdefault(key, _allowed(request, axes))):
            continue
        start = replace(base, **axes, fsdp=_shards(axes), reshard=axes["pipeline"] == 1)
        for counted in _counts(request, start, batch // data):
            for checkpointing in _choices(request, "activation_checkpointing", CHECKPOINTING):
                if counted.schedule == "interleaved_zero_bubble" and checkpointing == "selective":
                    continue
                yield replace(counted, recomputed=RECOMPUTED[checkpointing]), checkpointing


def layout_of(config: Config) -> StepLayout:
    """The layout of a resolved configuration."""
    strategy = config["strategy"]
    axes = {axis: strategy[axis] for axis in AXES}
    accumulation, microbatches = config["trainer"]["accumulate_grad_batches"], strategy["microbatches"]
    return replace(
        _base(config), **axes, fsdp=_shards(axes), reshard=axes["pipeline"] == 1, accumulation=accumulation, microbatches=microbatches,
        samples=config["data"]["batch_size"] // (axes["replicate"] * axes["shard"] * accumulation * microbatches),
        schedule=strategy["schedule"], stages=strategy["stages_per_rank"], recomputed=RECOMPUTED[strategy["activation_checkpointing"]],
        reduce_every=strategy["reduce_gradients"] == "every",
    )  # fmt: skip


def _base(config: Config) -> StepLayout:
    trainer, strategy = config["trainer"], config["strategy"]
    mixed = trainer["precision"].startswith("bf16")
    return StepLayout(
        samples=1,
        compiled=trainer["compile"] is True,
        float8=trainer["float8"],
        precision="bf16" if mixed else "fp32",
        gather_bytes=2 if mixed and strategy.get("param_dtype") != "float32" else 4,
        reduce_bytes=2 if strategy.get("reduce_dtype") == "bfloat16" else 4,
        activation_bytes=2 if mixed else 4,
        exchange_bytes=2.0 if mixed else 4.0,
        sequence_parallel=strategy.get("sequence_parallel", True),
        loss_parallel=strategy.get("loss_parallel", False),
        async_tensor=strategy.get("async_tensor_parallel", False),
        ulysses=strategy.get("context_method") == "ulysses",
    )


def _choices(request: Request, key: str, all_of_them: tuple[Any, ...]) -> tuple[Any, ...]:
    return (request.fixed[key],) if key in request.fixed else all_of_them


def _products(request: Request) -> Iterator[dict[str, int]]:
    """The degrees of every axis whose product is the number of cards, that the cluster and the typed settings allow."""
    world, cards, whole = request.cluster.processes, request.cluster.cards, refuses_context(request.config) is not None
    for pipeline in _divisors(world):
        if pipeline > request.sizes.layers:
            continue
        for tensor in _divisors(world // pipeline):
            if tensor > cards:  # the collectives in every layer would cross the network between nodes
                continue
            for context in _divisors(world // pipeline // tensor):
                if context > 1 and (whole or request.sizes.length // context < SHORTEST):
                    continue
                left = world // pipeline // tensor // context
                for shard in _divisors(left):
                    axes = {"replicate": left // shard, "shard": shard, "context": context, "tensor": tensor, "pipeline": pipeline}
                    if all(request.fixed.get(axis) in (None, -1, degree) for axis, degree in axes.items()):
                        yield axes


def _allowed(request: Request, axes: dict[str, int]) -> bool:
    """Whether the checks of the configuration accept the degrees; micro-batches are chosen later."""
    config = request.config
    name = "mesh" if config["strategy"]["name"] in ("single", "ddp") and max(axes.values()) > 1 else config["strategy"]["name"]
    given = {key: value for key, value in config["strategy"].items() if value != "auto"}
    strategy = {**MESH, **given, **axes, "name": name, "microbatches": 1, "schedule": "1f1b", "stages_per_rank": 1}
    checked = {**config, "strategy": {**strategy, "pipeline": 1}}
    try:
        check_settings({**checked, "trainer": {**config["trainer"], "float8": False}})
        check_cut(checked)
    except ConfigError:
        return False
    return True


# The settings of a mesh layout once `auto` is resolved, so that `single` and `ddp`, which have none of them, can be compared with it.
MESH = {
    "sequence_parallel": True, "loss_parallel": False, "async_tensor_parallel": False, "context_method": "all_gather",
    "blocks_per_stage": None, "param_dtype": None, "reduce_dtype": None, "reshard_after_forward": True, "cpu_offload": False,
    "reduce_gradients": "last",
}  # fmt: skip


def _shards(axes: dict[str, int]) -> bool:
    return axes["shard"] * axes["context"] > 1 or (axes["replicate"] > 1 and axes["tensor"] > 1)


def _counts(request: Request, layout: StepLayout, samples: int) -> Iterator[StepLayout]:
    """The ways to run `samples` of one replica: micro-batches and accumulation, and for a pipeline schedules and stages."""
    accumulations = _choices(request, "accumulation", tuple(_divisors(samples)))
    if layout.pipeline == 1:
        for accumulation in accumulations:
            if samples % accumulation:
                continue
            counted = replace(layout, samples=samples // accumulation, accumulation=accumulation)
            every = (False, True) if accumulation > 1 and layout.fsdp else (False,)
            for reduce_every in _choices(request, "reduce_every", every):
                yield replace(counted, reduce_every=reduce_every)
        return
    accumulation = request.fixed.get("accumulation", 1)  # a pipeline's micro-batches replace accumulation
    if samples % accumulation:
        return
    samples //= accumulation
    for schedule in _choices(request, "schedule", SCHEDULES):
        interleaved = schedule.startswith("interleaved")
        if schedule == "interleaved_zero_bubble" and layout.compiled:
            continue
        for stages in _choices(request, "stages_per_rank", (2,) if interleaved else (1,)):
            if layout.pipeline * stages > request.sizes.layers:
                continue
            for count in microbatch_counts(samples, layout.pipeline, schedule):
                yield replace(
                    layout, samples=samples // count, accumulation=accumulation, microbatches=count, schedule=schedule, stages=stages
                )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0] if number < 64 else _large_divisors(number)


def _large_divisors(number: int) -> list[int]:
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
