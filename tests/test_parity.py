"""Every layout trains to the same loss and the same global gradient norm as one process: clipped SGD, which hides no wrong scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness import run_ranks
from jobs import run_tiny, text_file
from meshformer.tasks import LanguageModelling

STEPS = 10
PARITY = [
    f"trainer.max_steps={STEPS}",
    "optimizer=sgd",
    "optimizer.lr=0.5",
    "schedule=constant",
    "model.zero_init=false",  # every parameter has a gradient from the first step on
    "trainer.gradient_clip_val=0.5",
    "trainer.val_check_interval=5",
]
TOLERANCE = 5e-6


def rows(folder: Path, name: str, overrides: tuple[str, ...], ignore: bool = False, break_it: Any = None) -> list[dict[str, Any]]:
    if ignore:  # about half the targets, unevenly over ranks and micro-batches: the mean of means is then wrong
        losses = LanguageModelling.losses

        def some_ignored(self: Any, batch: dict[str, Any], phase: str) -> Any:
            keep = (batch["tokens"] * 7 + batch["tokens"].cumsum(1)) % 11 < 2 + batch["tokens"][:, :1] % 9
            return losses(self, {**batch, "targets": batch["targets"].masked_fill(~keep, -100)}, phase)

        LanguageModelling.losses = some_ignored
    try:
        if break_it:
            break_it()
        return run_tiny(folder, name, *PARITY, *overrides)
    finally:
        if ignore:
            LanguageModelling.losses = losses


def differences(ours: list[dict[str, Any]], reference: list[dict[str, Any]]) -> dict[str, float]:
    """Largest difference over the steps: absolute for losses, relative for the gradient norm."""
    assert [r["step"] for r in ours] == [r["step"] for r in reference] == list(range(1, STEPS + 1))
    loss = max(abs(a["train/loss"] - b["train/loss"]) for a, b in zip(ours, reference, strict=True))
    norm = max(abs(a["train/grad_norm"] / b["train/grad_norm"] - 1) for a, b in zip(ours, reference, strict=True))
    val = max(abs(a["val/loss"] - b["val/loss"]) for a, b in zip(ours, reference, strict=True) if "val/loss" in b)
    return {"loss": loss, "grad_norm": norm, "val": val}


@pytest.mark.parametrize("ignore", [False, True], ids=["all tokens", "ignored tokens"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_ddp_on_two_ranks_equals_one_process(tmp_path: Path, ignore: bool, accumulation: int, tied: bool) -> None:
    text_file(tmp_path)
    model = f"model.tie_embeddings={str(tied).lower()}"
    reference = rows(tmp_path, "one", (model,), ignore)
    layout = ("strategy=ddp", "trainer.devices=2", f"trainer.accumulate_grad_batches={accumulation}", model)
    ours, _ = run_ranks(2, rows, tmp_path, "two", layout, ignore)
    found = differences(ours, reference)
    assert max(found.values()) < TOLERANCE, found
    assert reference[-1]["train/loss"] < reference[0]["train/loss"] - 0.1, "the comparison needs training that moves"
    assert max(r["train/grad_norm"] for r in reference) > 0.5, "the comparison needs clipping that acts"


def test_rows_of_several_steps_are_means_over_all_ranks(tmp_path: Path) -> None:
    text_file(tmp_path)
    every = "trainer.log_every_n_steps=5"
    reference = rows(tmp_path, "one", (every,), True)
    ours, _ = run_ranks(2, rows, tmp_path, "two", ("strategy=ddp", "trainer.devices=2", every), True)
    assert [r["step"] for r in ours] == [r["step"] for r in reference] == [5, 10]
    assert max(abs(a["train/loss"] - b["train/loss"]) for a, b in zip(ours, reference, strict=True)) < TOLERANCE


def test_accumulation_on_one_process_changes_nothing(tmp_path: Path) -> None:
    text_file(tmp_path)
    reference = rows(tmp_path, "one", (), True)
    found = differences(rows(tmp_path, "four", ("trainer.accumulate_grad_batches=4",), True), reference)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("mistake", ["gradient scale", "mean of means"])
def test_negative_control_a_wrong_weight_is_seen(tmp_path: Path, mistake: str) -> None:
    """The suite would notice a gradient scaled by 1 %, and a mean of means instead of the mean over tokens."""
    text_file(tmp_path)
    reference = rows(tmp_path, "one", (), True)

    def wrong_scale() -> None:
        step = LanguageModelling.training_step
        LanguageModelling.training_step = lambda self, batch, index: 1.01 * step(self, batch, index)  # pyright: ignore

    def mean_of_means() -> None:
        step = LanguageModelling.losses

        def means(self: Any, batch: dict[str, Any], phase: str) -> Any:
            loss_sum, count = step(self, batch, phase)
            return loss_sum / count * 64, count * 0 + 64

        LanguageModelling.losses = means

    broken = {"gradient scale": wrong_scale, "mean of means": mean_of_means}[mistake]
    ours, _ = run_ranks(2, rows, tmp_path, "two", ("strategy=ddp", "trainer.devices=2"), True, broken)
    found = differences(ours, reference)
    assert found["grad_norm"] > 100 * TOLERANCE, found
