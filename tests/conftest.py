"""Shared by all tests: one thread (ranks are forked, and a used OpenMP pool does not survive a fork), small configurations."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)
gc.disable()  # until all tests are imported

# Files go to the workers whole, in the order in which they are collected: were a long one the last, all other workers would wait for it.
LONGEST = (
    "test_sweep.py", "test_parity.py", "test_preemption.py", "test_launch.py", "test_foreign.py", "test_resume_layouts.py", "test_unfinished.py",
    "test_faults.py", "test_gpu_bench.py", "test_doctor.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_collection_finish() -> None:
    """What was imported stays to the end. Frozen, no collection walks it, in this process or in one forked from it (whose memory would be copied)."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """A command that ran inside this process may have left more."""
    torch.set_num_threads(1)
