"""What safety costs: how long a save keeps training waiting, and what looking for numbers that go wrong adds to a step."""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from meshformer.callbacks.preemption import Preemption, StopSignals
from meshformer.checkpoint.lightning_io import FolderCheckpointIO
from meshformer.model import Transformer
from meshformer.tasks.guard import Guard, not_finite

ROUNDS, STEPS, STEP_SECONDS = 5, 2000, 0.035


def report_saving(options: argparse.Namespace) -> None:
    """Weights and AdamW's two moments to this disk, flushed, with checksums: until `write` returns, and until all is on disk."""
    model = Transformer(vocab_size=8192, n_layers=14, n_heads=8, d_model=512, context_length=256)
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    tensors |= {
        f"optimizer.{name}.{moment}": torch.rand_like(p) for name, p in model.named_parameters() for moment in ("exp_avg", "exp_avg_sq")
    }
    size = sum(x.numel() * x.element_size() for x in tensors.values())
    waits: dict[bool, list[float]] = {False: [], True: []}
    totals: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        for turn in range(ROUNDS):
            for asynchronous in (False, True):
                io = FolderCheckpointIO()
                io.asynchronous = asynchronous
                path = Path(scratch) / f"step-{turn:08d}"
                begun = time.perf_counter()
                io.write(path, tensors, {"step": turn})
                waits[asynchronous].append(time.perf_counter() - begun)
                io.wait()
                totals[asynchronous].append(time.perf_counter() - begun)
                shutil.rmtree(path)
    sync, background = (statistics.median(waits[kind]) for kind in (False, True))
    print(f"  {sum(p.numel() for p in model.parameters()) / 1e6:.0f} million parameters, {size / 2**20:.0f} MiB; medians of {ROUNDS}")
    print(f"  synchronous   training waits {sync:.2f} s")
    share, written = background / sync, statistics.median(totals[True])
    print(f"  asynchronous  training waits {background:.2f} s, {share:.2f} of that; on disk after {written:.2f} s")


def report_checks(options: argparse.Namespace) -> None:
    """What a step does beside training, in one process: flags, notes, and a row every 50 steps; against a step of 35 ms."""
    torch.set_num_threads(1)
    guard, stopping = Guard(torch.device("cpu"), (0.0, 0.0), 0.0, None), Preemption(StopSignals(by_agent=False))
    norms, loss, count = torch.rand(60), torch.rand(()), torch.ones(())

    class Alone:
        def reduce(self, x: torch.Tensor, reduce_op: str) -> torch.Tensor:
            return x

    rounds = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        for step in range(1, STEPS + 1):
            guard.loss(step, loss, count)
            norm = torch.linalg.vector_norm(norms)
            counted, bad = torch.stack((count, not_finite(norm).float()))
            bad = bad > 0
            guard.gradient(step, 1e-3, bad, bad, norms)
            bad.float()
            counted.clamp(min=1)
            stopping._agreed()
            if step % 50 == 0:
                guard.look(Alone())
                guard.reset()
        rounds.append((time.perf_counter() - begun) / STEPS)
    cost = statistics.median(rounds)
    spread = f"rounds {min(rounds) * 1e6:.0f} to {max(rounds) * 1e6:.0f}"
    print(f"  {cost * 1e6:.0f} µs a step, {cost / STEP_SECONDS:.2%} of {STEP_SECONDS * 1e3:.0f} ms ({spread})")
