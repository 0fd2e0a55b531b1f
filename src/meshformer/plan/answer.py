"""What `plan` says: the override to type, the reasons, and what would make an impossible request possible. Without torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from meshformer.plan.candidates import Candidate, Request, candidates
from meshformer.plan.cluster import Cluster
from meshformer.plan.memory import estimate
from meshformer.plan.sizes import Sizes
from meshformer.plan.steptime import step_time

# Layouts with a file in conf/strategy/, by the axes that they use, and the degrees that differ from the file's.
NAMED = {
    (): "single", ("replicate",): "ddp", ("shard",): "fsdp", ("tensor",): "tensor", ("pipeline",): "pipeline", ("context",): "context",
    ("replicate", "shard"): "hsdp", ("shard", "tensor"): "fsdp_tensor", ("shard", "context"): "fsdp_context",
    ("shard", "pipeline"): "fsdp_pipeline", ("tensor", "pipeline"): "tensor_pipeline",
}  # fmt: skip
OPEN = {"ddp": "replicate", "fsdp": "shard", "hsdp": "shard", "fsdp_tensor": "shard", "fsdp_context": "shard", "fsdp_pipeline": "shard"}
OPEN |= {"tensor": "tensor", "pipeline": "pipeline", "context": "context"}
FILES = {"replicate": 2, "tensor": 2, "context": 2, "pipeline": 2}  # the degrees that those files give
TWICE = 2
MOST_DOUBLINGS = 8


def degrees_text(candidate: Candidate) -> str:
    """`shard 16 × tensor 4`."""
    layout = candidate.layout
    axes = [f"{axis} {degree}" for axis in ("replicate", "shard", "context", "tensor", "pipeline") if (degree := getattr(layout, axis)) > 1]
    return " × ".join(axes) or "one card"


def overrides(candidate: Candidate, request: Request) -> list[str]:
    """The settings that make `meshformer train` use this layout."""
    layout, cluster = candidate.layout, request.cluster
    axes = tuple(axis for axis in ("replicate", "shard", "context", "tensor", "pipeline") if getattr(layout, axis) > 1)
    name = NAMED.get(axes, "mesh")
    found = [f"strategy={name}"]
    for axis in axes:
        degree = getattr(layout, axis)
        if axis != OPEN.get(name) and not (name != "mesh" and FILES.get(axis) == degree):
            found.append(f"strategy.{axis}={degree}")
    if layout.processes > 1:
        nodes = -(-layout.processes // cluster.cards)
        found.append(f"trainer.devices={layout.processes // nodes}")
        if nodes > 1:
            found.append(f"trainer.num_nodes={nodes}")
    if layout.accumulation > 1:
        found.append(f"trainer.accumulate_grad_batches={layout.accumulation}")
    if layout.reduce_every:
        found.append("strategy.reduce_gradients=every")
    if candidate.checkpointing != "none":
        found.append(f"strategy.activation_checkpointing={candidate.checkpointing}")
    if layout.pipeline > 1:
        if layout.schedule != "1f1b":
            found.append(f"strategy.schedule={layout.schedule}")
        found.append(f"strategy.microbatches={layout.microbatches}")
    return found


def throughput(candidate: Candidate, sizes: Sizes) -> float:
    """Tokens a second of all cards together."""
    return candidate.layout.batch * sizes.length / candidate.step.total


def mfu(candidate: Candidate, sizes: Sizes, cluster: Cluster) -> float:
    """Model FLOPs utilisation: the model's FLOPs/s (without recomputation) divided by the peak FLOP/s of all cards."""
    layout = candidate.layout
    rate = throughput(candidate, sizes) * sizes.flops_per_token
    return rate / (layout.processes * cluster.peak[layout.precision])


def budget(candidate: Candidate, request: Request, tokens: float) -> tuple[float, float]:
    """(seconds, watt-hours of the cards at full power) for a number of tokens."""
    seconds = tokens / throughput(candidate, request.sizes)
    return seconds, seconds / 3600 * candidate.layout.processes * request.cluster.power


def best_of_each(found: Sequence[Candidate]) -> list[Candidate]:
    """The first candidate of each combination of degrees, in the same order."""
    seen: set[object] = set()
    return [c for c in found if c.degrees not in seen and not seen.add(c.degrees)]


def why(candidate: Candidate, others: Sequence[Candidate], request: Request) -> list[str]:
    """Five sentences on the choice."""
    sizes, cluster, layout, step = request.sizes, request.cluster, candidate.layout, candidate.step
    parts = {
        "matrix products": step.products, "attention": step.attention, "moving activations": step.memory, "starting operations": step.host,
        "exchanges of tensor parallelism": step.tensor, "exchanges of context parallelism": step.context,
        "gathers and reductions of parameters": step.data, "waiting in the pipeline": step.bubble, "sends of the pipeline": step.sends,
        "the optimizer": step.optimizer,
    }  # fmt: skip
    shares = sorted(((seconds / step.total, name) for name, seconds in parts.items()), reverse=True)
    said = ", ".join(f"{100 * share:.0f} % {name}" for share, name in shares[:3] if share >= 0.01)
    sentences = [f"Of a step of {duration(step.total)}, {said}: what limits it is {LIMITS[step.limit]}."]
    state = (8 + request.optimizer_bytes) * sizes.parameters
    if state > 0.9 * cluster.memory:
        sentences.append(
            f"Weights, gradients and optimizer state take about {gigabytes(state)} and a card has {gigabytes(cluster.memory)}, "
            f"so they are spread over {layout.parts * layout.tensor * layout.pipeline} cards."
        )
    else:
        one = f"one card of {gigabytes(cluster.memory)} holds"
        sentences.append(f"Weights, gradients and optimizer state take about {gigabytes(state)}, which {one}.")
    sentences.append(_why_axes(layout.tensor, layout.pipeline, cluster))
    sentences.append(_why_checkpointing(candidate, request))
    rival = next((c for c in best_of_each(others) if c.degrees != candidate.degrees), None)
    if rival is None:
        sentences.append("No other layout was possible.")
    elif not rival.fits:
        sentences.append(f"The next layout, {degrees_text(rival)}, would need {gigabytes(rival.memory.total)} a card and does not fit.")
    else:
        sentences.append(
            f"The next layout, {degrees_text(rival)}, is predicted at {duration(rival.step.total)} "
            f"({100 * (rival.step.total / step.total - 1):+.0f} %); differences below 3 % are less than the prediction's own error, "
            "and then fewer axes win."
        )
    return sentences


LIMITS = {
    "compute": "the cards' matrix rate", "memory": "the bandwidth of the cards' memory", "link": "communication",
    "launches": "the host, which starts too many small operations", "bubble": "the pipeline's bubble",
}  # fmt: skip


def _why_axes(tensor: int, pipeline: int, cluster: Cluster) -> str:
    if tensor == pipeline == 1:
        return "Neither tensor nor pipeline parallelism is needed: communication of parameters and gradients is cheap beside the computation."
    said = []
    if tensor > 1:
        said.append(f"tensor parallelism stays within {tensor} of the {cluster.cards} cards of a node, where links are fast")
    if pipeline > 1:
        said.append(f"the {pipeline} pipeline stages exchange only hidden states, which the network between nodes carries easily")
    text = ", and ".join(said)
    return text[0].upper() + text[1:] + "."


def _why_checkpointing(candidate: Candidate, request: Request) -> str:
    layout = candidate.layout
    if candidate.checkpointing == "none":
        return f"Activations fit as they are ({gigabytes(candidate.memory.total)} a card in all), so nothing is computed twice."
    without = replace(layout, recomputed=(0.0, 0.0, 0.0))
    memory = estimate(request.sizes, without, "none", request.optimizer_bytes, layout.precision == "bf16")
    slower = candidate.step.total / step_time(request.sizes, without, request.cluster, request.constants).total - 1
    return (
        f"Without activation checkpointing a card would hold {gigabytes(memory.total)}; with strategy.activation_checkpointing="
        f"{candidate.checkpointing} it holds {gigabytes(candidate.memory.total)} and the step takes {100 * slower:.0f} % longer."
    )


def remedies(request: Request) -> list[str]:
    """What would make a request possible that no layout satisfies, the cheapest first: at most three ways."""
    found = []
    for text, changed in _changes(request):
        fitting = candidates(changed, only_fitting=True)
        if fitting:
            found.append(text.format(best=" ".join(overrides(fitting[0], changed)), checkpointing=fitting[0].checkpointing))
        if len(found) == 3 or (fitting and changed.cluster.nodes > request.cluster.nodes):
            break  # larger clusters would not be cheaper
    return found


def _changes(request: Request) -> Iterator[tuple[str, Request]]:
    fixed = request.fixed
    axes = {"replicate", "shard", "context", "tensor", "pipeline"}
    if "accumulation" in fixed:
        yield "smaller micro-batches ({best})", replace(request, fixed={k: v for k, v in fixed.items() if k != "accumulation"})
    if "activation_checkpointing" in fixed:
        less = {k: v for k, v in fixed.items() if k not in ("activation_checkpointing", "accumulation")}
        yield "strategy.activation_checkpointing={checkpointing} ({best})", replace(request, fixed=less)
    if axes & fixed.keys():
        yield "another layout ({best})", replace(request, fixed={})
    batch = request.config["data"]["batch_size"]
    for larger in _larger(batch, request.cluster.processes):
        data = {**request.config["data"], "batch_size": larger}
        yield f"data.batch_size={larger} ({{best}})", replace(request, config={**request.config, "data": data})
    nodes = request.cluster.nodes
    for doubling in range(1, MOST_DOUBLINGS + 1):
        more = nodes * TWICE**doubling
        yield f"cluster.nodes={more}, that is {more * request.cluster.cards} cards ({{best}})", replace(
            request, cluster=replace(request.cluster, nodes=more)
        )


def _larger(batch: int, processes: int) -> list[int]:
    """The next batch size that divides over all cards, if this one does not."""
    return [] if batch % processes == 0 else [-(-batch // processes) * processes]


def gigabytes(size: float) -> str:
    """Bytes as GB (10^9), with two digits or more."""
    return f"{size / 1e9:,.0f} GB" if size >= 1e10 else f"{size / 1e9:.2g} GB"


def duration(seconds: float) -> str:
    """Format seconds as a duration, such as `3.2 h`."""
    for limit, unit, name in ((1e-1, 1e-3, "ms"), (120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 86400:,.1f} days"
