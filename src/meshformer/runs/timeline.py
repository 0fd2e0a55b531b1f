"""Simulate when each pipeline stage works: actions in the order of torch.distributed.pipelining's schedule, with fixed costs."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import nn

from meshformer.parallel.pipeline import SCHEDULES

# Cost per micro-batch and stage: F forward, B whole backward, I backward for the input, W backward for the weights. A backward pass has twice the
# matrix products of a forward pass.
COST = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}


@dataclass(frozen=True)
class Span:
    """One action: `kind` F (forward), B (backward), I or W (its two parts); times in units of one forward pass through a rank's layers."""

    rank: int
    stage: int
    kind: str
    microbatch: int
    start: float
    end: float


def play(schedule: str, ranks: int, microbatches: int) -> list[Span]:
    """Return the spans of one step, with equal stages and free communication, so that all idle time is the schedule's own bubble.

    `schedule` is a value of `strategy.schedule`. Raises ValueError if it does not support these numbers.
    """
    kind: Any = SCHEDULES[schedule]
    per_rank = 2 if schedule.startswith("interleaved") else 1
    stages = ranks * per_rank
    own: list[Any] = [  # stand-ins for rank 0's stages, with the attributes that schedules read
        SimpleNamespace(
            stage_index=index,
            num_stages=stages,
            group_size=ranks,
            group_rank=0,
            is_first=index == 0,
            is_last=index == stages - 1,
            submod=nn.Identity(),
        )
        for index in range(0, stages, ranks)
    ]
    made = kind(own if per_rank > 1 else own[0], microbatches, loss_fn=lambda *_: None)
    if schedule == "1f1b":
        actions = {rank: _one_forward_one_backward(rank, ranks, microbatches) for rank in range(ranks)}
    else:
        actions = {
            rank: [
                (action.computation_type.value, action.stage_index, action.microbatch_index)
                for action in made.pipeline_order[rank]
                if action is not None and action.computation_type.value in COST
            ]
            for rank in range(ranks)
        }
    return _run(actions, stages, 1 / per_rank)


def _one_forward_one_backward(rank: int, ranks: int, microbatches: int) -> list[tuple[str, int, int]]:
    """Return the actions that Schedule1F1B runs on a rank.

    Its `pipeline_order` in torch 2.13 differs from what it runs: there, the last rank starts at micro-batch 1 and ends at one that does not exist.
    """
    ahead = min(ranks - rank, microbatches)
    order = [("F", rank, i) for i in range(ahead)]
    for i in range(microbatches):
        order.append(("B", rank, i))
        if ahead + i < microbatches:
            order.append(("F", rank, ahead + i))
    return order


def _run(waiting: dict[int, list[tuple[str, int, int]]], stages: int, share: float) -> list[Span]:
    done: dict[tuple[str, int, int], float] = {}
    free = dict.fromkeys(waiting, 0.0)
    spans: list[Span] = []
    while any(waiting.values()):
        before = len(spans)
        for rank, actions in waiting.items():
            while actions and all(need in done for need in _needs(*actions[0], stages)):
                kind, stage, microbatch = actions.pop(0)
                start = max([free[rank], *(done[need] for need in _needs(kind, stage, microbatch, stages))])
                free[rank] = start + COST[kind] * share
                spans.append(Span(rank, stage, kind, microbatch, start, free[rank]))
                # The previous stage waits only for the input gradient, G.
                done["G" if kind in "BI" else kind, stage, microbatch] = free[rank]
        if len(spans) == before:
            raise ValueError("the schedule waits for itself")
    return spans


def _needs(kind: str, stage: int, microbatch: int, stages: int) -> list[tuple[str, int, int]]:
    if kind == "F":
        return [("F", stage - 1, microbatch)] if stage else []
    if kind == "W":
        return [("G", stage, microbatch)]
    return [("F", stage, microbatch), *([("G", stage + 1, microbatch)] if stage + 1 < stages else [])]


def idle_share(spans: list[Span]) -> float:
    """Return the fraction of the ranks' total time, until the last one finishes, that is idle."""
    ranks, end = {span.rank for span in spans}, max(span.end for span in spans)
    return 1 - sum(span.end - span.start for span in spans) / (len(ranks) * end)
