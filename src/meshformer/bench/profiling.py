"""Measure what recording steps costs: steps of the same run with and without callbacks.profile's recorder."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from meshformer.config.foreign import read_config
from meshformer.record.metrics_csv import read_metrics

ROUNDS = 3
SETTINGS = [
    "trainer.max_steps=30", "trainer.limit_val_batches=1",
    "trainer.log_every_n_steps=5", "trainer.progress=false", "trainer.compile=false", "~callbacks.samples",
    "callbacks.profile.steps=[13,22]",
]  # fmt: skip
SIZES = {
    "default recipe, one process": ["model=nano"],
    "default recipe, fsdp on two processes": ["model=nano", "strategy=fsdp", "trainer.devices=2", "trainer.threads=1"],
}


def report_profile(options: argparse.Namespace) -> None:
    """Print ms a step before, during and after the recorded steps of one run: rows 10, 20 and 30, whose five steps are of one kind each."""
    for name, settings in SIZES.items():
        shares, steps = [], []
        for memory in (True, False):
            for _ in range(ROUNDS):
                before, during, after = _milliseconds([*settings, f"callbacks.profile.memory={str(memory).lower()}"], options.threads)
                plain = (before + after) / 2
                steps.append(plain)
                shares.append((memory, during / plain - 1))
        with_memory, without = (statistics.median(share for kind, share in shares if kind is memory) for memory in (True, False))
        plain = statistics.median(steps)
        print(f"  {name:<40}{plain:7.1f} ms a step; recorded {with_memory:+.1%}, without allocations {without:+.1%}", flush=True)


def _milliseconds(settings: list[str], threads: int) -> list[float]:
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        threads_of = [] if any(word.startswith("trainer.threads") for word in settings) else [f"trainer.threads={threads}"]
        command = [sys.executable, "-m", "meshformer.cli", "train", *SETTINGS, *threads_of, *settings, f"hydra.run.dir={run}"]
        subprocess.run(command, check=True, capture_output=True)
        rows = {row["step"]: row for row in read_metrics(run / "metrics.csv")}
        data = read_config(run)["data"]
        tokens = data["batch_size"] * data["context_length"]
        return [1e3 * tokens / float(rows[step]["train/tokens_per_second"]) for step in (10, 20, 30)]
