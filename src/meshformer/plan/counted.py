"""Counts the memory of layouts with live_memory.py, in other processes. Without torch in this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from meshformer.config.errors import ConfigError

Config = dict[str, Any]
FAILED = "the memory of this layout could not be counted"


@dataclass(frozen=True)
class LiveMemory:
    """Live bytes of one rank during its second step. `where`: the phase of the peak, such as "backward of blocks.3", "loss" or "optimizer".

    `kinds`: the bytes of the peak by kind (live_bytes.KINDS). Communication is what FSDP gathers and buffers of collectives; DDP's buckets are its
    gradients and count as these. `start`, `end`: live before and after the step. `reserved`: what PyTorch's allocator on a GPU would reserve
    for these two steps (reserve.py), as `max_memory_reserved` shows it. `seconds`: what the computation took. `highest`: the bytes by kind of every
    phase at its own highest moment; left out where shortened.py counted.
    """

    rank: int
    peak: int
    where: str
    kinds: dict[str, int]
    start: int
    end: int
    reserved: int
    seconds: float
    highest: dict[str, dict[str, int]] = field(default_factory=dict)


def live_memory_apart(config: Config, rank: int = 0, timeout: float = 600.0) -> LiveMemory:
    """`live_memory` of the whole model in a process of its own. Raises ConfigError, or RuntimeError if it fails."""
    found = _apart([(config, rank)], 1, True, timeout)[0]
    if isinstance(found, Exception):
        raise found
    return found


def count_all(configs: Sequence[tuple[Config, Sequence[int]]], at_once: int, timeout: float = 600.0) -> list[LiveMemory | str]:
    """The rank that needs most of the given ranks of each configuration, or the reason why it could not be counted.

    Deep models are counted on shorter ones (shortened.py).
    """
    jobs = [(config, rank) for config, ranks in configs for rank in ranks]
    every = iter(_apart(jobs, at_once, False, timeout))
    answers: list[LiveMemory | str] = []
    for _, ranks in configs:
        found = [next(every) for _ in ranks]
        failed = [str(one) for one in found if isinstance(one, Exception)]
        counted = [one for one in found if not isinstance(one, Exception)]
        answers.append(failed[0] if failed else max(counted, key=lambda one: one.peak))
    return answers


def _apart(jobs: Sequence[tuple[Config, int]], at_once: int, whole: bool, timeout: float) -> list[LiveMemory | ConfigError | RuntimeError]:
    """Every job's answer from one process (counting.py), which imports torch once and forks for each job."""
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_", "SLURM_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(launched)}
    command = [sys.executable, "-m", "meshformer.plan.counting", "--at-once", str(max(1, at_once)), "--timeout", str(timeout)]
    given = json.dumps({"jobs": jobs, "whole": whole})
    done = subprocess.run(command, input=given, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        return [RuntimeError(f"{FAILED}: {last[0]}") for _ in jobs]
    return [_answer(answer) for answer in json.loads(lines[-1])]


def _answer(answer: dict[str, Any]) -> LiveMemory | ConfigError | RuntimeError:
    if "found" in answer:
        return LiveMemory(**answer["found"])
    if "refused" in answer:
        return ConfigError(**answer["refused"])
    return RuntimeError(f"{FAILED}: {answer['failed']}")
