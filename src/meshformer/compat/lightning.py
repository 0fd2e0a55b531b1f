"""Private names of Lightning (written for 2.6)."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

# What Lightning's training loop calls its profiler with before it fetches a batch: the one moment between two steps.
FETCH = "[_TrainingEpochLoop].train_dataloader_next"


def disable_signal_handling(trainer: pl.Trainer) -> None:
    """Disables Lightning's signal handling, since callbacks.Preemption does it. Lightning communicates inside its handlers and broadcasts after
    every step, with a sync, whether rank 0 received SIGTERM. The Trainer has no option to turn that off."""
    connector: Any = trainer._signal_connector
    connector.register_signal_handlers = lambda: None
    loop: Any = trainer.fit_loop.epoch_loop
    loop._broadcast_sigterm_tensor = lambda: None


class MicroBatches(pl.LightningModule):
    """A module whose training batches are lists of micro-batches. The step moves each to the device and calls the transfer hooks for it.

    Lightning would call the hook `on_before_batch_transfer` with the whole list.
    """

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        return batch if isinstance(batch, list) else super()._on_before_batch_transfer(batch, dataloader_idx)


def micro_batch_to_device(task: Any, batch: Any) -> Any:
    """Moves a micro-batch, with the hooks on_before_batch_transfer, transfer_batch_to_device and on_after_batch_transfer."""
    return task.trainer.strategy.batch_to_device(task._on_before_batch_transfer(batch))


def without_transfer_hook(task: Any) -> None:
    """For a task outside of `Trainer.fit`, which attaches the data module in which Lightning looks for the hook."""
    task._on_before_batch_transfer = lambda batch, dataloader_idx=0: batch
