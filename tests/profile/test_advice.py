"""What is said about parts, and that every setting in it can be used by the run that it is said to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs import TINY, text_file
from meshformer.command.compose import compose
from meshformer.profile.advice import SHARES, advise, compared, sentences
from meshformer.profile.parts import BUBBLE, CHECKPOINT, DATA, EXPOSED, FORWARD, IDLE, PARTS, WAITING
from meshformer.runs.profile import usable

LAYOUTS = {
    "single": [], "ddp": ["trainer.devices=2"], "fsdp": ["trainer.devices=4"], "hsdp": ["trainer.devices=4"], "tensor": ["trainer.devices=2"],
    "context": ["trainer.devices=2"], "pipeline": ["trainer.devices=2"], "fsdp_tensor": ["trainer.devices=4"], "fsdp_pipeline": ["trainer.devices=4"],
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("advice"))


def config_of(text: Path, *overrides: str) -> dict[str, Any]:
    return compose([*TINY, f"data.files=[{text}]", "data.batch_size=32", *overrides])


def step(**parts: float) -> dict[str, float]:
    named = {"forward": FORWARD, "data": DATA, "exposed": EXPOSED, "waiting": WAITING, "bubble": BUBBLE, "checkpoint": CHECKPOINT, "idle": IDLE}
    return dict.fromkeys(PARTS, 0.0) | {named[name]: value for name, value in parts.items()}


def told(config: dict[str, Any], *ranks: dict[str, float]) -> str:
    of_rank = dict(enumerate(ranks))
    return "\n".join(sentences(of_rank, config, advise(of_rank, config, lambda settings: usable(config, settings))))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_setting_that_is_recommended_starts_that_run(text: Path, layout: str):
    """All parts at once are above their share; the overrides of each advice go to the command that made the run."""
    overrides = [f"strategy={layout}", *LAYOUTS[layout], "trainer.max_steps=40000"]
    config = config_of(text, *overrides)
    ranks = config["trainer"]["devices"]
    wrong = {DATA: 20.0, EXPOSED: 30.0, BUBBLE: 30.0, CHECKPOINT: 20.0, IDLE: 40.0}
    of_rank = {rank: {**step(), **wrong, FORWARD: 10.0 + 9 * rank, WAITING: 60.0 - 9 * rank} for rank in range(ranks)}
    found = advise(of_rank, config, lambda settings: usable(config, settings))
    assert {one.part for one in found} >= {DATA, EXPOSED, WAITING, BUBBLE, CHECKPOINT, IDLE}
    tried = [settings for one in found for settings in one.settings]
    assert len(tried) >= 4
    for settings in tried:
        changes = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()]
        config_of(text, *[o for o in overrides if o.partition("=")[0] not in settings], *changes)


def test_nothing_is_said_below_the_shares(text: Path):
    config = config_of(text)
    quiet = step(forward=100, data=4, checkpoint=4, idle=10)
    assert told(config, quiet) == "Nothing stands out: 85% of a step is forward, backward and optimizer."
    assert all(0.02 < share < 0.5 for share in SHARES.values())


def test_waiting_for_data_names_the_workers(text: Path):
    said = told(config_of(text), step(forward=80, data=20))
    assert said == "Data wait: 20.0 of 100.0 ms, 20%. The ranks wait for their batches: load them in more processes, beside the training. " \
        "Try data.workers=2."  # fmt: skip
    assert "data.workers=8" in told(config_of(text, "data.workers=4"), step(forward=80, data=20))


def test_exposed_gathers_name_what_shards(text: Path):
    config = config_of(text, "strategy=fsdp", "trainer.devices=4")
    said = told(config, *[step(forward=60, exposed=40)] * 4)
    assert "Try strategy.reshard_after_forward=false or strategy=hsdp." in said
    assert "transport takes the same cores as compute" in said
    kept = config_of(text, "strategy=fsdp", "trainer.devices=2", "strategy.reshard_after_forward=false")
    assert "Try data.batch_size=64." in told(kept, *[step(forward=60, exposed=40)] * 2)


def test_the_slow_rank_is_named_with_its_part(text: Path):
    config = config_of(text, "strategy=ddp", "trainer.devices=4")
    usual, slow = step(forward=60, waiting=40), step(forward=100)
    assert "The others wait for rank 3: its forward takes 100.0 ms, theirs 60.0. Its samples are longer" in told(config, usual, usual, usual, slow)
    late = step(forward=60, data=40)
    assert "rank 1: its data wait takes 40.0 ms, theirs 0.0. Its batches come late. Try data.workers=2." in told(config, usual, late, usual, usual)
    assert "they take turns" in told(config, *[usual] * 4)


def test_the_heavy_stage_is_named_with_blocks_to_move(text: Path):
    config = config_of(text, "strategy=pipeline", "trainer.devices=2", "model.n_layers=6", "strategy.blocks_per_stage=[4,2]")
    said = told(config, step(forward=80, bubble=20), step(forward=40, bubble=60))
    assert "Rank 0 computes 80.0 ms and the lightest 40.0: see strategy.blocks_per_stage." in said
    assert "strategy.blocks_per_stage=[3,3]" in said
    assert "strategy.schedule=interleaved_1f1b strategy.stages_per_rank=2 strategy.blocks_per_stage=null" in said
    assert "strategy.microbatches=16" in said


def test_a_launch_bound_gpu_is_told_to_compile(text: Path):
    config = config_of(text)
    config["trainer"] |= {"accelerator": "gpu", "compile": False}
    of_rank = {0: step(forward=50, idle=50)}
    (one,) = advise(of_rank, config)
    assert one.settings == ({"trainer.compile": True}, {"data.batch_size": 64}) and "launch-bound" in one.text
    config["trainer"]["compile"] = True
    assert advise(of_rank, config)[0].settings == ({"data.batch_size": 64},)


def test_a_slow_checkpoint_names_the_background(text: Path):
    assert "Try callbacks.checkpoint.asynchronous=true or callbacks.checkpoint.every_n_steps=5000." in told(
        config_of(text), step(forward=60, checkpoint=40)
    )
    own = config_of(text, "callbacks.checkpoint.asynchronous=true")
    assert "asynchronous" not in told(own, step(forward=60, checkpoint=40))


def test_a_prediction_is_compared_where_there_is_one():
    assert list(compared(120.0, {"plan": {"predicted_step_seconds": 0.1}})) == ["plan predicted 100.0 ms a step; recorded were 120.0 ms, +20%."]
    assert not list(compared(120.0, {})) and not list(compared(120.0, {"plan": "none"}))
