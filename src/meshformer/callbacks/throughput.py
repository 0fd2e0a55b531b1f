"""Throughput of training: tokens per second, and MFU relative to the device's measured matrix product rate."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback


class Throughput(Callback):
    """Adds columns for all ranks, train/tokens_per_second (without validation and checkpoints) and train/mfu, and for rank 0 train/data_wait_ms (time
    per step that the host waited for batches, while a GPU may have been busy), train/peak_memory_gib and, on a GPU, train/reserved_memory_gib
    (the most that torch's caching allocator reserved).

    MFU (Chowdhery et al. 2022, appendix B) = FLOP/s of the model's matrix products / FLOP/s of large matrix products of this dtype on this device,
    measured for `measure_seconds` when training starts instead of taken from a data sheet. State: none.
    """

    def __init__(self, measure_seconds: float = 0.2):
        self.measure_seconds = measure_seconds
        self.matrix_rate: float | None = None  # FLOP/s of one device
        self._since, self._since_step, self._paused_at, self._waited = 0.0, 0, 0.0, 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        dtype = torch.bfloat16 if "bf16" in str(trainer.precision) else torch.float16 if "16" in str(trainer.precision) else torch.float32
        self.matrix_rate = measure_matrix_rate(pl_module.device, dtype, self.measure_seconds)
        self._since, self._since_step, self._waited = time.perf_counter(), trainer.global_step, _waited(trainer)

    def measure(self, trainer: pl.Trainer, pl_module: Any) -> dict[str, float]:
        now, step = time.perf_counter(), trainer.global_step
        steps, waited = step - self._since_step, _waited(trainer)
        rate = steps * pl_module.tokens_per_step / max(now - self._since, 1e-9)
        assert self.matrix_rate is not None
        values = {"train/tokens_per_second": rate, "train/data_wait_ms": 1e3 * (waited - self._waited) / max(steps, 1)}
        self._since, self._since_step, self._waited = now, step, waited
        if hasattr(pl_module, "flops_per_token"):  # set for our models only
            values["train/mfu"] = rate * pl_module.flops_per_token / (self.matrix_rate * trainer.world_size)
        if (peak := peak_memory(pl_module.device)) is not None:
            values["train/peak_memory_gib"] = peak / 2**30
        if pl_module.device.type == "cuda":
            values["train/reserved_memory_gib"] = torch.cuda.max_memory_reserved(pl_module.device) / 2**30
        return values

    # The time of validation, samples and checkpoints is excluded by moving the start of the interval forward.

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._pause()

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._pause()

    def _pause(self) -> None:
        self._paused_at = self._paused_at or time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._paused_at:
            self._since += time.perf_counter() - self._paused_at
            self._paused_at = 0.0


def measure_matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """FLOP/s of square matrix products of `dtype` on `device`: the fastest of repeated products over about `seconds`.

    The size doubles until one product takes a fortieth of `seconds`, so that launch overhead does not matter on a GPU and a CPU that emulates the
    dtype is not measured for too long. The matrices are random, because GPUs multiply constant ones faster, at less power. Resets the GPU's memory
    statistics and leaves the global random state unchanged.
    """
    draw = torch.Generator(device).manual_seed(0)

    def once(n: int, times: int) -> float:
        a, b = (torch.empty(n, n, device=device, dtype=dtype).uniform_(-1, 1, generator=draw) for _ in range(2))
        out = a @ b
        best = float("inf")
        for _ in range(times):
            _wait(device)
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            _wait(device)
            best = min(best, time.perf_counter() - start)
        return best

    n = 128
    while n < 8192 and once(n, 3) < seconds / 40:  # best of three, so that one interruption does not end the search
        n *= 2
    n = max(128, n // 2)
    best = once(n, max(2, int(seconds / max(once(n, 3), 1e-6))))
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return 2 * n**3 / best


def _waited(trainer: Any) -> float:
    """Seconds that the host has waited for batches; 0 for a user's data module without `waited`."""
    return getattr(trainer.datamodule, "waited", 0.0)


def peak_memory(device: torch.device) -> int | None:
    """Peak memory in bytes: of tensors on a GPU; of the whole process on a CPU, on Linux only (None elsewhere)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status", "rb") as file:  # getrusage would include the parent's memory
            _, _, peak = file.read().partition(b"VmHWM:")
    except OSError:
        return None
    return int(peak.split(maxsplit=1)[0]) * 1024 if peak else None


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
