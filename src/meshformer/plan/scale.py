"""Predicts throughput against the number of cards, for each kind of layout, and where each stops paying. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from meshformer.config.degrees import AXES
from meshformer.config.errors import ConfigError
from meshformer.plan.candidates import Candidate, Request, candidates

PAYS = 0.05  # a layout pays while it is at most this much slower than the best one


@dataclass(frozen=True)
class Point:
    """The best candidate of one kind of layout on one number of cards. `strong`: the batch size is fixed; else it grows with the cards."""

    cards: int
    strong: bool
    kind: tuple[str, ...]  # axes in use
    candidate: Candidate

    @property
    def tokens_per_second(self) -> float:
        layout = self.candidate.layout
        return layout.batch / self.candidate.step.total


def read_counts(text: str, per_node: int) -> list[int]:
    """The numbers of cards of `--scale 8,64,512`: each at most a node, or whole nodes. ConfigError otherwise."""
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise ConfigError("must be numbers of cards", "--scale", text, fix="For example --scale 8,64,512.") from None
    for count in counts:
        if count < 1 or (count > per_node and count % per_node):
            raise ConfigError(f"a node has {per_node} cards, and {count} is no whole number of nodes", "--scale", text)
    return counts


def scaled(request: Request, counts: Sequence[int]) -> list[Point]:
    """The best fitting candidate of each kind for each number of cards, weak and strong."""
    points = []
    batch = request.config["data"]["batch_size"]
    for strong in (False, True):
        for count in counts:
            nodes = max(1, count // request.cluster.cards)
            cluster = replace(request.cluster, nodes=nodes, cards=min(count, request.cluster.cards))
            samples = batch if strong else max(1, batch // counts[0]) * count
            data = {**request.config["data"], "batch_size": samples}
            here = replace(request, cluster=cluster, config={**request.config, "data": data})
            best: dict[tuple[str, ...], Candidate] = {}
            for candidate in candidates(here):
                kind = tuple(axis for axis in AXES if getattr(candidate.layout, axis) > 1)
                if candidate.fits and (kind not in best or candidate.step.total < best[kind].step.total):
                    best[kind] = candidate
            points += [Point(count, strong, kind, candidate) for kind, candidate in best.items()]
    return points


def fastest(points: Sequence[Point], cards: int, strong: bool) -> Point | None:
    """The fastest of all kinds on that many cards; of two within 3 %, the one with fewer axes (the candidates' own order)."""
    here = [point for point in points if (point.cards, point.strong) == (cards, strong)]
    return max(here, key=lambda point: point.tokens_per_second, default=None)


def pays_up_to(points: Sequence[Point], kind: tuple[str, ...], strong: bool) -> int | None:
    """The largest number of cards at which this kind is at most 5 % slower than the best; None if it never is."""
    own = {point.cards: point for point in points if point.kind == kind and point.strong == strong}
    paying = [
        cards for cards, point in own.items()
        if (best := fastest(points, cards, strong)) is not None and point.tokens_per_second >= (1 - PAYS) * best.tokens_per_second
    ]  # fmt: skip
    return max(paying, default=None)
