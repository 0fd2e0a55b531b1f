"""Pictures of predictions: a step's parts for each layout, and throughput against cards. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from meshformer.plan.answer import degrees_text
from meshformer.plan.candidates import Candidate, Request
from meshformer.plan.scale import Point, fastest

# Okabe and Ito's palette, which colour-blind people can tell apart.
PARTS = {
    "products": ("matrix products", "#0072B2"), "attention": ("attention", "#56B4E9"), "memory": ("memory traffic", "#009E73"),
    "host": ("starting operations", "#999999"), "optimizer": ("optimizer", "#E69F00"), "data": ("FSDP and DDP", "#D55E00"),
    "tensor": ("tensor parallelism", "#CC79A7"), "context": ("context parallelism", "#882255"), "sends": ("pipeline sends", "#AA4499"),
    "bubble": ("pipeline bubble", "#DDDDDD"),
}  # fmt: skip
USUAL = (("replicate",), ("shard",), ("replicate", "shard"), ("shard", "tensor"), ("shard", "pipeline"), ("shard", "context"))
LINES = ("o-", "s--", "^-.", "D:", "v-", "P--", "X-.", "<:")


def draw_steps(rows: Sequence[Candidate], request: Request, path: Path) -> None:
    """One bar a layout, its parts stacked, the fastest at the top."""
    figure = Figure(figsize=(8, 0.9 + 0.38 * len(rows)), layout="constrained")
    axes = figure.subplots()
    labels = [f"{degrees_text(row)}, {row.checkpointing}" for row in rows]
    left = [0.0] * len(rows)
    for part, (name, colour) in PARTS.items():
        widths = [getattr(row.step, part) for row in rows]
        if max(widths) > 0.005 * max(row.step.total for row in rows):
            axes.barh(labels, widths, left=left, color=colour, label=name, edgecolor="white", linewidth=0.5)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel(f"predicted seconds a step on {request.cluster.processes} × {request.cluster.card}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def draw_scale(points: Sequence[Point], request: Request, path: Path) -> None:
    """Throughput a card against cards: weak scaling on the left, strong on the right, one line a kind of layout."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    kinds = list(dict.fromkeys(point.kind for point in points))
    shown = [kind for kind in kinds if kind in USUAL or _is_ever_best(points, kind)]
    for axes, strong in zip(both, (False, True), strict=True):
        for index, kind in enumerate(shown):
            own = sorted((p for p in points if p.kind == kind and p.strong == strong), key=lambda point: point.cards)
            rates = [request.sizes.length * point.tokens_per_second / point.cards for point in own]
            axes.plot([point.cards for point in own], rates, LINES[index % len(LINES)], label=" × ".join(kind) or "one card", markersize=4)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(sorted({point.cards for point in points}))
        axes.set_title("strong scaling: the batch stays" if strong else "weak scaling: the batch grows with the cards", fontsize=10)
        axes.set_xlabel("cards")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    both[0].set_ylabel("predicted tokens a second of a card")
    both[0].set_ylim(bottom=0)
    both[1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def _is_ever_best(points: Sequence[Point], kind: tuple[str, ...]) -> bool:
    return any(
        (best := fastest(points, cards, strong)) is not None and best.kind == kind
        for cards in {point.cards for point in points}
        for strong in (False, True)
    )
