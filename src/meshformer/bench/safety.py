"""Measure the cost of safety: how long saving delays training, and how much the checks for non-finite values add to a step."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing

from meshformer.callbacks.preemption import Preemption, StopSignals
from meshformer.checkpoint.lightning_io import FolderCheckpointIO
from meshformer.model import Transformer
from meshformer.training.guard import Guard

ROUNDS, STEPS, STEP_SECONDS = 5, 200, 0.035


def report_saving(options: argparse.Namespace) -> None:
    """Print the seconds to save weights and AdamW's two moments, flushed and with checksums: until `write` returns, and until all is on disk."""
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
    """Print how much the checks add to a step of 35 ms, in one process and on two ranks.

    They are the flags for non-finite values, the guard's notes, the ranks' agreement on stopping, and a row every 50 steps. Matrix products fill the
    rest of a step, as in training, so asynchronous collectives overlap. The all-reduce that reports a bad gradient also counts tokens and happens in
    any case, so it is not included.
    """
    with tempfile.TemporaryDirectory() as scratch:
        for ranks in (1, 2):
            file = Path(scratch) / f"{ranks}.json"
            multiprocessing.start_processes(_check_steps, (ranks, str(file)), nprocs=ranks)
            rounds = json.loads(file.read_text())
            cost, spread = statistics.median(rounds), f"rounds {min(rounds) * 1e6:.0f} to {max(rounds) * 1e6:.0f}"
            name = "one process" if ranks == 1 else f"{ranks} ranks"
            print(f"  {name:<12}{cost * 1e6:5.0f} µs a step, {cost / STEP_SECONDS:.2%} of {STEP_SECONDS * 1e3:.0f} ms ({spread})")


def _check_steps(rank: int, ranks: int, file: str) -> None:
    """Run the rounds on one rank; rank 0 writes the seconds per step of each round to `file`."""
    torch.set_num_threads(1)
    stopping = Preemption(StopSignals(by_agent=False))
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{file}.meet", rank=rank, world_size=ranks)
        stopping.group = dist.new_group(backend="gloo")
    guard = Guard(torch.device("cpu"), (0.0, 0.0), 0.0, None)
    norms, loss, count, matrix = torch.rand(60), torch.rand(()), torch.ones(()), torch.rand(512, 512)

    class Summing:
        def reduce(self, x: torch.Tensor, reduce_op: str) -> torch.Tensor:
            if ranks > 1:
                dist.all_reduce(x)
            return x

    rounds = []
    for _ in range(ROUNDS):
        held_up = 0.0
        for step in range(1, STEPS + 1):
            end = time.perf_counter() + STEP_SECONDS
            while time.perf_counter() < end:
                matrix @ matrix
            if ranks > 1:
                dist.barrier()  # waiting for a slower rank does not count as a cost of the checks
            begun = time.perf_counter()
            guard.loss(step, loss, count)
            norm = torch.linalg.vector_norm(norms)
            bad = torch.stack((count, norm - norm))[1] != 0
            guard.gradient(step, 1e-3, bad, bad, norms)
            stopping._agreed()
            if step % 50 == 0:
                guard.summarise(Summing())
                guard.reset()
            held_up += time.perf_counter() - begun
        rounds.append(held_up / STEPS)
    stopping._finish()
    if rank == 0:
        Path(file).write_text(json.dumps(rounds))
    if ranks > 1:
        dist.destroy_process_group()
