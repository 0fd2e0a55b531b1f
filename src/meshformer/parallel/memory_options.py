"""Memory options of a block, for every layout: activation checkpointing and torch.compile.

Both replace `block.forward` on the instance, so no module is added and no parameter name changes. Checkpointing wraps the compiled forward, so
the compiled code is recomputed. FSDP's hooks run around the module call, outside of both.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# Selective checkpointing saves the outputs of the operators whose name contains one of these: matrix products, attention and collectives are
# expensive to recompute. Parts of names, because each device has its own attention operators.
KEPT = ("aten.mm.", "aten.addmm.", "aten.bmm.", "scaled_dot_product", "all_gather_into_tensor", "reduce_scatter_tensor", "functional.all_reduce.")


BACKEND = "inductor"  # of torch.compile


def apply_memory_options(
    blocks: Iterable[Any], activation_checkpointing: str, compile: bool, compile_options: dict[str, Any] | None = None
) -> None:
    """Compiles and checkpoints blocks in place. `activation_checkpointing`: `none`; `full`: only a block's input is saved, and the block is
    recomputed in the backward pass (Chen et al. 2016); `selective`: the outputs of the operators in KEPT are saved too."""
    for block in blocks:
        if compile:  # all blocks share the compiled code; fullgraph=True makes a graph break an error
            block.forward = torch.compile(block.forward, backend=BACKEND, fullgraph=True, options=compile_options)
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
