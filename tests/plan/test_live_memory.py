"""What a plan counts on fake tensors is what a run holds: the same count on the run itself, with real tensors and processes that communicate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness import run_ranks
from jobs import run_tiny, text_file, tiny_config
from meshformer.bench.memory_plan import PUBLISHED, measure_apart
from meshformer.config import ConfigError
from meshformer.job import train as job
from meshformer.plan import counting
from meshformer.plan.counted import LiveMemory, _answer, live_memory_apart
from meshformer.plan.live_bytes import LiveBytes
from meshformer.plan.live_memory import live_memory
from meshformer.plan.reserve import Reserve
from meshformer.plan.shortened import count
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
    ("fsdp, selective, bf16", 2,
        ["strategy=fsdp", "strategy.activation_checkpointing=selective", "trainer.precision=bf16-mixed", "strategy.param_dtype=bfloat16"]),
    ("fsdp × tensor, Muon", 4, ["strategy=fsdp_tensor", "optimizer=muon"]),
    ("fsdp × pipeline, Muon", 4, ["strategy=fsdp_pipeline", "optimizer=muon", *SCHEDULE]),
    ("tensor", 2, ["strategy=tensor"]),
    ("tensor, no sequence parallel, loss parallel, full", 2,
        ["strategy=tensor", "strategy.sequence_parallel=false", "strategy.loss_parallel=true", "strategy.activation_checkpointing=full"]),
    ("context", 2, ["strategy=context"]),
    ("pipeline", 2, ["strategy=pipeline", *SCHEDULE]),
    ("pipeline, zero bubble", 2, ["strategy=pipeline", "strategy.schedule=interleaved_zero_bubble", "strategy.stages_per_rank=2", *SCHEDULE]),
    ("fsdp × tensor", 4, ["strategy=fsdp_tensor"]),
    ("hsdp, accumulated", 4, ["strategy=hsdp", "strategy.replicate=2", "trainer.accumulate_grad_batches=2"]),
]  # fmt: skip


def counted_here(config: dict[str, Any], rank: int = 0, counter: counting.Counter = live_memory) -> LiveMemory:
    """As `live_memory_apart`, in a process that is forked from this one: it need not import torch again."""
    found = _answer(counting.run([(config, rank)], 1, counter, 120.0)[0])
    if isinstance(found, Exception):
        raise found
    return found


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


LONGER = (
    "single", "single, selective, accumulated", "ddp", "fsdp", "fsdp, full", "tensor, no sequence parallel, loss parallel, full", "context",
    "pipeline", "fsdp × tensor", "fsdp × pipeline, Muon", "hsdp, accumulated",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "processes", "overrides"),
    [pytest.param(*layout, id=layout[0], marks=[pytest.mark.slow] * (layout[0] in LONGER)) for layout in LAYOUTS],
)
def test_a_plan_counts_what_a_run_holds(tmp_path: Path, name: str, processes: int, overrides: list[str]) -> None:
    text_file(tmp_path, words=6000)
    asked = [*SIZES, f"trainer.devices={processes}", *overrides]
    real = run_ranks(processes, train_and_count, tmp_path, [*asked, "trainer.max_steps=2", "~callbacks.checkpoint"])
    ranks = range(processes) if "pipeline" in name else [0]
    for rank in ranks:
        planned = counted_here(tiny_config(tmp_path, *asked), rank)
        peak, where, kinds = real[rank]
        print(f"{name}, rank {rank}: {planned.peak / MIB:.3f} MiB planned ({planned.where}), {peak / MIB:.3f} held ({where})")
        print("  ", {kind: f"{planned.kinds[kind] / MIB:.3f} {kinds[kind] / MIB:.3f}" for kind in kinds})
        assert planned.peak == pytest.approx(peak, rel=0.01)


# --- what a plan says of itself


def test_the_kinds_of_a_sharded_run_are_those_of_its_table(tmp_path: Path) -> None:
    """At the start of a step FSDP holds the shards that parallel/table.py computes: weights, gradients and AdamW's two moments, to the byte."""
    text_file(tmp_path)
    weights, gradients, optimizer = run_ranks(1, fsdp_sizes, tiny_config(tmp_path, *SIZES, "strategy=fsdp", "trainer.devices=2"))[0]
    found = live_memory_apart(tiny_config(tmp_path, *SIZES, "strategy=fsdp", "trainer.devices=2"))
    assert found.kinds["weights"] == weights
    assert found.kinds["optimizer"] == pytest.approx(optimizer, abs=4 * 200)  # and a step counter per parameter
    assert found.start == pytest.approx(weights + gradients + optimizer, rel=0.01)  # and the batch
    assert found.end == pytest.approx(found.start, rel=0.01)
    assert found.reserved > found.peak > found.start


def fsdp_sizes(config: Any) -> tuple[int, int, int]:
    """What parallel/table.py says of the first of two ranks."""
    import torch

    from meshformer.compat.torch_distributed import init_fake_process_group
    from meshformer.parallel.table import local_sizes
    from meshformer.plan import live_memory

    init_fake_process_group(0, 2)
    task = live_memory.build(live_memory.countable(config), 0, Path("."))
    with torch.device("meta"):
        sizes = local_sizes(task, task.configure_optimizers()["optimizer"])
    return sizes["bytes"], sizes["gradients"], sizes["optimizer"]


@pytest.mark.parametrize(
    ("change", "key"),
    [({"strategy": {"cpu_offload": True}}, "strategy.cpu_offload"), ({"trainer": {"precision": "16-mixed"}}, "trainer.precision"),
     ({"model": {"vocab_size": None}}, "model.vocab_size")],
)  # fmt: skip
def test_what_cannot_be_counted_is_refused(tmp_path: Path, change: dict[str, Any], key: str) -> None:
    text_file(tmp_path)
    config = tiny_config(tmp_path, *SIZES, "strategy=fsdp", "trainer.devices=2")
    for room, values in change.items():
        config[room] |= values
    with pytest.raises(ConfigError) as told:
        counted_here(config)
    assert told.value.key == key


def test_a_failure_says_why(tmp_path: Path) -> None:
    text_file(tmp_path)
    config = tiny_config(tmp_path, *SIZES)
    config["model"]["n_heads"] = 7
    with pytest.raises((RuntimeError, ConfigError), match="7"):
        live_memory_apart(config)


def test_the_allocator_reuses_splits_and_joins() -> None:
    pool = Reserve()
    pool.take(1, 30 * MIB)
    pool.give(1)
    pool.take(2, 20 * MIB)
    pool.take(3, 10 * MIB)
    assert pool.reserved == 30 * MIB, "the second and the third share the first's place"
    pool.give(2)
    pool.take(4, 21 * MIB)
    assert pool.reserved == 52 * MIB, "a hole that is too small is not used; segments are multiples of 2 MiB"
    pool.give(3)
    pool.take(5, 30 * MIB)
    assert pool.reserved == 52 * MIB, "neighbours are joined"


# --- published figures


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures_are_met(name: str) -> None:
    found = measure_apart(name)
    assert found["reserved"] == pytest.approx(PUBLISHED[name], rel=0.1)


@pytest.mark.slow
def test_a_large_candidate_takes_less_than_a_minute() -> None:
    found = measure_apart("70B, FSDP 32 × tensor 8, ours")
    assert found["cpu"] < 60 and found["peak"] < found["reserved"] < 80


# --- deep models


DEEP = ["model.n_layers=9", "model.d_model=64", "model.n_heads=4", "data.context_length=64", "data.batch_size=32", "model.vocab_size=64"]
SHORTENED: dict[str, list[str]] = {
    "fsdp": ["strategy=fsdp", "trainer.devices=8", "optimizer=adamw"],
    "fsdp, full": ["strategy=fsdp", "trainer.devices=8", "optimizer=adamw", "strategy.activation_checkpointing=full"],
    "fsdp × tensor, Muon, selective, accumulated": [
        "strategy=fsdp_tensor", "trainer.devices=8", "optimizer=muon", "strategy.activation_checkpointing=selective",
        "trainer.accumulate_grad_batches=2",
    ],
    "ddp, Muon": ["strategy=ddp", "trainer.devices=4", "optimizer=muon"],
    "fsdp × pipeline": ["strategy=fsdp_pipeline", "trainer.devices=4", "model.n_layers=17", "optimizer=adamw", *SCHEDULE],
    "pipeline, interleaved": [
        "strategy=pipeline", "strategy.schedule=interleaved_1f1b", "trainer.devices=2", "model.n_layers=29", "optimizer=adamw", *SCHEDULE,
    ],
}  # fmt: skip


QUICK = ("fsdp × pipeline",)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in SHORTENED])
def test_a_deep_model_is_counted_on_two_shorter_ones(tmp_path: Path, name: str) -> None:
    text_file(tmp_path)
    config = tiny_config(tmp_path, *DEEP, *SHORTENED[name])
    ranks = [0, config["trainer"]["devices"] - 1] if "pipeline" in name else [0]
    for rank in ranks:
        found, whole = counted_here(config, rank, count), counted_here(config, rank)
        assert not found.highest, "the short way was taken"
        assert found.peak == pytest.approx(whole.peak, rel=1e-3)
        assert sum(found.kinds.values()) == found.peak
        if "pipeline" not in name:  # its buffers for received states are left from the step before, which the shorter models do not run
            assert found.start == pytest.approx(whole.start, rel=1e-3, abs=8192)  # the whole step before leaves its numbers
        if "Muon" not in name:
            assert found.where == whole.where
            mine, theirs = ({**memory.kinds} for memory in (found, whole))
            if "pipeline" in name:  # a buffer for received states counts as one or the other, by the step before
                for kinds in (mine, theirs):
                    kinds["activations"] += kinds.pop("communication")
            assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-3 * whole.peak)
