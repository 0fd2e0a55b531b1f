"""Splits a model into pipeline stages.

Every stage runs the model's own `forward`, with placeholders for the modules of other stages: the embedding returns the hidden states received
from the previous stage, a block is the identity, and the head ends the forward pass by raising `StageOutput`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from meshformer.config.errors import ConfigError
from meshformer.model.layout import blocks_name, blocks_of, plan_of, ties


class Placeholder(nn.Module):
    """Replaces a block of another stage: the identity."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args else next(iter(kwargs.values()))


class ReceivedHidden(Placeholder):
    """Replaces the first embedding: returns the hidden states from the previous stage, once."""

    hidden: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden, self.hidden = self.hidden, None
        return hidden


class OmittedEmbedding(Placeholder):
    """Replaces the other modules before the blocks: returns 0, an addend without effect, for token ids or positions, and hidden states unchanged."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = super().forward(*args, **kwargs)
        return x if x.is_floating_point() else torch.zeros((), device=x.device)


class StageOutput(Exception):
    """Raised by `StageEnd` with the output of this stage, to leave the model's `forward`."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden


class StageEnd(Placeholder):
    """Replaces a module after the blocks."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise StageOutput(super().forward(*args, **kwargs))


def held_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks whose parameters are on this rank."""
    return [block for block in blocks_of(model) if not isinstance(block, Placeholder)]


def run_part(part: nn.Module, inputs: dict[str, Any], received: Tensor | None) -> Tensor:
    """The output of one stage. `inputs`: the model's keyword arguments; `received`: hidden states (B, T, C) from the previous stage, if any."""
    plan = plan_of(part)
    assert plan is not None
    first = part.get_submodule(plan.embed[0])
    if isinstance(first, ReceivedHidden):
        first.hidden = received
    try:
        return part(**inputs)
    except StageOutput as output:
        return output.hidden


# --- splitting the model


def balanced(costs: Sequence[float], last: float, stages: int) -> list[int]:
    """The number of blocks of each stage, at least 1, that minimises the cost of the most expensive stage, by dynamic programming.

    `costs`: of each block; `last`: the cost of the head, which belongs to the last stage. ValueError for more stages than blocks.
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
    """Forward FLOPs per token of each block, and of the modules after the blocks; see model/count.py."""
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
    """The names among `names` that exist in this model: a setting can leave a module out."""
    known = {name for name, _ in model.named_modules()}
    return [name for name in names if name in known]


def check_pipeline_plan(model: nn.Module, stages: int) -> None:
    """ConfigError if the model cannot be split into `stages` stages."""
    plan, blocks = plan_of(model), blocks_name(model)
    assert plan is not None, "MeshStrategy._check_plan requires a plan"
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
    """Replaces in `model`, in place, all modules except those of the stages `keep`; returns one view of the model per kept stage.

    `counts`: blocks per stage. Views share the modules of `model`, and parameters keep their names. The first stage also has the modules that the
    Plan calls `embed`, the last those that it calls `head`.
    """
    plan, blocks = plan_of(model), blocks_name(model)
    assert plan is not None and blocks is not None
    n, last = sum(counts), len(counts) - 1
    stage_of = [stage for stage, count in enumerate(counts) for _ in range(count)]
    embed, head = present(model, plan.embed), present(model, plan.head)

    def placeholders(held: Sequence[int]) -> dict[str, nn.Module]:
        replaced: dict[str, nn.Module] = {f"{blocks}.{i}": Placeholder() for i in range(n) if stage_of[i] not in held}
        if 0 not in held:
            replaced |= {name: ReceivedHidden() if name == plan.embed[0] else OmittedEmbedding() for name in embed}
        if last not in held:
            replaced |= {name: StageEnd() for name in head}
        return replaced

    # Each view has its own copy of the per-head modules, because `share_heads` changes them in place.
    views = [_view(model, {**{name: copy.copy(model.get_submodule(name)) for name in plan.per_head}, **placeholders([stage])}) for stage in keep]
    for name, module in placeholders(keep).items():
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, module)
    return views


def _view(model: nn.Module, others: dict[str, nn.Module]) -> Any:
    """A shallow copy of the model with the modules of `others` (name -> module) in place of its own."""
    view = shallow_copy(model)
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


def shallow_copy(module: nn.Module) -> Any:
    """A copy that shares everything with `module` but its dicts, so that setting a submodule or a hook of the copy does not change the original.

    `copy.copy` would share the dicts too. What `memo` holds is not copied.
    """
    memo: dict[int, Any] = {}
    for value in vars(module).values():
        memo |= {id(x): x for x in (value.values() if isinstance(value, dict) else (value,))}
    return copy.deepcopy(module, memo)


def check_between(view: nn.Module, inputs: dict[str, Any]) -> None:
    """ConfigError if `forward` changes hidden states between the modules of the plan: every stage would repeat that arithmetic."""
    plan, blocks = plan_of(view), blocks_name(view)
    assert plan is not None
    others: dict[str, nn.Module] = {f"{blocks}.{i}": Placeholder() for i in range(len(blocks_of(view)))}
    others |= {name: ReceivedHidden() if name == plan.embed[0] else OmittedEmbedding() for name in present(view, plan.embed)}
    others |= {name: StageEnd() for name in present(view, plan.head)}
    tokens = next(iter(inputs.values()))
    # No random numbers: a resumed run calls this at another step, and it must not change the dropout of that step.
    given = torch.arange(8.0 * tokens.shape[0] * tokens.shape[1], device=tokens.device).view(*tokens.shape[:2], 8)
    with torch.no_grad():
        found = run_part(_view(view, others), inputs, given)
    if not torch.equal(found, given):
        message = "the model's forward changes hidden states between the modules that its Plan calls embed, blocks and head"
        raise ConfigError(message, "strategy.pipeline", fix="Do that inside one of these modules.")
