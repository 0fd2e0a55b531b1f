"""Measure the step time of each layout on two ranks with one thread each, and the idle time of pipeline ranks."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

from meshformer.bench.learning import run
from meshformer.parallel.pipeline import Pipeline
from meshformer.record.metrics_csv import read_metrics

COMMON = [
    "data=shakespeare", "trainer.devices=2", "trainer.threads=1", "trainer.precision=32-true", "trainer.val_check_interval=100000",
    "trainer.limit_val_batches=1", "logger=csv", "~callbacks.samples", "~callbacks.checkpoint", "optimizer=adamw",
]  # fmt: skip
SIZE = ["model=nano", "model.n_layers=4", "model.d_model=256", "data.context_length=128", "data.batch_size=16"]
LAYOUTS = {
    "ddp": ["strategy=ddp"],
    "fsdp": ["strategy=fsdp"],
    "tensor": ["strategy=tensor"],
    "tensor, no sequence parallel": ["strategy=tensor", "strategy.sequence_parallel=false"],
    "context, all-gather": ["strategy=context"],
    "context, Ulysses": ["strategy=context", "strategy.context_method=ulysses"],
    "pipeline, 1f1b": ["strategy=pipeline"],
    "pipeline, interleaved 1f1b": ["strategy=pipeline", "strategy.schedule=interleaved_1f1b"],
    "pipeline, zero bubble": ["strategy=pipeline", "strategy.schedule=interleaved_zero_bubble"],
}
ROUNDS, STEPS, EVERY, WARM_UP_ROWS = 3, 24, 4, 2
PIPELINE = ["data.batch_size=32", "data.tokenizer=bpe", "data.vocab_size=4096", "strategy=pipeline", "strategy.schedule=1f1b"]
# Seven blocks and the head split into two stages of nearly equal cost; the head of the narrow model is too large for that.
PIPELINES = {
    "7 layers, width 384, context 128": ["model=nano", "model.n_layers=7", "model.d_model=384", "data.context_length=128"],
    "6 layers, width 128, context 64": ["model=nano", "model.n_layers=6", "data.context_length=64"],
}


def report_layouts(options: argparse.Namespace) -> None:
    """Print the step time relative to DDP in the same round: median and range over the rounds."""
    times: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(ROUNDS):
            for index, (name, settings) in enumerate(LAYOUTS.items()):
                times[name].append(timed(Path(scratch), f"{turn}-{index}", settings))
    print(f"  {', '.join(SIZE)}; 2 ranks, 1 thread each, gloo")
    for name, measured in times.items():
        ratios = [own / ddp for own, ddp in zip(measured, times["ddp"], strict=True)]
        median, low, high = statistics.median(ratios), min(ratios), max(ratios)
        print(f"  {name:<30}{1e3 * statistics.median(measured):8.1f} ms a step  {median:5.2f} times ddp ({low:.2f} to {high:.2f})")


def timed(scratch: Path, name: str, settings: list[str]) -> float:
    """Median seconds of a step of a short run with these settings."""
    folder = run(scratch, name, *COMMON, *SIZE, *settings, f"trainer.max_steps={STEPS}", f"trainer.log_every_n_steps={EVERY}")
    rows = read_metrics(folder / "metrics.csv")
    rates = [float(row["train/tokens_per_second"]) for row in rows if "train/tokens_per_second" in row]
    return 16 * 128 / statistics.median(rates[WARM_UP_ROWS:])


class IdleClock(pl.Callback):
    """Writes to FILE.RANK the fraction of a training step in which a pipeline rank runs no stage, and its forward and backward seconds.

    CPU only, where a stage's calls return when the work is done. State: none.
    """

    def __init__(self, file: str, warm_up_steps: int = 3):
        self.file, self.warm_up_steps = file, warm_up_steps
        self.spent, self.start = {"forward": 0.0, "backward": 0.0}, 0.0
        self.steps: list[dict[str, float]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        PipelineStage.forward_one_chunk = self._timed("forward", PipelineStage.forward_one_chunk)
        PipelineStage.backward_one_chunk = self._timed("backward", PipelineStage.backward_one_chunk)
        # The schedule computes the loss itself, not within forward_one_chunk, so its time is added to forward here.
        Pipeline._loss = self._timed("forward", Pipeline._loss)

    def _timed(self, kind: str, work: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                self.spent[kind] += time.perf_counter() - start

        return timed

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        dist.barrier()
        self.spent, self.start = dict.fromkeys(self.spent, 0.0), time.perf_counter()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: torch.Tensor) -> None:
        # The schedule has run forward and backward by now; the optimizer's time does not belong to the pipeline.
        whole = time.perf_counter() - self.start
        self.steps.append({**self.spent, "idle": 1 - sum(self.spent.values()) / whole})

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        counted = self.steps[self.warm_up_steps :]
        figures = {name: statistics.median(step[name] for step in counted) for name in counted[0]}
        Path(f"{self.file}.{trainer.global_rank}").write_text(json.dumps(figures))


def idle_share(forward: list[float], backward: list[float], microbatches: int) -> float:
    """Return the idle fraction of 1F1B with free communication, given the seconds of one micro-batch in each stage.

    For equal stages it is (P − 1)/(M + P − 1) (Narayanan et al. 2021, section 2.2.1).
    """
    P, M = len(forward), microbatches
    orders = []
    for stage in range(P):
        warm_up = min(P - stage, M)
        order = [("forward", i) for i in range(warm_up)]
        for i in range(M):
            order.append(("backward", i))
            order += [("forward", i + warm_up)] if i + warm_up < M else []
        orders.append(order)
    done: dict[tuple[str, int, int], float] = {}
    clock, at = [0.0] * P, [0] * P
    while any(at[stage] < len(orders[stage]) for stage in range(P)):
        for stage in range(P):
            if at[stage] == len(orders[stage]):
                continue
            kind, i = orders[stage][at[stage]]
            neighbour = stage - 1 if kind == "forward" else stage + 1
            ready = done.get((kind, i, neighbour)) if 0 <= neighbour < P else 0.0
            if ready is not None:
                clock[stage] = max(clock[stage], ready) + (forward if kind == "forward" else backward)[stage]
                done[kind, i, stage], at[stage] = clock[stage], at[stage] + 1
    return 1 - M * sum(forward + backward) / (P * max(clock))


def report_pipeline(options: argparse.Namespace) -> None:
    """Print the idle fraction of 1F1B on two ranks: in theory for equal stages, (P − 1)/(M + P − 1), for the measured stage times, and measured."""
    print("  2 ranks, 1 thread each, gloo; 1F1B; stages balanced by FLOPs, the head's included")
    print(f"  {'':<40}{'micro-batches':>15}{'equal stages':>15}{'these stages':>15}{'measured':>10}")
    with tempfile.TemporaryDirectory() as scratch:
        for name, model in PIPELINES.items():
            for m in (2, 4, 8, 16):
                file = Path(scratch) / f"idle-{len(list(Path(scratch).iterdir()))}"
                target = "meshformer.bench.layouts"
                clock = [f"+callbacks.idle._target_={target}.IdleClock", f"+callbacks.idle.file={file}", f"allow=[{target}]"]
                run(Path(scratch), f"run-{file.name}", *COMMON, *model, *PIPELINE, *clock, f"strategy.microbatches={m}", "trainer.max_steps=30")
                ranks = [json.loads(Path(f"{file}.{rank}").read_text()) for rank in (0, 1)]
                stages = idle_share([r["forward"] / m for r in ranks], [r["backward"] / m for r in ranks], m)
                measured = statistics.mean(r["idle"] for r in ranks)
                print(f"  {name:<40}{m:>15}{1 / (m + 1):>15.3f}{stages:>15.3f}{measured:>10.3f}", flush=True)
