"""A cluster as `plan` sees it: what one card computes, holds and sends. Read from conf/cluster/*.yaml, without torch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from meshformer.config.errors import ConfigError
from meshformer.config.suggest import did_you_mean

TERA, GIGA, MICRO = 1e12, 1e9, 1e-6
UNITS = {"memory": GIGA, "bandwidth": GIGA, "link": GIGA, "network": GIGA, "link_latency": MICRO, "network_latency": MICRO}
MAY_BE_ZERO = ("link_latency", "network_latency", "power", "host")
MEASURED = ("reduction", "sharded", "alone")
PRECISIONS = ("fp32", "bf16", "fp8")


@dataclass(frozen=True)
class Cluster:
    """`nodes` nodes of `cards` equal cards, in SI units (bytes, bytes/s, FLOP/s, seconds, watts).

    `peak`: dense matrix rate by precision; `bandwidth`: of a card's memory; `link`: what a card sends to the others of its node, one way;
    `network`: the same to other nodes; `host`: seconds the host needs to start one operation. Measured for the cores of a CPU: `reduction` and
    `sharded`, how many times as long a reduction takes as a gather, and starting an operation on a DTensor as on a plain tensor; `alone`, how many
    times as fast as one core a single process is that uses them all (0 where cards are not cores).
    """

    card: str
    cards: int
    nodes: int
    memory: float
    peak: dict[str, float]
    bandwidth: float
    link: float
    network: float
    link_latency: float
    network_latency: float
    power: float
    host: float
    reduction: float = 1.0
    sharded: float = 1.0
    alone: float = 0.0

    def __hash__(self) -> int:  # `peak` is a dict
        return hash((self.card, self.cards, self.nodes, self.bandwidth))

    @property
    def processes(self) -> int:
        return self.cards * self.nodes

    def one_process(self) -> Cluster:
        """The cores of a CPU as one card, that of a single process which uses them all."""
        rates = {name: rate * self.alone for name, rate in self.peak.items()}
        return replace(self, cards=1, nodes=1, memory=self.memory * self.cards, peak=rates, bandwidth=self.bandwidth * self.alone, alone=0.0)


def read_cluster(node: dict[str, Any]) -> Cluster:
    """The cluster of a `cluster` config node, in whose units (GB, GB/s, Tflop/s, µs, W) people read datasheets.

    Raises ConfigError for a key that is missing or unknown and for a number that cannot be one.
    """
    known = [field.name for field in fields(Cluster)]
    for key in node:
        if key not in known:
            raise ConfigError("a cluster has no such setting", f"cluster.{key}", fix=did_you_mean(str(key), known))
    for key in known:
        if node.get(key) is None and key not in MEASURED:
            raise ConfigError("a cluster needs it", f"cluster.{key}", fix=f"Add cluster.{key}=…, or start from cluster=h100x8.")
    for key in ("cards", "nodes"):
        if not isinstance(node[key], int) or isinstance(node[key], bool) or node[key] < 1:
            raise ConfigError("must be a whole number of at least 1", f"cluster.{key}", node[key])
    for key in (*UNITS, "power", "host"):
        _number(node[key], f"cluster.{key}", key in MAY_BE_ZERO)
    if not isinstance(node["peak"], dict) or not node["peak"]:
        raise ConfigError("must give a rate by precision", "cluster.peak", node["peak"], fix="For example cluster.peak.bf16=989.")
    for name, rate in node["peak"].items():
        if name not in PRECISIONS:
            raise ConfigError("is not a precision", f"cluster.peak.{name}", fix=did_you_mean(str(name), PRECISIONS))
        _number(rate, f"cluster.peak.{name}", False)
    scaled = {key: node[key] * unit for key, unit in UNITS.items()}
    return Cluster(**{**node, **scaled, "host": node["host"] * MICRO, "peak": {name: rate * TERA for name, rate in node["peak"].items()}})


def _number(value: Any, key: str, may_be_zero: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError("must be a number", key, value)
    if value < 0 or (value == 0 and not may_be_zero):
        raise ConfigError("must be above 0", key, value)
