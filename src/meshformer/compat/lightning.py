"""Private names of Lightning (written for 2.6)."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl


def leave_signals_to_us(trainer: pl.Trainer) -> None:
    """Signals are callbacks.Preemption's. Lightning's handlers communicate from inside a handler, and its loop broadcasts between every two
    steps whether rank 0 was told to stop, and waits for the answer. No option of the Trainer's turns either off."""
    connector: Any = trainer._signal_connector
    connector.register_signal_handlers = lambda: None
    loop: Any = trainer.fit_loop.epoch_loop
    loop._broadcast_sigterm_tensor = lambda: None


class MicroBatches(pl.LightningModule):
    """A module whose training batches are lists of micro-batches: hooks on transfers are called for each of them, by the step.

    Lightning calls its own `_on_before_batch_transfer` with whatever the loader gave, and through it the hook of that name, of module or data.
    """

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        return batch if isinstance(batch, list) else super()._on_before_batch_transfer(batch, dataloader_idx)


def micro_batch_to_device(task: Any, batch: Any) -> Any:
    """With the hooks on_before_batch_transfer, transfer_batch_to_device and on_after_batch_transfer."""
    return task.trainer.strategy.batch_to_device(task._on_before_batch_transfer(batch))
