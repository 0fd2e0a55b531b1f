"""Counts the memory of layouts with live_memory.py, each in a process of its own. Without torch in this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from meshformer.config.errors import ConfigError

Config = dict[str, Any]
REFUSED = 2  # exit code for a ConfigError


@dataclass(frozen=True)
class LiveMemory:
    """Live bytes of one rank during its second step. `where`: the phase of the peak, such as "backward of blocks.3", "loss" or "optimizer".

    `kinds`: the bytes of the peak by kind (live_bytes.KINDS). Communication is what FSDP gathers and buffers of collectives; DDP's buckets are its
    gradients and count as these. `start`, `end`: live before and after the step. `reserved`: what PyTorch's allocator on a GPU would reserve
    for these two steps (reserve.py), as `max_memory_reserved` shows it. `seconds`: what the computation took.
    """

    rank: int
    peak: int
    where: str
    kinds: dict[str, int]
    start: int
    end: int
    reserved: int
    seconds: float


def live_memory_apart(config: Config, rank: int = 0, timeout: float = 600.0) -> LiveMemory:
    """`live_memory` in a process of its own, so that several can run side by side. Raises ConfigError, or RuntimeError if it fails."""
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_", "SLURM_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(launched)}
    command = [sys.executable, "-m", "meshformer.plan.live_memory", "--rank", str(rank)]
    done = subprocess.run(command, input=json.dumps(config), env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
    if done.returncode == REFUSED:
        raise ConfigError(**json.loads(last[0]))
    if done.returncode:
        raise RuntimeError(f"the memory of this layout could not be counted: {last[0]}")
    return LiveMemory(**json.loads(done.stdout.strip().splitlines()[-1]))


def count_all(configs: Sequence[tuple[Config, Sequence[int]]], at_once: int) -> list[LiveMemory | str]:
    """For each configuration the result of the given rank with the highest peak, or the reason why it could not be counted."""

    def fullest(item: tuple[Config, Sequence[int]]) -> LiveMemory | str:
        config, ranks = item
        try:
            return max((live_memory_apart(config, rank) for rank in ranks), key=lambda found: found.peak)
        except (ConfigError, RuntimeError, subprocess.TimeoutExpired) as error:
            return str(error)

    with ThreadPoolExecutor(max(1, at_once)) as pool:
        return list(pool.map(fullest, configs))
