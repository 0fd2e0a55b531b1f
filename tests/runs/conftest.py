"""One small set of real runs for all tests of this folder: two learning rates, two seeds, trained in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import run_tiny, text_file


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MESHFORMER_DATA", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def real_runs(tmp_path_factory) -> Path:
    """A folder with runs lr-…-seed-… of 6 steps, a row each, validated at 3 and 6. Tests only read it."""
    folder = tmp_path_factory.mktemp("real")
    text_file(folder)
    for rate in ("0.01", "0.1"):
        for seed in ("1", "2"):
            settings = [f"optimizer.lr={rate}", f"seed={seed}", "trainer.max_steps=6", "trainer.val_check_interval=3"]
            throughput = ["+callbacks.throughput._target_=meshformer.callbacks.Throughput", "+callbacks.throughput.measure_seconds=0.01"]
            run_tiny(folder, f"lr-{rate}-seed-{seed}", "trainer.limit_val_batches=2", *settings, *throughput)
    return folder
