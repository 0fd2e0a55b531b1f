"""Describes a layout for the table that is printed at the start of a run."""

from __future__ import annotations

from typing import Any

from meshformer.config.degrees import Degrees

from .pipeline import local_tensor


def axes_table(degrees: Degrees, settings: dict[str, Any], blocks_per_stage: list[int] | None = None) -> list[tuple[str, int, str]]:
    """(axis, degree, what it splits) for each axis with a degree above 1, outermost first; `settings` is the strategy config node."""
    exact = {"all_gather": "keys and values gathered", "ulysses": "heads for tokens, all to all"}
    texts = {
        "pipeline": _pipeline(settings, blocks_per_stage or []),
        "replicate": "samples; each copy holds what the other axes leave",
        "shard": "samples; parameters, gradients and optimizer state in equal parts",
        "context": f"every sequence, in stretches of time ({exact.get(settings.get('context_method', ''), '')})",
        "tensor": "heads, hidden units and vocabulary of every layer"
        + "; activations along time" * bool(settings.get("sequence_parallel")),
    }
    return [(axis, getattr(degrees, axis), text) for axis, text in texts.items() if getattr(degrees, axis) > 1]


def _pipeline(settings: dict[str, Any], blocks: list[int]) -> str:
    ends = [sum(blocks[: i + 1]) for i in range(len(blocks))]
    stages = " | ".join(f"{end - n}–{end - 1}" if n > 1 else f"{end - 1}" for end, n in zip(ends, blocks, strict=True))
    return f"layers: blocks {stages}; {settings.get('schedule')}, {settings.get('microbatches')} micro-batches"


def local_sizes(task: Any, optimizer: Any) -> dict[str, int]:
    """This rank's number of parameters, and the bytes of parameters, gradients and (future) optimizer state."""
    sizes = {id(p): (local_tensor(p).numel(), local_tensor(p).numel() * p.element_size()) for p in task.model.parameters()}
    trained = [p for p in task.model.parameters() if p.requires_grad]
    groups = optimizer.param_groups if optimizer is not None else []
    return {
        "parameters": sum(number for number, _ in sizes.values()),
        "bytes": sum(size for _, size in sizes.values()),
        "gradients": sum(sizes[id(p)][1] for p in trained),
        "optimizer": sum(_state_tensors(group) * sizes[id(p)][1] for group in groups for p in group["params"]),
    }


def _state_tensors(group: dict[str, Any]) -> int:
    """Optimizer state tensors per parameter: two for AdamW, one for Muon and for SGD with momentum."""
    if group.get("method") == "muon":
        return 1
    return 2 if "betas" in group else int(bool(group.get("momentum")))
