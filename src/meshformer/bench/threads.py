"""What a busy core costs a training with a thread for each core, with OpenMP's usual spinning and with ours."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from meshformer.importing import SPINS
from meshformer.printing import say
from meshformer.record.metrics_csv import read_metrics

USUAL = "300000"  # libgomp's own value
ROUNDS, STEPS = 2, 30
RECIPE = (
    "trainer.log_every_n_steps=10", "trainer.limit_val_batches=1", "trainer.progress=false", "logger=csv", "~callbacks.samples",
    "~callbacks.checkpoint", f"trainer.max_steps={STEPS}",
)  # fmt: skip


def report_threads(options: argparse.Namespace) -> None:
    """Print tokens/s of the default recipe with our setting relative to the usual one: on a quiet machine, and beside a busy program."""
    for name, busy in (("quiet", 0), ("one core busy", 1)):
        found = dict[str, list[float]]({USUAL: [], SPINS: []})
        with busy_programs(busy):
            for _ in range(ROUNDS):
                for spins, speeds in found.items():
                    speeds.append(tokens_a_second(spins))
        usual, ours = (statistics.median(speeds) for speeds in found.values())
        say(f"  {name:<14} usual {usual:8,.0f} tokens/s, ours {ours:8,.0f}, ratio {ours / usual:.2f}")


@contextmanager
def busy_programs(number: int) -> Iterator[None]:
    """`number` programs that compute without end, while the block runs."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def tokens_a_second(spins: str) -> float:
    """Of the last steps of a short run of the default recipe, with GOMP_SPINCOUNT=`spins`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "meshformer.cli", "train", f"hydra.run.dir={folder}/run", *RECIPE]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "GOMP_SPINCOUNT": spins})
        return float(read_metrics(Path(folder) / "run/metrics.csv")[-1]["train/tokens_per_second"])
