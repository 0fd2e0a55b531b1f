"""Estimates the memory of the fullest rank in closed form, fast enough for thousands of layouts; live_memory.py counts it exactly for a few."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from meshformer.plan.sizes import Sizes
from meshformer.plan.steptime import StepLayout, stage_blocks

FP32 = 4
LOGITS_AT_ONCE, LARGE = 2**25, 2**26  # of the loss in chunks (model/head.py), and from how many logits on it is computed so
LOGIT_COPIES = 4  # of the logits at once, while their gradient is made
MUON, MUON_WORK = 4.0, 2.5  # state of a matrix under Muon; copies of all fp32 matrices that its step makes: directions, in bf16, and their parts
ADAMW_BYTES = 8.0  # of state: with Muon too, of embeddings
WHOLE = 3  # hidden states in fp32 that tensor parallelism has whole while a block is computed: gathered, and before and after a reduction


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


def estimate(sizes: Sizes, layout: StepLayout, checkpointing: str, optimizer_bytes: float, mixed: bool = True) -> Memory:
    """Memory of the rank that holds most: in a pipeline the first one, which has most micro-batches in flight, or the last, which has the head.

    `optimizer_bytes`: state of one parameter. `mixed`: bf16 computation on fp32 weights.
    """
    blocks, last = stage_blocks(sizes, layout.pipeline, layout.stages)
    ends = sizes.vocabulary * sizes.width
    small = 2 if mixed else FP32
    saved = saved_by_block(sizes, layout, checkpointing, small)
    stream = FP32 * sizes.width / (layout.tensor if layout.sequence_parallel else 1)
    # The backward pass of a block holds the gradients of its input and output and, if it is computed again, what was not saved.
    working = 2 * stream + (WHOLE * FP32 * sizes.width if layout.tensor > 1 else 0.0)
    if checkpointing != "none":
        working += max(0.0, saved_by_block(sizes, layout, "none", small) - saved)
    if layout.pipeline == 1:
        both = (1 if sizes.tied else 2) * ends
        return _rank(sizes, layout, _Part(last, both, 1.0, True, saved, working, small, optimizer_bytes))
    flying = in_flight(layout)
    first = _rank(sizes, layout, _Part(blocks, ends, flying, False, saved, working, small, optimizer_bytes))
    at_end = flying if layout.schedule == "gpipe" else min(flying, layout.stages)
    end = _rank(sizes, layout, _Part(last, ends, at_end, True, saved, working, small, optimizer_bytes))
    return first if first.total > end.total else end


def in_flight(layout: StepLayout) -> float:
    """Micro-batches whose activations the first rank of a pipeline holds at once (Narayanan et al. 2021)."""
    if layout.schedule == "gpipe":
        return layout.microbatches
    if layout.stages > 1:
        chunks = (layout.stages - 1) * layout.pipeline + 2 * (layout.pipeline - 1) + 1
        return min(layout.microbatches, chunks / layout.stages)
    return min(layout.microbatches, layout.pipeline)


class _Part(NamedTuple):
    """What one rank has: blocks, parameters of embedding and head, micro-batches in flight, and bytes that a block takes for a token."""

    blocks: int
    ends: float
    flying: float
    head: bool
    saved: float
    working: float
    small: int
    optimizer_bytes: float


def _rank(sizes: Sizes, layout: StepLayout, part: _Part) -> Memory:
    """The largest of three moments: the loss, when all activations are there, the backward pass of the last block after it, and the optimizer."""
    n, parts = layout.tensor, layout.parts
    block, ends = sizes.block_parameters / n, (part.ends + sizes.position_table) / n
    held = part.blocks * block + ends
    tokens = layout.samples * sizes.length / layout.context
    weights = held * FP32 / parts
    matrices, muon = part.blocks * block / parts, part.optimizer_bytes == MUON
    optimizer = matrices * part.optimizer_bytes + ends / parts * (ADAMW_BYTES if muon else part.optimizer_bytes)
    stepping = optimizer + matrices * FP32 * MUON_WORK * muon
    several = layout.accumulation * layout.microbatches > 1
    if parts == 1:
        gradients = held * FP32
    elif not several:
        gradients = 0.0  # each is reduced to a shard before the next one is whole, when most activations are gone
    else:  # summed over micro-batches as shards, or whole if they are reduced after the last one
        gradients = held * FP32 / (parts if layout.reduce_every else 1)
    embedding = sizes.vocabulary * sizes.width * FP32
    if several and n > 1 and (part.flying > 1 or not part.head or layout.pipeline == 1):
        gradients += embedding * (1 - 1 / n)  # each tensor rank holds the embedding's gradient whole until it is reduced
    activations = part.flying * part.blocks * tokens * part.saved
    of_head = embedding / n if part.head else 0.0  # the gradient of its weight, which the head computes with the loss
    if part.head and layout.schedule == "gpipe" and layout.pipeline > 1:
        activations += (part.flying - 1) * of_head
    if parts == 1 and part.small < FP32:
        activations += held * part.small  # autocast keeps bf16 copies of the weights
    root = ends * layout.gather_bytes if parts > 1 else 0.0
    gathered = block * layout.gather_bytes if layout.reshard else part.blocks * block * layout.gather_bytes
    gathered = gathered if parts > 1 else 0.0
    logits = tokens * sizes.vocabulary / (n if layout.loss_parallel else 1)
    loss = of_head + 2 * tokens * sizes.width * FP32 + LOGIT_COPIES * FP32 * min(logits, LOGITS_AT_ONCE if logits >= LARGE else logits)
    at_loss = Memory(weights, gradients, optimizer, activations, root + gathered, loss if part.head else 0.0)
    # FSDP gathers the next block while it computes with one, and reduces a gradient in a buffer of its own.
    sent = root + gathered + block * (2 * layout.gather_bytes + layout.reduce_bytes) if parts > 1 else 0.0
    backward = Memory(weights, gradients + of_head, optimizer, activations + tokens * part.working, sent, 0.0)
    update = Memory(weights, held * FP32 / parts, stepping, 0.0, 0.0, 0.0)
    return max(at_loss, backward, update, key=lambda memory: memory.total)


@cache
def _saved(sizes: Sizes, n: int, along: int, context: int, ulysses: bool, checkpointing: str, small: int) -> float:
    stream = FP32 * sizes.width / along
    if checkpointing == "full":
        return stream
    query, keys = sizes.query_width / n, sizes.key_width / n
    deep = sizes.feed_forward * (2 if sizes.gated else 1) / n
    products = query + 2 * keys + query + deep  # results of the products for q, k and v, attention, and the feed-forward's first products
    elsewhere = 0 if ulysses else 2 * keys * (context - 1)  # keys and values gathered from the other ranks of the context axis
    if checkpointing == "selective":
        whole = 2 * sizes.width if n > 1 else 0  # results of collectives are kept too: hidden states before products, in fp32, and after them
        results = whole + 2 * sizes.width / along + 2 * keys * (context > 1)
        return stream + small * (products + results + elsewhere) + FP32 * whole
    normed = 2 * sizes.width  # gathered along time
    before = FP32 * 2 * sizes.width / along if along > 1 else 0  # and as they were before that
    return 2 * stream + before + small * (products + normed + deep + elsewhere)


def saved_by_block(sizes: Sizes, layout: StepLayout, checkpointing: str, small: int) -> float:
    """Bytes that the forward pass of a block keeps for its backward pass, for a token."""
    along = layout.tensor if layout.sequence_parallel else 1
    return _saved(sizes, layout.tensor, along, layout.context, layout.ulysses, checkpointing, small)
