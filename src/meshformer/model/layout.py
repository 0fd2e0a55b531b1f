"""How a model may be sharded over processes: a `Plan`, plain data beside the model's code, from which `parallel/` works for any class.

    class Net(nn.Module):
        plan = Plan(
            blocks="layers",
            tensor={"tok": "vocabulary", "pos": "replicated", "layers.*.ln?": "sequence", "layers.*.[qkv]": "columns", "layers.*.o": "rows", …},
            embed=("tok", "pos"),
            head=("ln", "out"),
            attention="layers.*.core",
        )

A model without a plan can run with strategy=single, ddp, fsdp and hsdp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from .settings import STYLES, SYNONYMS


@dataclass(frozen=True)
class Plan:
    """Names are dotted module names relative to the model; patterns are fnmatch patterns (`layers.*.norm?`). Without a
    field, the model cannot be split along the mesh axis that needs it.

    blocks: the ModuleList of the repeated blocks; default: the longest ModuleList of the model.
    tensor: pattern -> one of STYLES, for tensor parallelism. The first matching pattern counts; every parameter needs a module that matches one.
    gather: modules whose first argument is all-gathered once for all `columns` layers inside, instead of once per layer. An optimisation.
    embed, head: the modules before and after the blocks, for pipeline parallelism. The first of `embed` returns hidden states (B, T, C); the
        others return either an addend of them or new hidden states. `forward` must do no arithmetic between embed, blocks and head.
    attention: the callable in each block that maps (q, k, v, …), each (B, heads, T, head dim), to an output shaped like q, for context
        parallelism. Nothing else may mix tokens, and `forward` must accept positions.
    mask: the model's method that builds the mask from positions. Without it, context parallelism has to give attention whole sequences (Ulysses).
    per_head: modules that compute one value per head and have a method `share_heads(rank, size)` to keep those of one rank.
    divides: names of model attributes (numbers of heads) that must be divisible by strategy.tensor.
    whole_sequences: `forward` computes masks or positions from the size of the hidden states, so with sequence parallelism a later pipeline stage
        must gather what it receives.
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
    whole_sequences: bool = False

    def __post_init__(self) -> None:
        words = {pattern: SYNONYMS.get(style, style) for pattern, style in self.tensor.items()}
        for pattern, style in words.items():
            if style not in STYLES:
                raise ValueError(f"Plan.tensor[{pattern!r}]={style!r}: use one of {', '.join(STYLES)}")
        object.__setattr__(self, "tensor", words)

    def style(self, module: str) -> str | None:
        """The style of this module's parameters; None where no pattern matches."""
        direct = _first(self.tensor, module)
        while direct is None and module:
            module = module.rpartition(".")[0]
            outer = _first(self.tensor, module) if module else None
            direct = outer if outer == "replicated" else None
        return direct

    def lacks(self, axis: str) -> str | None:
        """The part of the Plan that is missing for this mesh axis, for an error message; None where nothing is."""
        if axis == "tensor" and not self.tensor:
            return "`tensor` in its Plan, which says how each module is cut"
        if axis == "pipeline" and not (self.embed and self.head):
            return "`embed` and `head` in its Plan, which name the modules before and after the blocks"
        if axis == "context" and self.attention is None:
            return "`attention` in its Plan, which names the function that mixes tokens"
        return None


def _first(styles: Mapping[str, str], name: str) -> str | None:
    return next((style for pattern, style in styles.items() if fnmatchcase(name, pattern)), None)


def plan_of(model: nn.Module) -> Plan | None:
    plan = getattr(model, "plan", None)
    return plan if isinstance(plan, Plan) else None


def blocks_name(model: nn.Module) -> str | None:
    """The dotted name of the repeated blocks: the plan's, else that of the longest ModuleList (the first of equals); None without a ModuleList."""
    plan = plan_of(model)
    if plan is not None and plan.blocks is not None:
        return plan.blocks
    lists = [(len(module), name) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    return max(lists, key=lambda found: found[0])[1] if lists else None


def blocks_of(model: nn.Module) -> list[nn.Module]:
    name = blocks_name(model)
    return [] if name is None else list(model.get_submodule(name).children())


def uncovered(model: nn.Module, plan: Plan) -> list[str]:
    """Names of the parameters that match no pattern of the plan's `tensor`."""
    return [name for name, _ in model.named_parameters() if plan.style(name.rpartition(".")[0]) is None]


def ties(model: nn.Module) -> dict[str, str]:
    """For each tied parameter: its second name -> its first name."""
    first: dict[int, str] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            found[name] = first[id(parameter)]
    return found


def retie(model: nn.Module, tied: Mapping[str, str]) -> None:
    """Ties parameters again after modules were given new ones; `tied` is what `ties` returned."""
    names = dict(model.named_parameters(remove_duplicate=False))
    for other, name in tied.items():
        if other in names and name in names:
            owner, _, last = other.rpartition(".")
            setattr(model.get_submodule(owner), last, names[name])
