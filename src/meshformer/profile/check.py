"""The check of callbacks.profile, which runs before a job starts."""

from __future__ import annotations

from typing import Any

from meshformer.config.errors import ConfigError

KEY = "callbacks.profile.steps"
FIX = "Give the first and the last step to record: callbacks.profile.steps=[20,24]."
MOST = 100  # a trace of so many steps is hundreds of megabytes, and rank 0 reads those of all ranks


def check_steps(steps: Any, max_steps: int | None = None) -> None:
    """ConfigError if `steps` is neither null nor the first and the last step to record, counted from 1 to `max_steps`."""
    if steps is None:
        return
    whole = isinstance(steps, list | tuple) and all(isinstance(step, int) and not isinstance(step, bool) for step in steps)
    if not whole or len(steps) != 2:
        raise ConfigError("must be two whole numbers", KEY, steps, fix=FIX)
    first, last = steps
    if first < 1:
        raise ConfigError("steps are counted from 1", KEY, steps, fix=FIX)
    if last < first:
        raise ConfigError("ends before it begins", KEY, steps, fix=f"Write [{last},{first}].")
    if max_steps is not None and last > max_steps:
        raise ConfigError(f"the run ends at step {max_steps}", KEY, steps, fix=f"Record up to step {max_steps} at most.")
    if last - first >= MOST:
        raise ConfigError(f"records {last - first + 1} steps", KEY, steps, fix=f"A few are enough; at most {MOST} are taken.")


def check_profile(config: dict[str, Any]) -> None:
    """The check of a resolved configuration. A user's callback of that name is not ours to check."""
    node = (config["callbacks"] or {}).get("profile")
    if node and str(node["_target_"]).startswith("meshformer.callbacks."):
        check_steps(node.get("steps"), config["trainer"]["max_steps"])
