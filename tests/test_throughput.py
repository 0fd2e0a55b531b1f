"""The columns that say how fast training goes and what it waits for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jobs import run_tiny
from meshformer.callbacks.throughput import measure_matrix_rate
from meshformer.data import base
from meshformer.data.windows import Batches

MEASURED = [
    "+callbacks.throughput._target_=meshformer.callbacks.Throughput",
    "+callbacks.throughput.measure_seconds=0.01",
    "trainer.max_steps=4",
]
PAUSE = 0.05


@pytest.mark.parametrize("accumulation", [1, 2])
def test_waiting_for_training_batches_is_told_and_nothing_else(tmp_path: Path, accumulation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only batches move. Validation's, as slow, are no part of it: with them each step would wait for five more."""
    give, clock = Batches.__iter__, SimpleNamespace(now=0.0)
    monkeypatch.setattr(base, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def slowly(self: Any) -> Iterator[Any]:
        for batch in give(self):
            clock.now += PAUSE
            yield batch

    monkeypatch.setattr(Batches, "__iter__", slowly)
    validated = ["trainer.val_check_interval=1", "trainer.limit_val_batches=5", f"trainer.accumulate_grad_batches={accumulation}"]
    rows = run_tiny(tmp_path, "run", *MEASURED, *validated)
    waits = [row["train/data_wait_ms"] for row in rows]
    # Lightning takes the first step's batches and one more before the first row, and one fewer before the last.
    assert sum(waits) == pytest.approx(1e3 * PAUSE * accumulation * len(rows), rel=1e-6), waits
    assert all(wait <= 1e3 * PAUSE * (accumulation + 1) + 1e-6 for wait in waits), waits
    assert all(row["train/peak_memory_gib"] > 0 and row["train/mfu"] > 0 and "train/reserved_memory_gib" not in row for row in rows)


def test_loader_processes_are_waited_for_too(tmp_path: Path) -> None:
    plain, loaded = (run_tiny(tmp_path, name, *MEASURED, f"data.workers={n}") for name, n in (("plain", 0), ("loaded", 1)))
    assert [row["train/loss"] for row in loaded] == [row["train/loss"] for row in plain]
    assert all(row["train/data_wait_ms"] > 0 for row in loaded)


def test_the_rate_is_that_of_random_numbers_and_touches_no_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    multiplied, multiply = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: multiplied.append((a, b)) or multiply(a, b, out=out))
    before = torch.get_rng_state()
    assert measure_matrix_rate(torch.device("cpu"), torch.float32, 0.01) > 0
    assert torch.equal(torch.get_rng_state(), before)
    assert all(x.std() > 0.5 for pair in multiplied for x in pair) and not torch.equal(*multiplied[-1])
