"""`python -m meshformer.bench gpu`: check correctness, host-device synchronisation and speed on a GPU, with pass/fail limits (gates).

Results are printed as a table and saved as JSON after each part; a part that fails does not stop the others. `--device cpu --tiny` runs the same
code at toy sizes. The text is generated, so nothing is downloaded. A machine without network that has torch, lightning, torchmetrics, tokenizers
and numpy also needs `hydra-core`, `omegaconf` and `antlr4-python3-runtime`:

    pip wheel --no-deps -w wheels hydra-core==1.3.8 omegaconf==2.3.0 antlr4-python3-runtime==4.9.3     # here
    pip install --no-index --no-deps --target site wheels/*.whl                                      # there
    PYTHONPATH=site:src python -m meshformer.bench gpu --json gpu.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from meshformer.bench import gpu_parts
from meshformer.record.metrics_csv import read_metrics
from meshformer.record.run_folder import atomic_write_text

STEPS = 20
JOBS = {"cuda": 4, "cpu": 1}  # concurrent training commands
WORDS = 600


@dataclass
class Row:
    """One measured value. `passed` is None if it has no gate."""

    part: str
    name: str
    value: float
    unit: str
    gate: str = ""
    passed: bool | None = None


class Bench:
    """Shared state of all parts: the device, the sizes, a folder for runs, and the collected rows."""

    def __init__(self, device: str, tiny: bool, minutes: float, scratch: Path, out: Path | None):
        self.device, self.tiny, self.scratch, self.out = device, tiny, scratch, out
        self.end = time.monotonic() + 60 * minutes
        self.rows: list[Row] = []
        self.errors: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.text = scratch / "text.txt"
        self.text.write_text(make_text(20_000 if tiny else 300_000), encoding="utf-8")

    def add(self, part: str, name: str, value: float, unit: str, at_most: float | None = None, at_least: float | None = None) -> None:
        gate, passed = "", None
        if at_most is not None:  # NaN fails either comparison
            gate, passed = f"≤ {at_most:g}", value <= at_most
        elif at_least is not None:
            gate, passed = f"≥ {at_least:g}", value >= at_least
        row = Row(part, name, value, unit, gate, passed)
        self.rows.append(row)
        print(format_row(row), flush=True)

    def run(self, part: str, function: Callable[[Bench], None]) -> None:
        if time.monotonic() > self.end:
            self.errors[part] = "not run: the time given by --minutes was used up"
        else:
            start = time.monotonic()
            try:
                function(self)
            except Exception as error:  # the other parts still run
                self.errors[part] = f"{type(error).__name__}: {str(error)[-1500:]}"
                traceback.print_exc(limit=-4)
            self.seconds[part] = round(time.monotonic() - start, 1)
        if part in self.errors:
            print(f"{part:<10} FAILED  {self.errors[part].strip().splitlines()[-1][:140]}", flush=True)
        self.save()

    def save(self) -> None:
        if self.out is None:
            return
        result = {
            "date": str(datetime.date.today()),
            **describe(self.device),
            "tiny": self.tiny,
            "rows": [asdict(row) for row in self.rows],
            "errors": self.errors,
            "seconds": self.seconds,
        }
        atomic_write_text(self.out, json.dumps(result, indent=1, ensure_ascii=False))

    def train(self, name: str, *overrides: str, device: str | None = None) -> Path:
        """Train with the command line in another process; return the run folder."""
        folder = self.scratch / name
        device = device or self.device
        command = [
            sys.executable, "-m", "meshformer.cli", "train", f"hydra.run.dir={folder}", "trainer.progress=false", "logger=csv",
            f"trainer.accelerator={'gpu' if device == 'cuda' else 'cpu'}", *overrides,
        ]  # fmt: skip
        environment = {**os.environ, "NVIDIA_TF32_OVERRIDE": "0"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"`{' '.join(command[2:])}` exited {done.returncode}:\n{(done.stderr or done.stdout)[-1200:]}")
        return folder

    def recipe(self, *overrides: str) -> list[str]:
        """Return overrides for a short run on the generated text: clipped SGD, fp32, every step in metrics.csv."""
        return [
            "data=text", f"data.files={self.text}", f"paths.data={self.scratch / 'cache'}", "~callbacks.samples", "trainer.log_every_n_steps=1",
            f"trainer.max_steps={STEPS}", "trainer.val_check_interval=100000", "trainer.limit_val_batches=2", "trainer.precision=32-true",
            "trainer.matmul_precision=highest", "schedule=constant", "optimizer=sgd", "optimizer.lr=0.1", "callbacks.checkpoint.every_n_steps=100000",
            f"trainer.threads={4 if self.device == 'cuda' else 1}", *overrides,
        ]  # fmt: skip


def columns(folder: Path) -> dict[int, tuple[float, float]]:
    """Return step -> (loss, gradient norm)."""
    rows = read_metrics(folder / "metrics.csv")
    return {int(row["step"]): (float(row["train/loss"]), float(row["train/grad_norm"])) for row in rows if "train/loss" in row}


def worst(a: Path, b: Path, last: int = STEPS) -> tuple[float, float]:
    """Return the largest relative differences of loss and gradient norm over the steps that both runs have.

    Raises RuntimeError if a run lacks the step `last`.
    """
    left, right = columns(a), columns(b)
    if last not in left or last not in right:
        raise RuntimeError(f"one of the runs has no row of step {last}")
    pairs = [(left[step], right[step]) for step in left.keys() & right.keys()]
    loss, norm = (max(abs(x[i] - y[i]) / abs(y[i]) for x, y in pairs) for i in (0, 1))
    return loss, norm


def right_layouts(bench: Bench) -> None:
    """Compare the same 20 steps on this device and on the CPU, for each model, optimizer and one-rank strategy, and compiled."""
    # At nano's rate of 0.1, rounding differences in the larger model grow to 6e-4 of the gradient norm within 20 steps (H200).
    small = ["model=small", "data.context_length=64", "data.batch_size=4", "optimizer.lr=0.01"]
    if bench.tiny:
        small = ["model=nano", "model.n_layers=2"]
    runs: dict[str, tuple[list[str], str]] = {
        "nano cpu": ([], "cpu"), "nano": ([], bench.device), "small cpu": (small, "cpu"), "small": (small, bench.device),
        "adamw cpu": (["optimizer=adamw", "optimizer.lr=1e-3"], "cpu"), "adamw": (["optimizer=adamw", "optimizer.lr=1e-3"], bench.device),
        "muon cpu": (["optimizer=muon", "optimizer.lr=0.01"], "cpu"), "muon": (["optimizer=muon", "optimizer.lr=0.01"], bench.device),
        "ddp": (["strategy=ddp", "trainer.devices=1"], bench.device), "fsdp": (["strategy=fsdp", "trainer.devices=1"], bench.device),
        "compiled": (["trainer.compile=true"], bench.device),
    }  # fmt: skip
    if bench.tiny:
        del runs["compiled"]  # inductor takes half a minute to start on two cores; the tests compile with a cheaper backend

    def one(item: tuple[str, tuple[list[str], str]]) -> tuple[str, Path | Exception]:
        name, (overrides, device) = item
        try:
            return name, bench.train(name.replace(" ", "_"), *bench.recipe(*overrides), device=device)
        except Exception as error:
            return name, error

    with ThreadPoolExecutor(JOBS[bench.device]) as pool:
        folders = dict(pool.map(one, runs.items()))
    for name, against in (
        ("nano", "nano cpu"), ("small", "small cpu"), ("adamw", "adamw cpu"), ("muon", "muon cpu"),
        ("ddp", "nano"), ("fsdp", "nano"), ("compiled", "nano"),
    ):  # fmt: skip
        here, there = folders.get(name), folders.get(against)
        failed = here if isinstance(here, Exception) else there
        if isinstance(failed, Exception):
            bench.errors[f"right: {name}"] = str(failed)[-1500:]
            print(f"right      {name} FAILED: {failed}", flush=True)
        elif isinstance(here, Path) and isinstance(there, Path):
            loss, norm = worst(here, there)
            # AdamW and Muon divide by small numbers, which amplifies rounding at each step: their limit is a tenth of a percent.
            limit = 1e-3 if name in ("adamw", "muon") else 1e-4
            bench.add("right", f"{name}: loss against {against}", loss, "relative", at_most=limit)
            bench.add("right", f"{name}: gradient norm against {against}", norm, "relative", at_most=10 * limit if limit > 1e-4 else limit)


def right_resume(bench: Bench) -> None:
    """Check that a stopped and resumed run equals an uninterrupted one bit for bit, and resume checkpoints across CPU and device."""
    exact = bench.recipe("trainer.deterministic=true", "callbacks.checkpoint.every_n_steps=10", "optimizer=adamw", "optimizer.lr=1e-3")
    whole = bench.train("whole", *exact)
    half = bench.train("half", *exact, "trainer.max_steps=10")
    forked = {}
    other = "cpu" if bench.device == "cuda" else bench.device
    forked["this device's checkpoint goes on on the CPU"] = bench.train(
        "there", f"fork={half}", f"trainer.max_steps={STEPS}", device=other
    )
    on_cpu = bench.train("half_cpu", *exact, "trainer.max_steps=10", device="cpu")
    forked["a CPU's checkpoint goes on on this device"] = bench.train("here", f"fork={on_cpu}", f"trainer.max_steps={STEPS}")
    resume = [sys.executable, "-m", "meshformer.cli", "train", f"resume={half}", f"trainer.max_steps={STEPS}"]
    done = subprocess.run(resume, capture_output=True, text=True, env={**os.environ, "NVIDIA_TF32_OVERRIDE": "0"})
    if done.returncode:
        raise RuntimeError(f"resume exited {done.returncode}: {done.stderr[-1200:]}")
    a, b = columns(whole), columns(half)
    bench.add("resume", "steps that differ from a run that never stopped", sum(a[s] != b.get(s) for s in a), "steps", at_most=0)
    for name, folder in forked.items():
        bench.add("resume", name, max(worst(folder, whole)), "relative", at_most=1e-2)


def right_bf16(bench: Bench) -> None:
    """Check that 200 steps at the default recipe's size in bf16-mixed and in fp32 reach the same loss within 0.02 nats."""
    steps = 10 if bench.tiny else 200
    common = [f"trainer.max_steps={steps}", "optimizer=muon", "optimizer.lr=0.02", "trainer.log_every_n_steps=10", "trainer.limit_val_batches=20"]
    losses = {}
    for precision in ("32-true", "bf16-mixed"):
        folder = bench.train(precision, *bench.recipe(*common, f"trainer.precision={precision}"))
        losses[precision] = [float(row["val/loss"]) for row in read_metrics(folder / "metrics.csv") if "val/loss" in row][-1]
    bench.add("bf16", f"validation loss in fp32 after {steps} steps", losses["32-true"], "nats")
    bench.add("bf16", "bf16-mixed minus fp32", abs(losses["bf16-mixed"] - losses["32-true"]), "nats", at_most=0.02)


PARTS: dict[str, Callable[[Bench], None]] = {
    "kernels": gpu_parts.right_kernels,
    "right": right_layouts,
    "resume": right_resume,
    "bf16": right_bf16,
    "waiting": gpu_parts.no_waiting,
    "speed": gpu_parts.speed,
    "long": gpu_parts.long_context,
    "vocabulary": gpu_parts.large_vocabulary,
    "saving": gpu_parts.saving,
}


def report_gpu(options: argparse.Namespace) -> None:
    """Run the parts in order; exit with code 1 if a gate or a part failed."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("this torch sees no GPU: use --device cpu --tiny to rehearse")
    unknown = set(options.parts or ()) - set(PARTS)
    if unknown:
        sys.exit(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(device, options.tiny, options.minutes, Path(scratch), options.json)
        print("  ".join(f"{key} {value}" for key, value in describe(device).items()), flush=True)
        for part in options.parts or PARTS:
            bench.run(part, PARTS[part])
    print(f"\n{len([r for r in bench.rows if r.passed])} gates passed")
    failed = [format_row(row) for row in bench.rows if row.passed is False]
    for line in [*failed, *(f"{part}: {text.strip().splitlines()[-1][:160]}" for part, text in bench.errors.items())]:
        print(f"FAILED  {line}")
    if failed or bench.errors:
        sys.exit(1)


def describe(device: str) -> dict[str, Any]:
    if device != "cuda":
        return {"device": "cpu", "torch": torch.__version__}
    card = torch.cuda.get_device_properties(0)
    return {"device": card.name, "memory_gib": round(card.total_memory / 2**30, 1), "cuda": torch.version.cuda, "torch": torch.__version__}


def format_row(row: Row) -> str:
    number = f"{row.value:,.0f}" if abs(row.value) >= 1000 else f"{row.value:.3g}" if math.isfinite(row.value) else str(row.value)
    verdict = "" if row.passed is None else f"{row.gate}  {'passed' if row.passed else 'FAILED'}"
    return f"{row.part:<11}{row.name:<62}{number:>12} {row.unit:<10} {verdict}".rstrip()


def make_text(characters: int) -> str:
    """Generate lines of made-up words with a Zipf distribution, the same in every run: learnable text without a download."""
    draw = random.Random(0)
    syllables = [c + v for c in "bcdfghklmnprstvw" for v in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(WORDS)]
    weights = [1 / (rank + 1) for rank in range(WORDS)]
    lines, length = [], 0
    while length < characters:
        line = " ".join(draw.choices(words, weights, k=draw.randint(4, 12))).capitalize() + "."
        lines.append(line)
        length += len(line) + 1
    return "\n".join(lines)
