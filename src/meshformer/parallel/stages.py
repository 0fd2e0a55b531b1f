"""Where a pipeline cuts a model, and a model of which a process holds a part: other modules stand in the place of what is elsewhere.

The model's own `forward` runs in every stage. What stands before the blocks is replaced by the hidden states that arrive, a block by nothing,
and what stands behind the blocks by the end of the forward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from meshformer.compat.torch import view_of
from meshformer.config.errors import ConfigError
from meshformer.model.layout import blocks_name, blocks_of, plan_of, ties


class StandIn(nn.Module):
    """In the place of a block that another process holds: hidden states pass."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args else next(iter(kwargs.values()))


class Arrived(StandIn):
    """In the place of what gives the first hidden states."""

    hidden: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden, self.hidden = self.hidden, None
        return hidden


class Added(StandIn):
    """In the place of what else stands before the blocks: adds nothing where it would be given numbers of tokens, and lets hidden states pass."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = super().forward(*args, **kwargs)
        return x if x.is_floating_point() else torch.zeros((), device=x.device)


class Left(Exception):
    """Hidden states have come to the end of what this process holds."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden


class Leave(StandIn):
    """In the place of what stands behind the blocks."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise Left(super().forward(*args, **kwargs))


def held_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of which this process has the parameters."""
    return [block for block in blocks_of(model) if not isinstance(block, StandIn)]


def run_part(part: nn.Module, inputs: dict[str, Any], arrived: Tensor | None) -> Tensor:
    """`forward` of a part, given the hidden states that arrived where it does not begin with the tokens."""
    plan = plan_of(part)
    assert plan is not None
    first = part.get_submodule(plan.embed[0])
    if isinstance(first, Arrived):
        first.hidden = arrived
    try:
        return part(**inputs)
    except Left as left:
        return left.hidden


# --- where to cut


def balanced(costs: Sequence[float], last: float, stages: int) -> list[int]:
    """How many of the consecutive blocks each stage holds, at least one each, so that the costliest stage is as cheap as can be.

    `costs` of the blocks; `last` is what the head adds to the last stage. By dynamic programming over the cuts.
    """
    n = len(costs)
    if stages > n:
        raise ValueError(f"{stages} pipeline stages need as many blocks; the model has {n}")
    before = [0.0]
    for cost in costs:
        before.append(before[-1] + cost)
    best: dict[tuple[int, int], tuple[float, int]] = {(0, 0): (0.0, 0)}
    for stage in range(1, stages + 1):
        for end in range(stage, n + 1):
            extra = last if stage == stages else 0.0
            best[stage, end] = min(
                (max(best[stage - 1, start][0], before[end] - before[start] + extra), start)
                for start in range(stage - 1, end)
                if (stage - 1, start) in best
            )
    counts, end = [], n
    for stage in range(stages, 0, -1):
        start = best[stage, end][1]
        counts.append(end - start)
        end = start
    return counts[::-1]


def stage_costs(model: nn.Module, context_length: int) -> tuple[list[float], float]:
    """Forward FLOPs a token of each block, and of what stands behind the blocks; see model/count.py."""
    plan, blocks = plan_of(model), blocks_of(model)
    assert plan is not None
    costs = []
    for block in blocks:
        matrices = [p for p in block.parameters() if p.ndim == 2]
        width = min((size for p in matrices for size in p.shape), default=0)
        costs.append(2.0 * sum(p.numel() for p in matrices) + 4.0 * context_length * getattr(model, "d_model", width))
    head = [p for name in present(model, plan.head) for p in model.get_submodule(name).parameters() if p.ndim == 2]
    return costs, 2.0 * sum(p.numel() for p in head)


def present(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Those of the plan's names that this model has: an option may leave a module out."""
    known = {name for name, _ in model.named_modules()}
    return [name for name in names if name in known]


def check_pipeline_plan(model: nn.Module, stages: int) -> None:
    """ConfigError where the model cannot be cut into stages."""
    plan, blocks = plan_of(model), blocks_name(model)
    assert plan is not None, "parallel/check.py asks for a plan"
    if blocks is None or len(blocks_of(model)) < stages:
        message = f"the model has {len(blocks_of(model))} blocks, and each of {stages} stages needs one"
        raise ConfigError(message, "strategy.pipeline", stages, fix="Use fewer stages, or a deeper model.")
    missing = [name for name in plan.embed[:1] if name not in present(model, plan.embed)]
    if missing:
        raise ConfigError(f"the model has no {missing[0]}, which its Plan names in `embed`", "strategy.pipeline", stages)
    parts = (*plan.embed, blocks, *plan.head)
    outside = [name for name, _ in model.named_parameters() if not any(name.startswith(f"{part}.") for part in parts)]
    if outside:
        fix = "Name the module in `embed` or `head` of its Plan."
        raise ConfigError(f"the model's plan does not say in which stage {outside[0]} is", "strategy.pipeline", stages, fix=fix)
    for other, name in ties(model).items():
        ends = [next((end for end in (plan.embed, plan.head) if any(n.startswith(f"{part}.") for part in end)), None) for n in (name, other)]
        if ends != [plan.embed, plan.head] and ends[0] is not ends[1]:
            message = f"{other} and {name} are one parameter, which only embedding and head may share across stages"
            raise ConfigError(message, "strategy.pipeline", stages, fix="Use strategy=fsdp.")


def cut(model: nn.Module, counts: Sequence[int], keep: Sequence[int]) -> list[Any]:
    """Removes from `model`, in place, all but the stages `keep`; returns one view of it for each of them, sharing its modules.

    Parameters keep their names. The first stage has what the plan calls `embed`, the last its `head`.
    """
    plan, blocks = plan_of(model), blocks_name(model)
    assert plan is not None and blocks is not None
    n, last = sum(counts), len(counts) - 1
    stage_of = [stage for stage, count in enumerate(counts) for _ in range(count)]
    embed, head = present(model, plan.embed), present(model, plan.head)

    def without(held: Sequence[int]) -> dict[str, nn.Module]:
        gone: dict[str, nn.Module] = {f"{blocks}.{i}": StandIn() for i in range(n) if stage_of[i] not in held}
        if 0 not in held:
            gone |= {name: Arrived() if name == plan.embed[0] else Added() for name in embed}
        if last not in held:
            gone |= {name: Leave() for name in head}
        return gone

    # What computes something for each head keeps the share of its own view.
    views = [_view(model, {**{name: copy.copy(model.get_submodule(name)) for name in plan.per_head}, **without([stage])}) for stage in keep]
    for name, module in without(keep).items():
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, module)
    return views


def _view(model: nn.Module, others: dict[str, nn.Module]) -> Any:
    """The model with other modules in some places, sharing all else."""
    view = view_of(model)
    inside: dict[str, dict[str, nn.Module]] = {}
    for name, module in others.items():
        first, _, rest = name.partition(".")
        if not rest:
            setattr(view, first, module)
        else:
            inside.setdefault(first, {})[rest] = module
    for first, deeper in inside.items():
        setattr(view, first, _view(getattr(view, first), deeper))
    return view


def check_between(view: nn.Module, inputs: dict[str, Any]) -> None:
    """ConfigError where `forward` does arithmetic of its own between what the plan calls embed, blocks and head: each stage would repeat it."""
    plan, blocks = plan_of(view), blocks_name(view)
    assert plan is not None
    others: dict[str, nn.Module] = {f"{blocks}.{i}": StandIn() for i in range(len(blocks_of(view)))}
    others |= {name: Arrived() if name == plan.embed[0] else Added() for name in present(view, plan.embed)}
    others |= {name: Leave() for name in present(view, plan.head)}
    tokens = next(iter(inputs.values()))
    # No random numbers: a resumed run tries this at another step, whose dropout must stay the same.
    given = torch.arange(8.0 * tokens.shape[0] * tokens.shape[1], device=tokens.device).view(*tokens.shape[:2], 8)
    with torch.no_grad():
        found = run_part(_view(view, others), inputs, given)
    if not torch.equal(found, given):
        message = "the model's forward changes hidden states between the modules that its Plan calls embed, blocks and head"
        raise ConfigError(message, "strategy.pipeline", fix="Do that inside one of these modules.")
