"""The Plan of a model of the transformers library, from what transformers declares: `tp_plan`, how layers may be sharded, and `pp_plan`, where the
model may be cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from meshformer.model.layout import Plan, blocks_name
from meshformer.model.settings import STYLES, SYNONYMS

NET = "net."  # prefix of the parameter names: the transformers model is the submodule `net` of TransformersModel


def plan_for(net: Any) -> Plan:
    """The Plan of a transformers model, from what transformers declares: without `tensor`, or `embed` and `head`, where it declares nothing.

    Parameters that its tensor plan does not mention are replicated, as they are in transformers. The embedding and linear heads are sharded along
    the vocabulary. Names begin with `net.`.
    """
    blocks, base = blocks_name(net), net.base_model_prefix
    styles: dict[str, Any] = {name: SYNONYMS.get(style, style) for name, style in net.tp_plan.items()}
    inner = [name for name in net.pp_plan if name.startswith(f"{base}.")]
    outer = [name for name, child in net.named_children() if name != base and next(child.parameters(), None) is not None]
    known = all(style in STYLES for style in styles.values())
    gather, sequence = _sequence_parallel(net, blocks, styles, inner) if blocks else ((), ())
    styles |= {name: "vocabulary" for name in outer if name not in styles and isinstance(net.get_submodule(name), nn.Linear)}
    tensor = {**styles, **dict.fromkeys(sequence, "sequence"), "*": "replicated"} if known and net.tp_plan else {}
    cut = inner.index(blocks) if blocks in inner else None
    return Plan(
        blocks=blocks and NET + blocks,
        tensor={NET + name: style for name, style in tensor.items()},
        gather=[NET + name for name in gather] if tensor else (),
        embed=[NET + name for name in inner[:cut]] if cut else (),
        head=[NET + name for name in (*inner[cut + 1 :], *outer)] if cut else (),
        divides=("n_heads", "n_kv_heads"),
        whole_sequences=True,
    )


def _sequence_parallel(net: Any, blocks: str, styles: Mapping[str, str], stages: Sequence[str]) -> tuple[list[str], list[str]]:
    """(modules that gather their input, modules that act on each token separately) for sequence parallelism, as patterns of names.

    Without the latter the model cannot use it: a block then has parameters outside of the sharded layers and of norms directly inside it.
    """
    gather, norms = [], []
    for name, child in net.get_submodule(blocks)[0].named_children():
        pattern, place = f"{blocks}.*.{name}", f"{blocks}.0.{name}"
        covered = [_styled(f"{place}.{inside}".rstrip("."), styles) for inside, module in child.named_modules() if _has_own(module)]
        if covered and all(covered):
            gather.append(pattern)
        elif covered and _is_norm(child):
            norms.append(pattern)
        elif covered:
            return gather, []
    after = stages[stages.index(blocks) + 1 :] if blocks in stages else []
    last = [name for name in after if _has_own(net.get_submodule(name))]
    return (gather, [*norms, *last]) if all(_is_norm(net.get_submodule(name)) for name in last) else (gather, [])


def _styled(name: str, styles: Mapping[str, str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in styles)


def _has_own(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _is_norm(module: nn.Module) -> bool:
    return not list(module.children()) and all(parameter.ndim == 1 for parameter in module.parameters())
