"""What the imports of a job cost, with the garbage collector paused and as Python does them."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence

from meshformer.printing import say

TIMES = 5
WAYS = {
    "collected": "import meshformer.job.train",
    "paused": "from meshformer.importing import heavy_imports\nwith heavy_imports():\n    import meshformer.job.train",
}


def report_startup(options: argparse.Namespace) -> None:
    """Print the CPU seconds of a process that imports what a job needs and ends, either way, and their ratio."""
    seconds = dict[str, list[float]]({name: [] for name in WAYS})
    for _ in range(TIMES + 1):
        for name, code in WAYS.items():
            seconds[name].append(cpu_seconds([sys.executable, "-c", code]))
    medians = {name: statistics.median(found[1:]) for name, found in seconds.items()}  # without the first, which may compile the sources
    for name, median in medians.items():
        say(f"  {name:<12}{median:6.2f} CPU-seconds  ({min(seconds[name][1:]):.2f} to {max(seconds[name][1:]):.2f} in {TIMES} processes)")
    say(f"  ratio       {medians['collected'] / medians['paused']:6.2f}")


def cpu_seconds(command: Sequence[str]) -> float:
    """CPU seconds of a process from start to end. CalledProcessError if it fails."""
    before = os.times()
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system
