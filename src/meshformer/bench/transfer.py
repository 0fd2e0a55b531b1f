"""Measure what pretrained weights gain on held-out data, with one command per measurement and three seeds."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from meshformer.bench.learning import run, val_losses
from meshformer.record.metrics_csv import read_metrics
from meshformer.runs import load_model

SEEDS = (1, 2, 3)
STEPS = (100, 300, 1000)


def report_sentiment(options: argparse.Namespace) -> None:
    """`experiment=sentiment_minilm`: accuracy on a held-out fifth of the film reviews, measured every 66 steps."""
    _accuracies(options, "sentiment_minilm", "trainer.val_check_interval=66")


def report_adapters(options: argparse.Namespace) -> None:
    """`experiment=sentiment_lora`: the same with low-rank adapters (LoRA)."""
    _accuracies(options, "sentiment_lora", "trainer.val_check_interval=66")


def report_images(options: argparse.Namespace) -> None:
    """`experiment=vit_digits` and `vit_mnist`: accuracy on a held-out fifth of the images."""
    for experiment in ("vit_digits", "vit_mnist"):
        _accuracies(options, experiment)


def report_masked(options: argparse.Namespace) -> None:
    """`experiment=mlm_pretrain_then_classify` against the same encoder without pretraining: accuracy on a held-out fifth of the film reviews."""
    _accuracies(options, "mlm_pretrain_then_classify")
    _accuracies(options, "mlm_pretrain_then_classify", 'stage.reinit=["*"]')


def report_decoder(options: argparse.Namespace) -> None:
    """Print the loss on Shakespeare of the pretrained decoder and of the same model from scratch, for runs of 100, 300 and 1,000 steps."""
    rates = {"pretrained": "optimizer.lr=2e-3", "from scratch": "optimizer.lr=5e-3"}
    for name, rate in rates.items():
        settings = [rate] if name == "pretrained" else [rate, 'stage.reinit=["*"]']
        losses = []
        for steps in STEPS:
            with tempfile.TemporaryDirectory() as scratch:
                length = [f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}", "~callbacks.samples", "logger=csv"]
                threads = f"trainer.threads={options.threads}"
                folder = run(Path(scratch), "run", "experiment=shakespeare_from_pretrained_decoder", *settings, *length, threads)
                losses.append(f"{steps} steps {val_losses(folder)[-1][1]:.4f}")
        print(f"  {name:<14} {', '.join(losses)} nats a token  ({' '.join(settings)})", flush=True)


def _accuracies(options: argparse.Namespace, experiment: str, *settings: str) -> None:
    curves, seconds, trained, share = [], [], 0, 0.0
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as scratch:
            own = [f"experiment={experiment}", f"seed={seed}", f"trainer.threads={options.threads}", f"paths.runs={scratch}", *settings]
            start = time.perf_counter()
            folder = run(Path(scratch), "run", *own)
            seconds.append(time.perf_counter() - start)
            sizes = [(p.numel(), p.requires_grad) for p in load_model(folder).model.parameters()]
            trained = sum(size for size, learns in sizes if learns)
            share = trained / sum(size for size, _ in sizes)
            rows = read_metrics(folder / "metrics.csv")
            curves.append([(int(row["step"]), float(row["val/accuracy"])) for row in rows if "val/accuracy" in row])
            print(f"    seed {seed}: {curves[-1][-1][1]:.4f}, {seconds[-1]:.0f} s", flush=True)
    took = f"{trained:,} parameters trained ({share:.2%}), {max(seconds):.0f} s at most, start-up included"
    print(f"  {experiment} {' '.join(settings)}: {_mean([curve[-1][1] for curve in curves])}; {took}", flush=True)
    for step, *_ in curves[0]:
        print(f"    step {step:>5}  {_mean([dict(curve)[step] for curve in curves])}", flush=True)


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f} ({', '.join(f'{value:.4f}' for value in values)})"
