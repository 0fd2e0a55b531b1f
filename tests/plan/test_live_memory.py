"""What a plan counts on fake tensors is what a run holds: the same count on the run itself, with real tensors and processes that communicate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness import run_ranks
from jobs import run_tiny, text_file, tiny_config
from meshformer.config import ConfigError
from meshformer.job import train as job
from meshformer.plan.live_bytes import LiveBytes
from meshformer.plan.live_memory import live_memory_apart
from meshformer.tasks import base

MIB = 2**20
SIZES = ["model.n_layers=4", "model.d_model=128", "data.context_length=128", "data.batch_size=16", "optimizer=adamw", "model.vocab_size=64"]
STEP = 2  # the step that is counted
SCHEDULE = ["strategy.microbatches=4"]
# name, processes, overrides
LAYOUTS: list[tuple[str, int, list[str]]] = [
    ("single", 1, ["strategy=single"]),
    ("single, selective, accumulated", 1, ["strategy=single", "strategy.activation_checkpointing=selective", "trainer.accumulate_grad_batches=2"]),
    ("ddp", 2, ["strategy=ddp"]),
    ("fsdp", 2, ["strategy=fsdp"]),
    ("fsdp, full", 2, ["strategy=fsdp", "strategy.activation_checkpointing=full"]),
    ("fsdp, selective, bf16", 2, ["strategy=fsdp", "strategy.activation_checkpointing=selective", "trainer.precision=bf16-mixed", "strategy.param_dtype=bfloat16"]),
    ("tensor", 2, ["strategy=tensor"]),
    ("tensor, no sequence parallel, loss parallel, full", 2,
        ["strategy=tensor", "strategy.sequence_parallel=false", "strategy.loss_parallel=true", "strategy.activation_checkpointing=full"]),
    ("context", 2, ["strategy=context"]),
    ("pipeline", 2, ["strategy=pipeline", *SCHEDULE]),
    ("pipeline, zero bubble", 2, ["strategy=pipeline", "strategy.schedule=interleaved_zero_bubble", "strategy.stages_per_rank=2", *SCHEDULE]),
    ("fsdp × tensor", 4, ["strategy=fsdp_tensor"]),
    ("hsdp, accumulated", 4, ["strategy=hsdp", "strategy.replicate=2", "trainer.accumulate_grad_batches=2"]),
]  # fmt: skip


def train_and_count(folder: Path, overrides: list[str]) -> tuple[int, str, dict[str, int]]:
    """Trains two steps; the peak of the second, with real tensors."""
    live, step = LiveBytes(), base.optimizer_step

    def counted(task: Any, batches: Any) -> Any:
        optimizer = task.optimizers().optimizer
        if task.trainer.global_step == 0:
            live.__enter__()
            live.watch(task.model, optimizer)
        live.at = "forward"
        live.find_gradients()
        live.reset()
        result, live.at = step(task, batches), "data"
        if task.trainer.global_step == STEP:
            live.__exit__(None, None, None)
        return result

    base.optimizer_step = counted
    job.final_text = lambda *_: None  # an untrained model with spare tokens writes some that no tokenizer knows
    run_tiny(folder, "run", *overrides)
    return live.peak, live.where, live.kinds


@pytest.mark.parametrize(("name", "processes", "overrides"), LAYOUTS, ids=[layout[0] for layout in LAYOUTS])
def test_a_plan_counts_what_a_run_holds(tmp_path: Path, name: str, processes: int, overrides: list[str]) -> None:
    text_file(tmp_path, words=6000)
    asked = [*SIZES, f"trainer.devices={processes}", *overrides]
    real = run_ranks(processes, train_and_count, tmp_path, [*asked, "trainer.max_steps=2", "~callbacks.checkpoint"])
    ranks = range(processes) if "pipeline" in name else [0]
    for rank in ranks:
        planned = live_memory_apart(tiny_config(tmp_path, *asked), rank)
        peak, where, kinds = real[rank]
        print(f"{name}, rank {rank}: {planned.peak / MIB:.3f} MiB planned ({planned.where}), {peak / MIB:.3f} held ({where})")
        print("  ", {kind: f"{planned.kinds[kind] / MIB:.3f} {kinds[kind] / MIB:.3f}" for kind in kinds})
        assert planned.peak == pytest.approx(peak, rel=0.01)
