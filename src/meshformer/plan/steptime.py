"""Predicts the time of one optimizer step: a roofline for the card, α–β costs for the collectives, and a pipeline's bubble.

Compute of a micro-batch: each matrix product takes its FLOPs over a share of the card's peak (`Constants.products`), times 1 + s·(1/M + 1/N + 1/K):
small dimensions re-read their operands, in proportion to FLOPs per byte of the card (s = `rereads` · peak / bandwidth). Attention has a share of
its own, and norms, activations and residuals move bytes at the memory's bandwidth. Communication: bytes over a share of the link, plus latency.
The constants are fitted on published measurements by `python -m meshformer.bench plan`, which also prints their errors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from meshformer.plan.cluster import Cluster
from meshformer.plan.sizes import Sizes

ELEMENTWISE = 8, 4  # numbers of width C, and of the feed-forward width F, that a block reads or writes outside products, forward, for a token
LOSS_BYTES = 24  # a logit in fp32: written, read and written by the softmax, its gradient written and read twice
OPTIMIZER_BYTES = 28  # a parameter in AdamW: weight, two averages read and written, gradient read
HOST_OPERATIONS = 25  # operations that the host starts for one pass of a block
TENSOR_EXCHANGES = 8  # gathers and reductions of the hidden states of a block, forward and backward, under sequence parallelism
RECOMPUTED_EXCHANGES = 2  # of them again, if the block is recomputed
ULYSSES_EXCHANGES = 4  # of queries, keys, values and results
DDP_BUCKET = 25 * 2**20  # bytes of gradients that DDP sums at once


@dataclass(frozen=True)
class StepLayout:
    """One way to run a step. `samples`: of one micro-batch on one replica; a pipeline runs `microbatches` of them for each of the
    `accumulation` passes of a step. `recomputed`: shares of a block's matrix products, attention and other operations that the backward pass
    repeats."""

    samples: int
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    pipeline: int = 1
    accumulation: int = 1
    microbatches: int = 1
    schedule: str = "1f1b"
    stages: int = 1  # a rank
    recomputed: tuple[float, float, float] = (0.0, 0.0, 0.0)
    compiled: bool = False
    float8: bool = False
    precision: str = "bf16"
    gather_bytes: int = 2  # of a parameter
    reduce_bytes: int = 4  # of a gradient
    activation_bytes: int = 2
    exchange_bytes: float = 2.0  # of a number that tensor parallelism exchanges
    sequence_parallel: bool = True
    loss_parallel: bool = False
    async_tensor: bool = False
    ulysses: bool = False  # how the context axis communicates: all-to-alls of queries, keys, values and results, or else gathered keys and values
    reshard: bool = True
    reduce_every: bool = False  # True: each micro-batch of an accumulation reduces gradients
    fsdp: bool = True

    @property
    def processes(self) -> int:
        return self.replicate * self.shard * self.context * self.tensor * self.pipeline

    @property
    def batch(self) -> int:
        """Samples of one optimizer step over all replicas."""
        return self.samples * self.microbatches * self.accumulation * self.replicate * self.shard

    @property
    def parts(self) -> int:
        """The number of FSDP shards of a parameter."""
        return self.shard * self.context


@dataclass(frozen=True)
class Constants:
    """Fitted numbers. Of a card: `products` and `attention`, the shares of peak that they reach, and `link`, the share of the link's rate."""

    products: float
    attention: float
    link: float
    rereads: float = 2.0
    network: float = 0.6  # share of the network's rate
    exposed: float = 0.65  # share of FSDP's and DDP's communication that slows computation even where it could be hidden
    compiled: float = 0.35  # of the bytes outside products that torch.compile leaves
    head: float = 10.0  # attention slows by 1 + this / width of a head
    pressure: float = 0.1  # slowdown per share of memory above a half that weights and optimizer state fill
    async_hidden: float = 0.5  # share of the exchanges that asynchronous tensor parallelism hides


@dataclass(frozen=True)
class Step:
    """Seconds of one step, by part; `total` is their sum. `bubble`: time in which a pipeline's rank waits."""

    products: float
    attention: float
    memory: float
    host: float
    tensor: float
    context: float
    data: float
    sends: float
    bubble: float
    optimizer: float

    @property
    def total(self) -> float:
        here = self.products + self.attention + self.memory + self.host + self.optimizer
        return here + self.tensor + self.context + self.data + self.sends + self.bubble

    @property
    def limit(self) -> str:
        """What most of the step is spent on: compute, memory, launches, link or bubble."""
        link = self.tensor + self.context + self.data + self.sends
        kinds = {
            "compute": self.products + self.attention, "memory": self.memory + self.optimizer, "launches": self.host, "link": link,
            "bubble": self.bubble,
        }  # fmt: skip
        return max(kinds, key=lambda kind: kinds[kind])


@cache
def constants(card: str) -> Constants:
    """The fitted constants of a card; a card that nothing was published for has the mean of the others."""
    fitted = json.loads((Path(__file__).parent / "constants.json").read_text(encoding="utf-8"))
    cards = fitted["cards"]
    own = cards.get(card) or {key: sum(c[key] for c in cards.values()) / len(cards) for key in ("products", "attention", "link")}
    names = {field.name for field in fields(Constants)}
    return Constants(**{key: value for key, value in {**fitted["common"], **own}.items() if key in names})


def step_time(sizes: Sizes, layout: StepLayout, cluster: Cluster, c: Constants) -> Step:
    """Seconds of one optimizer step, in parts. `layout.processes` cards of the cluster take part, whatever `cluster.nodes` says."""
    block, head = _costs(sizes, _Work.of(layout), cluster, c)
    most, last = stage_blocks(sizes, layout.pipeline, layout.stages)
    blocks, heads = (most, 0.0) if most * sum(block) >= last * sum(block) + sum(head) else (last, 1.0)
    passes = layout.accumulation * layout.microbatches
    used = 16 * sizes.parameters / (layout.tensor * layout.pipeline * layout.parts) / cluster.memory
    if "zero_bubble" in layout.schedule:  # its backward pass is two, one for the inputs and one for the weights
        block = (*block[:3], block[3] * 4 / 3, *block[4:])
    slower = 1 + c.pressure * max(0.0, used - 0.5)
    one = [slower * (blocks * of_block + heads * of_head) for of_block, of_head in zip(block, head, strict=True)]
    products, attention, memory, host, tensor, context = (passes * part for part in one)
    data = layout.accumulation * _exposed(sizes, layout, cluster, c, layout.microbatches * sum(one))
    held = sizes.parameters / (layout.tensor * layout.pipeline * layout.parts)
    return Step(
        products=products, attention=attention, memory=memory, host=host, tensor=tensor, context=context, data=data,
        sends=layout.accumulation * _sends(sizes, layout, cluster, c),
        bubble=layout.accumulation * bubbles(layout) * sum(one), optimizer=held * OPTIMIZER_BYTES / cluster.bandwidth,
    )  # fmt: skip


def _sends(sizes: Sizes, layout: StepLayout, cluster: Cluster, c: Constants) -> float:
    """Seconds that a pipeline's rank sends hidden states forward and their gradients back, in one pass, as far as computation does not hide them."""
    if layout.pipeline == 1:
        return 0.0
    size = layout.samples * sizes.length / layout.context * sizes.width / layout.tensor * layout.activation_bytes
    inside = layout.processes // layout.pipeline * 2 <= cluster.cards  # the neighbour is in the same node
    rate, latency = (cluster.link * c.link, cluster.link_latency) if inside else (cluster.network * c.network, cluster.network_latency)
    return c.exposed * 2 * layout.microbatches * layout.stages * (size / rate + latency)


def bubbles(layout: StepLayout) -> float:
    """The time that a rank waits in one pass through the pipeline, in micro-batches of its own work (Narayanan et al. 2021)."""
    if layout.pipeline == 1:
        return 0.0
    idle = (layout.pipeline - 1) / layout.stages
    return idle / 3 if "zero_bubble" in layout.schedule else idle


@cache
def stage_blocks(sizes: Sizes, pipeline: int, per_rank: int) -> tuple[int, int]:
    """Blocks of the fullest rank, and of the rank that has the head as well: the head counts as the blocks that its FLOPs are worth."""
    stages = pipeline * per_rank
    if pipeline == 1:
        return 0, sizes.layers
    worth = sizes.vocabulary * sizes.width / (sizes.block_parameters + 2 * sizes.query_width * sizes.keys_seen)
    best = min(range(1, sizes.layers - stages + 2), key=lambda last: (max(last + worth, -(-(sizes.layers - last) // (stages - 1))), last))
    most = -(-(sizes.layers - best) // (stages - 1))
    return most * per_rank, best + most * (per_rank - 1)


# Seconds of forward and backward of one micro-batch, in the order of the first parts of `Step`.
_Parts = tuple[float, float, float, float, float, float]


class _Work(NamedTuple):
    """What the cost of a block depends on: many layouts share it, so that each is computed once."""

    samples: int
    context: int
    tensor: int
    recomputed: tuple[float, float, float]
    compiled: bool
    float8: bool
    precision: str
    activation_bytes: int
    exchange_bytes: float
    sequence_parallel: bool
    async_tensor: bool
    ulysses: bool

    @classmethod
    def of(cls, layout: StepLayout) -> _Work:
        return cls(*_work(layout))


_work = attrgetter(*_Work.__annotations__)


@cache
def _costs(sizes: Sizes, work: _Work, cluster: Cluster, c: Constants) -> tuple[_Parts, _Parts]:
    return _block(sizes, work, cluster, c), _head(sizes, work, cluster, c)


def _product(outputs: float, inputs: float, tokens: float, rate: float, cluster: Cluster, c: Constants) -> float:
    again = c.rereads * rate / cluster.bandwidth
    return 2 * tokens * outputs * inputs * (1 + again * (1 / outputs + 1 / inputs + 1 / tokens)) / (c.products * rate)


def _block(sizes: Sizes, layout: _Work, cluster: Cluster, c: Constants) -> _Parts:
    n, tokens = layout.tensor, layout.samples * sizes.length / layout.context
    peak = cluster.peak[layout.precision]
    rate = cluster.peak.get("fp8", peak) if layout.float8 else peak
    of_products, of_attention, of_rest = layout.recomputed
    products = sum(
        _product(outputs / n if columns else outputs, inputs if columns else inputs / n, tokens, rate, cluster, c)
        for outputs, inputs, columns in sizes.products
    )
    attention = 4 * sizes.query_width * sizes.keys_seen * tokens / n / (c.attention * peak) * (1 + c.head / sizes.head_width)
    wide, deep = ELEMENTWISE
    numbers = wide * sizes.width / (n if layout.sequence_parallel else 1) + deep * sizes.feed_forward * (1.5 if sizes.gated else 1) / n
    memory = tokens * numbers * layout.activation_bytes / cluster.bandwidth * (c.compiled if layout.compiled else 1)
    host = HOST_OPERATIONS * cluster.host * (c.compiled if layout.compiled else 1)
    busy = (3 + of_products) * products + (3.5 + of_attention) * attention + (3 + of_rest) * memory
    starts = (3 + of_rest) * host * (cluster.sharded if n > 1 else 1)
    waits = starts if cluster.alone else max(0.0, starts - busy)  # a CPU core cannot launch operations and compute at the same time
    exchanges = (TENSOR_EXCHANGES + RECOMPUTED_EXCHANGES * of_products * (of_attention > 0)) * tokens * sizes.width * layout.exchange_bytes
    tensor = _inside(exchanges, TENSOR_EXCHANGES, n, 1, cluster, c) * (1 - c.async_hidden * layout.async_tensor)
    tensor *= (1 + cluster.reduction) / 2  # every second exchange is a reduction
    if cluster.alone and n > 1 and layout.sequence_parallel:  # a core also copies what it gathers and reduces along the tokens
        tensor += 2 * exchanges / cluster.bandwidth
    context = _context(sizes, layout, cluster, c)
    return (3 + of_products) * products, (3.5 + of_attention) * attention, (3 + of_rest) * memory, waits, tensor, context


def _context(sizes: Sizes, layout: _Work, cluster: Cluster, c: Constants) -> float:
    """Seconds in which the ranks of the context axis exchange what a block's attention needs, forward and backward."""
    n, again = layout.tensor, 1 + layout.recomputed[2]
    samples = layout.samples * sizes.length * layout.activation_bytes / n
    if layout.ulysses:  # each of the four is as large as the rank's own tokens, and is sent back as a gradient
        size = samples / layout.context * 2 * (sizes.query_width + sizes.key_width)
        return (1 + again) * _inside(size, ULYSSES_EXCHANGES, layout.context, n, cluster, c)
    keys = 2 * samples * sizes.key_width  # K and V of the whole sequence
    return _inside(again * keys, 1, layout.context, n, cluster, c) + cluster.reduction * _inside(keys, 1, layout.context, n, cluster, c)


def _head(sizes: Sizes, layout: _Work, cluster: Cluster, c: Constants) -> _Parts:
    tokens, n = layout.samples * sizes.length / layout.context, layout.tensor
    products = 3 * _product(sizes.vocabulary / n, sizes.width, tokens, cluster.peak[layout.precision], cluster, c)
    numbers = tokens * sizes.vocabulary / n * LOSS_BYTES * (c.compiled if layout.compiled else 1)
    return products, 0.0, numbers / cluster.bandwidth, 0.0, 0.0, 0.0


def _inside(size: float, calls: float, ranks: int, stride: int, cluster: Cluster, c: Constants) -> float:
    """Seconds to gather or reduce `size` bytes over `ranks` ranks whose numbers are `stride` apart."""
    if ranks == 1:
        return 0.0
    if ranks * stride <= cluster.cards:
        return size * (ranks - 1) / ranks / (cluster.link * c.link) + calls * (ranks - 1) * cluster.link_latency
    here = max(1, cluster.cards // stride)
    nodes = -(-ranks // here)
    between = size * (nodes - 1) / nodes / (here * cluster.network * c.network)
    inside = size * (here - 1) / here / (cluster.link * c.link)
    return max(inside, between) + calls * (nodes * cluster.network_latency + here * cluster.link_latency)


def _exposed(sizes: Sizes, layout: StepLayout, cluster: Cluster, c: Constants, compute: float) -> float:
    """Seconds that gathers and reductions over the data axes add to the `compute` seconds of one pass of an accumulation."""
    held = sizes.parameters / (layout.tensor * layout.pipeline)
    units = sizes.layers / layout.pipeline + 1
    share = 1.0 if layout.reduce_every else 1 / layout.accumulation
    gathers = (2 if layout.reshard else 1 / layout.accumulation) if layout.parts > 1 else 0
    stride = layout.tensor
    time = _inside(held * layout.gather_bytes * gathers, gathers * units, layout.parts, stride, cluster, c)
    time += cluster.reduction * share * _inside(held * layout.reduce_bytes, units, layout.parts, stride, cluster, c)
    if cluster.alone and layout.parts > 1:  # a core also copies what it gathers and reduces between parameters and buffers
        time += 2 * held * (layout.gather_bytes * gathers + layout.reduce_bytes * share) / cluster.bandwidth
    copies = held / layout.parts * layout.reduce_bytes  # each shard is then summed over its replicas: a reduction and a gather
    calls = units if layout.fsdp else 1 + copies // DDP_BUCKET
    time += share * _inside(2 * copies, 2 * calls, layout.replicate, stride * layout.parts, cluster, c)
    return c.exposed * time + max(0.0, (1 - c.exposed) * time - compute)
