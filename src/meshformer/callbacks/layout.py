"""Prints the parallel layout when training starts."""

from __future__ import annotations

import itertools
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table

from meshformer.config.degrees import Degrees
from meshformer.parallel.table import axes_table, local_sizes


class Layout(Callback):
    """Prints the mesh (axis, degree, what it splits) and the memory per rank. `settings` is the strategy config node. State: none."""

    def __init__(self, settings: dict[str, Any]):
        self.settings = settings

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        mine = local_sizes(pl_module, trainer.optimizers[0] if trainer.optimizers else None)
        everyone: list[Any] = [mine]
        if trainer.world_size > 1:
            everyone = [None] * trainer.world_size
            dist.all_gather_object(everyone, mine)
        if trainer.is_global_zero and trainer.world_size > 1:
            self._show(trainer, everyone)

    def _show(self, trainer: pl.Trainer, everyone: list[dict[str, int]]) -> None:
        degrees = Degrees.from_config(self.settings)
        device = str(trainer.strategy.root_device).partition(":")[0]
        mesh = Table("axis", "degree", "splits", title=f"{trainer.world_size} processes on {device}", title_justify="left")
        for axis, degree, text in axes_table(degrees, self.settings, trainer.strategy.blocks_per_stage):
            mesh.add_row(axis, str(degree), text)
        memory = Table("ranks", "parameters each", "weights", "gradients", "optimizer", "together")
        for column in memory.columns[1:]:
            column.justify = "right"
        first = 0
        for held, same in itertools.groupby(everyone):
            count = len(list(same))
            parts = [held["bytes"], held["gradients"], held["optimizer"]]
            ranks = f"{first}–{first + count - 1}" if count > 1 else str(first)
            memory.add_row(ranks, f"{held['parameters']:,}", *map(_size, [*parts, sum(parts)]))
            first += count
        console = Console(stderr=True)
        console.print(mesh)
        console.print(memory)


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"
