"""What a layout costs: step time of each on two ranks with one thread each, and how long the ranks of a pipeline wait for each other."""

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
PIPELINE = [
    "model=nano", "model.n_layers=6", "data.context_length=64", "data.batch_size=32", "data.tokenizer=bpe", "data.vocab_size=4096",
    "strategy=pipeline", "strategy.schedule=1f1b",
]  # fmt: skip


def report_layouts(options: argparse.Namespace) -> None:
    """Time of a step, relative to DDP in the same round: the median of the rounds, and their range."""
    times: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(ROUNDS):
            for index, (name, settings) in enumerate(LAYOUTS.items()):
                folder = run(
                    Path(scratch), f"{turn}-{index}", *COMMON, *SIZE, *settings,
                    f"trainer.max_steps={STEPS}", f"trainer.log_every_n_steps={EVERY}",
                )  # fmt: skip
                rates = [
                    float(row["train/tokens_per_second"])
                    for row in read_metrics(folder / "metrics.csv")
                    if "train/tokens_per_second" in row
                ]
                times[name].append(16 * 128 / statistics.median(rates[WARM_UP_ROWS:]))
    print(f"  {', '.join(SIZE)}; 2 ranks, 1 thread each, gloo")
    for name, measured in times.items():
        ratios = [own / ddp for own, ddp in zip(measured, times["ddp"], strict=True)]
        median, low, high = statistics.median(ratios), min(ratios), max(ratios)
        print(f"  {name:<30}{1e3 * statistics.median(measured):8.1f} ms a step  {median:5.2f} times ddp ({low:.2f} to {high:.2f})")


class IdleClock(pl.Callback):
    """The share of a training step's time in which a rank of a pipeline runs no stage, mean over the ranks: RUN/idle.json. CPU only, where
    a stage's calls return when the work is done. State: none."""

    def __init__(self, file: str, warm_up_steps: int = 3):
        self.file, self.warm_up_steps = file, warm_up_steps
        self.busy, self.start = 0.0, 0.0
        self.shares: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        for name in ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk"):
            setattr(PipelineStage, name, self._timed(getattr(PipelineStage, name)))

    def _timed(self, work: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                self.busy += time.perf_counter() - start

        return timed

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        dist.barrier()
        self.busy, self.start = 0.0, time.perf_counter()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: torch.Tensor) -> None:
        # The schedule has run by now, forward and backward; the optimizer's own time is no part of the pipeline.
        self.shares.append(1 - self.busy / (time.perf_counter() - self.start))

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        mine = torch.tensor(statistics.median(self.shares[self.warm_up_steps :]))
        dist.all_reduce(mine)
        if trainer.is_global_zero:
            Path(self.file).write_text(json.dumps({"idle": float(mine) / trainer.world_size}))


def report_pipeline(options: argparse.Namespace) -> None:
    """Idle share of 1F1B on two ranks, measured, beside (P − 1)/(M + P − 1), for stages balanced by FLOPs and by counting blocks."""
    print(f"  {', '.join(PIPELINE)}; 2 ranks, 1 thread each, gloo")
    print(f"  {'micro-batches':<16}{'theory':>8}{'by FLOPs':>12}{'by blocks':>12}")
    with tempfile.TemporaryDirectory() as scratch:
        for m in (2, 4, 8, 16):
            shares = []
            for name, split in (("flops", []), ("blocks", ["strategy.blocks_per_stage=[3,3]"])):
                file = Path(scratch) / f"{name}-{m}.json"
                target = "meshformer.bench.layouts"
                clock = [f"+callbacks.idle._target_={target}.IdleClock", f"+callbacks.idle.file={file}", f"allow=[{target}]"]
                run(Path(scratch), f"{name}-{m}", *COMMON, *PIPELINE, *split, *clock, f"strategy.microbatches={m}", "trainer.max_steps=12")
                shares.append(json.loads(file.read_text())["idle"])
            print(f"  {m:<16}{1 / (m + 1):>8.2f}{shares[0]:>12.2f}{shares[1]:>12.2f}")
