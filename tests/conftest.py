"""Shared by all tests: one thread (ranks are forked, and a used OpenMP pool does not survive a fork), small configurations."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
