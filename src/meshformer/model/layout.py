"""How a model may be cut over processes: a `Plan`, plain data that stands beside the model's code. `parallel/` reads it and knows no class.

    class Net(nn.Module):
        plan = Plan(
            blocks="layers",
            tensor={"tok": "vocabulary", "pos": "replicated", "layers.*.ln?": "sequence", "layers.*.[qkv]": "columns", "layers.*.o": "rows", …},
            embed=("tok", "pos"),
            head=("ln", "out"),
            attention="layers.*.core",
        )

A model without a plan runs in one process, ddp, fsdp and hsdp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

STYLES = {
    "columns": "the output features of a linear layer are cut; whole activations in, a part of the features out",
    "rows": "the input features of a linear layer are cut; the partial sums are added up over the processes",
    "vocabulary": "an embedding, or the head, is cut along the vocabulary",
    "sequence": "acts on each token by itself: on each process's part of the tokens where activations are cut along time",
    "heads": "acts on each head by itself, with whole parameters: on each process's heads",
    "replicated": "every process computes the same; holds for the modules inside too",
}
SYNONYMS = {  # the words of transformers' `base_model_tp_plan`
    "colwise": "columns", "rowwise": "rows", "colwise_rep": "vocabulary", "colwise_gather_output": "vocabulary",
    "embedding_rowwise": "vocabulary", "sequence_parallel": "sequence", "replicated_with_grad_allreduce": "heads",
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Names are dotted names of modules, from the model on; patterns are fnmatch's (`layers.*.norm?`). What is left out is not cut that way.

    blocks: the ModuleList of the repeated blocks; the longest one of the model where it is left out.
    tensor: pattern -> one of STYLES. The first pattern that fits a module counts; every parameter must be in a module that one fits.
    gather: modules whose first argument is gathered once for all the `columns` inside, instead of by each of them. An optimisation.
    embed, head: what stands before and behind the blocks, for a pipeline. The first of `embed` returns the first hidden states (B, T, C), what
        the others return is added to them, or is theirs; `forward` does no arithmetic of its own between embed, blocks and head.
    attention: the callable of each block that is given (q, k, v, …), each (B, heads, T, head size), and returns the like of q: it is all that
        sees across tokens, and `forward` takes positions.
    mask: the model's method that makes the mask from positions; without one, attention is handed whole sequences (Ulysses).
    per_head: parts of the model with a method `share_heads(rank, size)`, that compute something for each head.
    divides: attributes of the model that strategy.tensor must divide: numbers of heads.
    """

    blocks: str | None = None
    tensor: Mapping[str, str] = field(default_factory=dict)
    gather: Sequence[str] = ()
    embed: Sequence[str] = ()
    head: Sequence[str] = ()
    attention: str | None = None
    mask: str | None = None
    per_head: Sequence[str] = ()
    divides: Sequence[str] = ()

    def __post_init__(self) -> None:
        words = {pattern: SYNONYMS.get(style, style) for pattern, style in self.tensor.items()}
        for pattern, style in words.items():
            if style not in STYLES:
                raise ValueError(f"Plan.tensor[{pattern!r}]={style!r}: use one of {', '.join(STYLES)}")
        object.__setattr__(self, "tensor", words)

    def style(self, module: str) -> str | None:
        """How the parameters of this module are cut; None where the plan does not say."""
        direct = _first(self.tensor, module)
        while direct is None and module:
            module = module.rpartition(".")[0]
            outer = _first(self.tensor, module) if module else None
            direct = outer if outer == "replicated" else None
        return direct

    def lacks(self, axis: str) -> str | None:
        """What keeps the model from being cut along this axis of the mesh, in a few words; None where it can be."""
        if axis == "tensor" and not self.tensor:
            return "`tensor` in its Plan, which says how each module is cut"
        if axis == "pipeline" and not (self.embed and self.head):
            return "`embed` and `head` in its Plan, which name what stands before and behind the blocks"
        if axis == "context" and self.attention is None:
            return "`attention` in its Plan, which names what sees across tokens"
        return None


def _first(styles: Mapping[str, str], name: str) -> str | None:
    return next((style for pattern, style in styles.items() if fnmatchcase(name, pattern)), None)


def plan_of(model: nn.Module) -> Plan | None:
    plan = getattr(model, "plan", None)
    return plan if isinstance(plan, Plan) else None


def blocks_name(model: nn.Module) -> str | None:
    """Where the repeated blocks are: as the plan says, else the longest ModuleList, the first of equals; None where there is none."""
    plan = plan_of(model)
    if plan is not None and plan.blocks is not None:
        return plan.blocks
    lists = [(len(module), name) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    return max(lists, key=lambda found: found[0])[1] if lists else None


def blocks_of(model: nn.Module) -> list[nn.Module]:
    name = blocks_name(model)
    return [] if name is None else list(model.get_submodule(name).children())


def uncovered(model: nn.Module, plan: Plan) -> list[str]:
    """Parameters for which the plan's `tensor` has no pattern: cutting the model would leave them out of account."""
    return [name for name, _ in model.named_parameters() if plan.style(name.rpartition(".")[0]) is None]


def ties(model: nn.Module) -> dict[str, str]:
    """Other names of a parameter that has several -> its first name."""
    first: dict[int, str] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            found[name] = first[id(parameter)]
    return found


def retie(model: nn.Module, tied: Mapping[str, str]) -> None:
    """Makes each pair of names one parameter again, after modules were given new ones."""
    names = dict(model.named_parameters(remove_duplicate=False))
    for other, name in tied.items():
        if other in names and name in names:
            owner, _, last = other.rpartition(".")
            setattr(model.get_submodule(owner), last, names[name])
