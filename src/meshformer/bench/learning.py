"""Measure loss against training time: a fixed small setting, the speed-run, and fine-tuning against two alternatives.

Each measurement runs the command a user would type in another process and reads its run folder.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from meshformer.record.metrics_csv import read_metrics

FIXED = [
    "model=nano", "model.n_layers=4", "data.context_length=64", "data.batch_size=12", "trainer.max_steps=2000", "trainer.val_check_interval=2000",
    "logger=csv", "~callbacks.samples",
]  # fmt: skip
PLAIN = [
    "model.norm=layer", "model.qk_norm=false", "model.zero_init=false", "model/position=learned", "optimizer=adamw", "optimizer.lr=1e-3",
    "optimizer.weight_decay=0.1", "schedule=cosine",
]  # fmt: skip
OURS = ["optimizer.lr=0.03", "optimizer.adamw_lr=0.008"]  # slightly lower rates are better for longer training


def run(folder: Path, name: str, *overrides: str) -> Path:
    """Train with the command line; return the run folder."""
    target = folder / name
    command = [sys.executable, "-m", "meshformer.cli", "train", f"hydra.run.dir={target}", "trainer.progress=false", *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return target


def val_losses(run_folder: Path) -> list[tuple[int, float]]:
    return [(int(row["step"]), float(row["val/loss"])) for row in read_metrics(run_folder / "metrics.csv") if "val/loss" in row]


def report_learning(options: argparse.Namespace) -> None:
    """Print the full validation loss, in nats per character, of 2,000 steps with 4 layers, 4 heads, width 128, context 64, batch 12."""
    with tempfile.TemporaryDirectory() as scratch:
        for name, settings in (("AdamW, learned positions, plain recipe", PLAIN), ("Muon, rotary positions, QK-norm, zero init", OURS)):
            start = time.perf_counter()
            loss = val_losses(run(Path(scratch), f"run{len(settings)}", *FIXED, *settings, f"trainer.threads={options.threads}"))[-1][1]
            print(f"  {name:<44}{loss:.4f} nats a character  ({time.perf_counter() - start:.0f} s, start-up included)")


def report_speedrun(options: argparse.Namespace) -> None:
    """Print training time (without start-up and validation) and final loss of `experiment=shakespeare_speedrun`; the goal is 1.94."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = run(Path(scratch), "speedrun", "experiment=shakespeare_speedrun", f"trainer.threads={options.threads}")
        seconds = training_seconds(folder)
        step, loss = val_losses(folder)[-1]
        print(f"  {loss:.4f} nats a character after {step} steps, {seconds:.1f} s of training")


def training_seconds(run_folder: Path) -> float:
    """Return the seconds spent in training steps, from the rate in every row."""
    context_length = yaml.safe_load((run_folder / "config.yaml").read_text(encoding="utf-8"))["data"]["context_length"]
    seconds, samples = 0.0, 0.0
    for row in read_metrics(run_folder / "metrics.csv"):
        if "train/tokens_per_second" in row:
            seconds += (float(row["samples"]) - samples) * context_length / float(row["train/tokens_per_second"])
            samples = float(row["samples"])
    return seconds


def report_finetune(options: argparse.Namespace) -> None:
    """Print the loss on the King James Bible of a Shakespeare model before and after fine-tuning, and of one trained from scratch."""
    with tempfile.TemporaryDirectory() as scratch:
        base = run(Path(scratch), "pretrained", "trainer.limit_val_batches=20", f"trainer.threads={options.threads}")
        tuned = ["experiment=kjv_finetune", f"stage.init_from={base}", f"trainer.threads={options.threads}"]
        untouched = run(Path(scratch), "untouched", *tuned, "trainer.max_steps=1", "schedule.warmup_steps=0", "stage.lr_scale=1e-9")
        finetuned = run(Path(scratch), "finetuned", *tuned)
        steps = val_losses(finetuned)[-1][0]
        scratch_run = run(Path(scratch), "scratch", "data=kjv", f"trainer.max_steps={steps}", f"trainer.threads={options.threads}")
        for name, folder in (
            ("pretrained, untouched", untouched),
            (f"fine-tuned, {steps} steps", finetuned),
            (f"from scratch, {steps} steps", scratch_run),
        ):
            print(f"  {name:<28}{val_losses(folder)[-1][1]:.4f} nats a character")
