"""Speech recognition trains to the loss and gradient norm of one process in every layout but those with a context axis, on padded batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import jobs
from harness import run_ranks
from layouts import params
from meshformer.bench.tones import texts, write_table
from meshformer.command.compose import compose
from meshformer.config import ConfigError

TONES = [
    "task=speech_recognition", "model=speech_nano", "data=audio_csv", "data.batch_size=16", "data.sample_rate=8000", "data.mels=32",
    "data.context_length=64", "model.n_layers=4", "model.d_model=32", "trainer.max_steps=6", "trainer.log_every_n_steps=1",
    "trainer.val_check_interval=6", "trainer.progress=false", "trainer.threads=1", "trainer.precision=32-true", "optimizer=sgd",
    "optimizer.lr=0.1", "schedule=constant", "trainer.gradient_clip_val=0.5", "logger=csv", "~callbacks.checkpoint", "~callbacks.samples",
    "~callbacks.throughput",
]  # fmt: skip
TOLERANCE = 5e-6
LAYOUTS = {
    "ddp": (2, ["strategy=ddp"]),
    "fsdp": (2, ["strategy=fsdp", "trainer.accumulate_grad_batches=2"]),
    "tensor": (2, ["strategy=tensor"]),
    "tensor without sequence parallel": (2, ["strategy=tensor", "strategy.sequence_parallel=false"]),
    "pipeline": (2, ["strategy=pipeline"]),
    "fsdp_tensor": (4, ["strategy=fsdp_tensor"]),
    "tensor_pipeline": (4, ["strategy=tensor_pipeline", "strategy.microbatches=4"]),
}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("tones"), texts(60))


def rows(table: Path, name: str, overrides: list[str]) -> list[dict[str, Any]]:
    cache = f"paths.data={table.parent / 'cache'}"
    return jobs._run(table.parent / name, compose([*TONES, f"data.file={table}", cache, *overrides]), False)


@pytest.fixture(scope="module")
def one(table: Path) -> list[dict[str, Any]]:
    return run_ranks(1, rows, table, "one", [])[0]


def distance(ours: list[dict[str, Any]], one: list[dict[str, Any]]) -> float:
    """The largest difference of loss or relative difference of gradient norm over the steps."""
    assert [row["step"] for row in ours] == [row["step"] for row in one] == list(range(1, 7))
    losses = (abs(a["train/loss"] - b["train/loss"]) for a, b in zip(ours, one, strict=True))
    norms = (abs(a["train/grad_norm"] / b["train/grad_norm"] - 1) for a, b in zip(ours, one, strict=True))
    return max(*losses, *norms)


@pytest.mark.parametrize("layout", params(LAYOUTS, ["tensor without sequence parallel", "ddp", "fsdp_tensor", "tensor_pipeline"]))
def test_every_layout_trains_to_the_loss_of_one_process(table: Path, one: list[dict[str, Any]], layout: str) -> None:
    processes, overrides = LAYOUTS[layout]
    ours = run_ranks(processes, rows, table, layout.replace(" ", "-"), [*overrides, f"trainer.devices={processes}"], timeout=240)[0]
    assert distance(ours, one) < TOLERANCE
    assert abs(ours[-1]["val/loss"] - one[-1]["val/loss"]) < TOLERANCE
    assert (ours[-1]["val/cer"], ours[-1]["val/wer"]) == pytest.approx((one[-1]["val/cer"], one[-1]["val/wer"]), abs=1e-6)


def test_another_order_of_samples_is_seen(table: Path, one: list[dict[str, Any]]) -> None:
    other = run_ranks(1, rows, table, "other", ["data.mask_mels=4"])[0]
    assert distance(other, one) > 100 * TOLERANCE


def test_a_context_axis_is_refused(table: Path) -> None:
    with pytest.raises(ConfigError, match=r"strategy\.context=2: cuts sequences .* the loss of speech recognition is over a whole recording"):
        compose([*TONES, f"data.file={table}", "strategy=context", "trainer.devices=2"])
