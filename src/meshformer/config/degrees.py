"""The parallel degrees of a layout. Used by the configuration, the device mesh and the strategy, so it does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import gcd, prod
from typing import Any

from meshformer.config.errors import ConfigError


@dataclass(frozen=True)
class Degrees:
    """The degree of every mesh axis; their product is the number of processes. One may be -1, to be inferred from the others by `resolved`."""

    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    pipeline: int = 1

    @classmethod
    def from_config(cls, strategy: dict[str, Any]) -> Degrees:
        """The degrees of a `strategy` config node, whose other keys are ignored."""
        return cls(**{axis: strategy[axis] for axis in AXES if axis in strategy})

    def __str__(self) -> str:
        return " × ".join(f"{axis} {getattr(self, axis)}" for axis in AXES)

    @property
    def processes(self) -> int:
        return prod(getattr(self, axis) for axis in AXES)

    @property
    def data(self) -> int:
        """The number of slices that a batch is split into."""
        return self.replicate * self.shard

    @property
    def fixed(self) -> int:
        """The product of all degrees other than -1."""
        return prod(getattr(self, axis) for axis in AXES if getattr(self, axis) != -1)

    @property
    def open_axis(self) -> str | None:
        """The axis with degree -1, or None. Raises ConfigError if there are two."""
        names = [axis for axis in AXES if getattr(self, axis) == -1]
        if len(names) > 1:
            both = " and ".join(f"strategy.{name}" for name in names)
            raise ConfigError(
                f"only one degree can be inferred from the others, and {both} are -1", f"strategy.{names[1]}", -1, "Give it a number."
            )
        return names[0] if names else None

    def resolved(self, processes: int, num_nodes: int = 1) -> Degrees:
        """Replace the -1 by a number. Raises ConfigError if the product then differs from the number of processes."""
        axis = self.open_axis
        if axis is not None and processes % self.fixed == 0:
            return replace(self, **{axis: processes // self.fixed})
        if axis is None and processes == self.fixed:
            return self
        there = f"there {'is 1 process' if processes == 1 else f'are {processes} processes'}"
        product = f"{self} {'=' if axis is None else 'is a multiple of'} {self.fixed}"
        message = f"{product}, but {there} (trainer.devices={processes // num_nodes} × trainer.num_nodes={num_nodes})"
        at, fix = self._suggestions(processes, num_nodes)
        raise ConfigError(message, f"strategy.{at}", getattr(self, at), fix)

    def _suggestions(self, processes: int, num_nodes: int) -> tuple[str, str]:
        """Return the axis to name in the error and a sentence with settings, each of which would make the product right."""
        fixed, least = self.fixed, self.fixed // gcd(self.fixed, num_nodes)  # least: processes per node without a -1 axis; with one, their divisor
        below = processes // num_nodes // least * least
        devices = [n for n in (below, below + least) if n] if self.open_axis else [least] if least * num_nodes == fixed else []
        ways = ["trainer.devices=" + " or ".join(str(n) for n in devices)] if devices else []
        axes = sorted((axis for axis in AXES if getattr(self, axis) != -1), key=lambda axis: getattr(self, axis) == 1)
        for axis in axes:
            degree = getattr(self, axis)
            rest, odd = divmod(processes, fixed // degree)
            if not odd:
                ways.insert(0, f"strategy.{axis}={gcd(rest, degree)}" if self.open_axis else f"strategy.{axis}={rest} or -1")
                return axis, f"Use {', or '.join(ways)}."
        return axes[0], f"Use {', or '.join(ways or [f'trainer.num_nodes=1 trainer.devices={fixed}'])}."


AXES = tuple(field.name for field in fields(Degrees))


def uses_fsdp(strategy: dict[str, Any]) -> bool:
    """Whether FSDP manages the parameters, for a `strategy` node with resolved degrees: either an axis shards or replicates them, or a setting
    other than `auto` needs a feature of FSDP."""
    if strategy["name"] in ("single", "ddp"):
        return False
    asked = strategy["cpu_offload"] or any(strategy[key] not in ("auto", None) for key in ("param_dtype", "reduce_dtype"))
    cut = strategy["shard"] * strategy["context"] > 1 or (strategy["replicate"] > 1 and strategy["pipeline"] == 1)
    return asked or cut
