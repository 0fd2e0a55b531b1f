"""Estimates the memory of the fullest rank in closed form, fast enough for thousands of layouts; live_memory.py counts it exactly for a few."""

from __future__ import annotations

from dataclasses import dataclass

from meshformer.plan.sizes import Sizes
from meshformer.plan.steptime import Layout, stage_blocks

FP32 = 4
LOGITS_AT_ONCE, LARGE = 2**25, 2**26  # of the loss in chunks (model/head.py), and from how many logits on it is computed so
CHUNK_COPIES = 3  # of a chunk's logits


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the peak of a step, by kind. `communication`: gathered parameters, their gradients, and buffers."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    communication: float
    loss: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.communication + self.loss


def estimate(sizes: Sizes, layout: Layout, checkpointing: str, optimizer_bytes: float, mixed: bool = True) -> Memory:
    """Memory of the rank that holds most: in a pipeline the first one, which has most micro-batches in flight, or the last, which has the head.

    `optimizer_bytes`: state of one parameter. `mixed`: bf16 computation on fp32 weights.
    """
    blocks, last = stage_blocks(sizes, layout.pipeline, layout.stages)
    ends = sizes.vocabulary * sizes.width
    if layout.pipeline == 1:
        return _rank(sizes, layout, checkpointing, optimizer_bytes, mixed, last, (1 if sizes.tied else 2) * ends, 1, True)
    first = _rank(sizes, layout, checkpointing, optimizer_bytes, mixed, blocks, ends, in_flight(layout), False)
    end = _rank(sizes, layout, checkpointing, optimizer_bytes, mixed, last, ends, min(in_flight(layout), layout.stages), True)
    return max(first, end, key=lambda memory: memory.total)


def in_flight(layout: Layout) -> float:
    """Micro-batches whose activations the first rank of a pipeline holds at once (Narayanan et al. 2021)."""
    if layout.schedule == "gpipe":
        return layout.microbatches
    if layout.stages > 1:
        chunks = (layout.stages - 1) * layout.pipeline + 2 * (layout.pipeline - 1) + 1
        return min(layout.microbatches, chunks / layout.stages)
    return min(layout.microbatches, layout.pipeline)


def _rank(
    sizes: Sizes, layout: Layout, checkpointing: str, optimizer_bytes: float, mixed: bool, blocks: int, ends: float, flying: float, head: bool
) -> Memory:
    n, parts = layout.tensor, layout.parts
    block = sizes.block_parameters / n
    held = blocks * block + (ends + sizes.position_table) / n
    weights = held * FP32 / parts
    tokens = layout.samples * sizes.length / layout.context
    small = 2 if mixed else FP32
    saved, whole = _saved(sizes, layout, checkpointing, small), _saved(sizes, layout, "none", small)
    activations = flying * blocks * tokens * saved + tokens * (whole if checkpointing != "none" else 0)
    if parts > 1:
        gathered = 2 * block if layout.reshard else blocks * block  # a block and the next one, whose gather overlaps with it
        # The root unit, embedding and head, stays gathered; a block's gradient is whole before it is reduced.
        communication = (gathered + ends / n) * layout.gather_bytes
        communication += block * (layout.gather_bytes + layout.reduce_bytes) + ends / n * layout.reduce_bytes
    elif mixed:
        communication = held * 2  # autocast keeps bf16 copies of the weights
    else:
        communication = 0.0
    if layout.replicate > 1 and not layout.fsdp:
        communication += 25 * 2**20 if layout.parts > 1 else held * 0.0
    logits = tokens * sizes.vocabulary / (n if layout.loss_parallel else 1)
    loss = 0.0
    if head:
        loss = CHUNK_COPIES * FP32 * min(logits, LOGITS_AT_ONCE) if logits >= LARGE else CHUNK_COPIES * FP32 * logits
        loss += 2 * tokens * sizes.width * FP32
    return Memory(weights, weights, held * optimizer_bytes / parts, activations, communication, loss)


def _saved(sizes: Sizes, layout: Layout, checkpointing: str, small: int) -> float:
    """Bytes that the forward pass of a block keeps for its backward pass, for a token."""
    n = layout.tensor
    along = n if layout.sequence_parallel else 1
    stream = FP32 * sizes.width / along
    if checkpointing == "full":
        return stream
    heads = (sizes.query_width + 2 * sizes.key_width) / n
    deep = sizes.feed_forward * (2 if sizes.gated else 1) / n
    products = small * (heads + sizes.query_width / n + deep + 2 * sizes.width / along)
    if checkpointing == "selective":
        return stream + products
    normed = 2 * (stream + small * sizes.width)  # the norms' inputs in fp32, and their outputs, gathered along time
    turned = small * (sizes.query_width + sizes.key_width) / n
    activated = small * sizes.feed_forward * (2 if sizes.gated else 1) / n
    return stream + normed + products + turned + activated
