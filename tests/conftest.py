"""Shared by all tests: one thread (ranks are forked, and a used OpenMP pool does not survive a fork), small configurations."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """A command that ran inside this process may have left more."""
    torch.set_num_threads(1)
