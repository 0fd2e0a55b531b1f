"""Refuse numbers outside the valid range of a setting before anything is allocated. Each package defines its own ranges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from meshformer.config.errors import ConfigError

Config = dict[str, Any]
Range = tuple[float, bool, float, bool]  # lower bound, whether it is included, upper bound, whether it is included


def check_ranges(config: Config, ranges: Mapping[str, Range]) -> None:
    """Raise ConfigError for the first number outside its range. Settings that are absent, null or not numbers are skipped."""
    for key, (low, low_counts, high, high_counts) in ranges.items():
        value = setting(config, key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if not ((value > low or (low_counts and value == low)) and (value < high or (high_counts and value == high))):
            raise ConfigError(f"must be {_range(low, low_counts, high, high_counts)}", key, value)


def setting(config: Config, key: str) -> Any:
    """Return the value of a dotted key, or None if it is absent."""
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _range(low: float, low_counts: bool, high: float, high_counts: bool) -> str:
    lowest = f"at least {low:g}" if low_counts else f"above {low:g}"
    return lowest if high == math.inf else f"{lowest} and {'at most' if high_counts else 'below'} {high:g}"
