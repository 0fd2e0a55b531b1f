"""What trades memory for time inside a block, in any layout: activation checkpointing and torch.compile.

Both wrap the block's `forward` on the instance, so no module is added and no name in a checkpoint changes. Compilation is inside, so that
the compiled code is what is computed again; FSDP's hooks, which hang on the call, stay outside of both.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# Expensive to compute again: matrix products, attention, and what other ranks must take part in. Everything else is cheap. Words in names of
# operators, of which each device has its own.
KEPT = ("aten.mm.", "aten.addmm.", "aten.bmm.", "scaled_dot_product", "all_gather_into_tensor", "reduce_scatter_tensor", "functional.all_reduce.")


BACKEND = "inductor"  # of torch.compile


def apply_memory_options(blocks: Iterable[Any], activation_checkpointing: str, compile: bool) -> None:
    """`activation_checkpointing`: `none`; `full`: a block keeps its input alone and is computed again in the backward pass (Chen et al. 2016);
    `selective`: it also keeps the results of the operations in KEPT."""
    for block in blocks:
        if compile:  # blocks of one class share the compiled code, and a part that cannot be compiled is an error, not a silent loss
            block.forward = torch.compile(block.forward, backend=BACKEND, fullgraph=True)
        if activation_checkpointing == "full":
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        elif activation_checkpointing == "selective":
            contexts = partial(create_selective_checkpoint_contexts, _policy)
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = _is_kept(operation)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@cache
def _is_kept(operation: Any) -> bool:
    return any(word in str(operation) for word in KEPT)
