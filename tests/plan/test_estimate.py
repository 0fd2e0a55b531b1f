"""The closed form of a layout's memory against the count on the model itself."""

import pytest

from meshformer.command.plan import config_of, fullest_ranks, request_of
from meshformer.plan.candidates import candidates
from meshformer.plan.counted import LiveMemory, count_all

# Six blocks of Llama 3 8B on 16 cards, 64 samples of 8,192 tokens.
BASE = ["model=llama3_8b", "model.n_layers=6", "data.context_length=8192", "data.batch_size=64", "cluster=h100x8", "cluster.nodes=2"]
# checkpointing, accumulation, optimizer, degrees and schedule -> counted GB (2026-11-30)
CASES: dict[str, tuple[str, int, str, list[str], float]] = {
    "fsdp, none": ("none", 2, "muon", ["shard=16"], 35.5),
    "fsdp, selective": ("selective", 1, "muon", ["shard=16"], 32.5),
    "fsdp, full": ("full", 1, "adamw", ["shard=16"], 17.5),
    "fsdp × tensor 2, none": ("none", 4, "muon", ["shard=8", "tensor=2"], 22.5),
    "fsdp × tensor 2, selective": ("selective", 4, "adamw", ["shard=8", "tensor=2"], 21.5),
    "fsdp × tensor 8, full": ("full", 8, "muon", ["shard=2", "tensor=8"], 8.0),
    "replicate × tensor 8, none": ("none", 16, "muon", ["replicate=2", "tensor=8"], 11.6),
    "fsdp × context, selective": ("selective", 4, "muon", ["shard=8", "context=2"], 22.8),
    "fsdp × pipeline, none": ("none", 1, "muon", ["shard=8", "pipeline=2", "schedule=1f1b"], 23.6),
    "fsdp × pipeline, gpipe, full": ("full", 1, "adamw", ["shard=8", "pipeline=2", "schedule=gpipe"], 26.6),
    "tensor × pipeline, selective": ("selective", 1, "muon", ["tensor=8", "pipeline=2", "schedule=1f1b"], 13.4),
    "ddp, selective": ("selective", 4, "muon", ["replicate=16"], 46.0),
}


def asked(name):
    checkpointing, accumulation, optimizer, strategy, _ = CASES[name]
    group = "ddp" if name.startswith("ddp") else "mesh"
    settings = [f"strategy.{setting}" for setting in strategy] if group == "mesh" else []
    more = [f"strategy.activation_checkpointing={checkpointing}", f"trainer.accumulate_grad_batches={accumulation}", f"optimizer={optimizer}"]
    return [*BASE, f"strategy={group}", *settings, *more]


@pytest.mark.parametrize("name", CASES)
def test_the_estimate_is_near_the_count(name):
    estimated = candidates(request_of(asked(name)))[0].memory.total / 1e9
    assert estimated == pytest.approx(CASES[name][-1], rel=0.12)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_counts_are_those_of_today(name):
    given = asked(name)
    request = request_of(given)
    candidate = candidates(request)[0]
    config = config_of(candidate, request, [setting for setting in given if not setting.startswith("cluster")], None)
    found = count_all([(config, fullest_ranks(candidate))], 2)[0]
    assert isinstance(found, LiveMemory), found
    assert found.peak / 1e9 == pytest.approx(CASES[name][-1], rel=0.02)
