"""Measure the overhead of the sweep launchers: seconds added per job, and jobs per hour compared with Hydra's basic launcher."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMON = [
    "data=shakespeare", "trainer.precision=32-true", "trainer.progress=false", "trainer.val_check_interval=100000", "logger=csv",
    "~callbacks.samples", "trainer.limit_val_batches=2",
]  # fmt: skip
SHORT = ["model=nano", "model.n_layers=1", "model.d_model=32", "data.context_length=32", "trainer.max_steps=5"]
LONGER = ["model=nano", "data.context_length=64", "trainer.max_steps=60"]
FEW, MANY, ROUNDS = 1, 7, 3
LAUNCHERS = {
    "local": ["hydra/launcher=local"],
    "local, a new interpreter for each job": ["hydra/launcher=local", "hydra.launcher.warm=false"],
    "Hydra's basic launcher": ["hydra/launcher=basic"],
}


def report_sweep_overhead(options: argparse.Namespace) -> None:
    """Print the seconds of one more short job in a grid (one at a time, one thread), and of the same job without a launcher."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        work = [*COMMON, *SHORT, "trainer.threads=1", f"paths.runs={folder}/runs"]
        command = statistics.median(_seconds(["train", *work, f"hydra.run.dir={folder}/bare{n}"]) for n in range(ROUNDS))
        print(f"  {'the job as a command of its own':<40}{command:7.2f} s")
        bare = _bare_job(work, folder)
        print(f"  {'the job in a process that is warm':<40}{bare:7.2f} s  (training, checkpoint, validation, record: no launcher)")
        for name, launcher in LAUNCHERS.items():
            few, many = (
                statistics.median(_seconds(["train", "-m", *work, "sweep.jobs=1", *launcher, _seeds(count)]) for _ in range(ROUNDS))
                for count in (FEW, MANY)
            )
            each = (many - few) / (MANY - FEW)
            print(f"  {name:<40}{each:7.2f} s for one more job, {each - bare:+.2f} s over the warm job; {few:.1f} s for a grid of one")


def report_grid(options: argparse.Namespace) -> None:
    """Print jobs per hour for eight jobs of a few seconds on all cores, with each launcher's own choice of threads and concurrent jobs."""
    with tempfile.TemporaryDirectory() as scratch:
        for name, launcher in LAUNCHERS.items():
            seconds = _seconds(["train", "-m", *COMMON, *LONGER, f"paths.runs={scratch}/runs", *launcher, _seeds(8)])
            print(f"  {name:<40}{8 * 3600 / seconds:7.0f} jobs an hour  ({seconds:.1f} s for 8, start-up included)")


def _seeds(count: int) -> str:
    return "seed=" + ",".join(str(seed) for seed in range(count))


def _seconds(words: list[str]) -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", "meshformer.cli", *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begun


BARE = """
import sys, time, statistics
from pathlib import Path
from meshformer.command.compose import compose
from meshformer.job.train import train
folder, rounds, *overrides = sys.argv[1:]
times = []
for n in range(int(rounds) + 1):
    run = Path(folder) / f"warm{n}"
    run.mkdir()
    config = compose(overrides)
    begun = time.perf_counter()
    train(config, run)
    times.append(time.perf_counter() - begun)
print("seconds", statistics.median(times[1:]))
"""


def _bare_job(work: list[str], folder: Path) -> float:
    done = subprocess.run([sys.executable, "-c", BARE, str(folder), str(ROUNDS), *work], check=True, capture_output=True, text=True)
    return float(done.stdout.rsplit("seconds", 1)[1])
