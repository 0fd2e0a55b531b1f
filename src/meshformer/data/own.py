"""A user's LightningDataModule as a data module of ours: a batch of its loader is an optimizer step, of which each process takes its rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DistributedSampler

from meshformer.config.errors import ConfigError
from meshformer.data.base import SampledData, Steps
from meshformer.data.windows import IGNORED


class OwnData(SampledData):
    """`module`, a LightningDataModule of the user's, in every layout that splits samples.

    Every process reads the same batches: the global random generator is seeded with (seed, epoch) before an epoch, so that shuffling agrees. A batch
    of `data.batch_size` samples is one optimizer step; each rank and micro-batch takes its share of the rows of every tensor and list in it. A
    smaller last batch is left out of training. A resumed epoch reads and drops the batches that were trained on.

    `dicts`: whether the batches must be dicts of tensors, as the tasks of this program read them.
    """

    def __init__(self, module: LightningDataModule, lock: Path, dicts: bool, **shared: Any) -> None:
        super().__init__(**shared)
        self.module, self.lock, self.dicts = module, lock, dicts
        self.path = f"{type(module).__module__}.{type(module).__qualname__}"
        self._steps: int | None = None

    def prepare_data(self) -> None:
        self.lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.lock):  # of several processes, one at a time: the first downloads
            self.module.prepare_data()
        self.module.setup("fit")

    def setup(self, stage: str) -> None:
        self.module.trainer = self.trainer
        if stage != "fit":  # prepare_data has called it for training
            self.module.setup(stage)

    def teardown(self, stage: str) -> None:
        self.module.teardown(stage)

    @property
    def identity(self) -> str:
        return self.path

    def model_settings(self) -> dict[str, int]:
        return {}

    @property
    def steps_per_epoch(self) -> int:
        if self._steps is None:
            self._steps = self._full_batches(self._loader("train"))
        return self._steps if self.overfit_batches is None else min(self._steps, self.overfit_batches)

    def _full_batches(self, loader: Any) -> int:
        try:
            number = len(loader)
        except TypeError:
            message = f"the training loader of {self.path} has no length, and an epoch needs one"
            raise ConfigError(message, "data.source._target_", self.path, fix="Give its dataset __len__.") from None
        size = getattr(loader, "batch_size", None)
        if size is not None and size != self.batch_size:
            message = f"counts the samples of an optimizer step, and a batch of {self.path} has {size}"
            raise ConfigError(message, "data.batch_size", self.batch_size, fix=f"Use data.batch_size={size}, or let its __init__ take batch_size.")
        partial = size is not None and not getattr(loader, "drop_last", False) and len(loader.dataset) % size != 0
        if number - partial < 1:
            raise ConfigError(f"{self.path} has no batch of that size", "data.batch_size", self.batch_size, fix="Use a smaller one.")
        return number - partial

    def _loader(self, part: str) -> Any:
        loader = getattr(self.module, f"{part}_dataloader")()
        if isinstance(loader, list | tuple | dict) and part != "train" and len(loader) == 1:
            loader = next(iter(loader.values() if isinstance(loader, dict) else loader))
        if isinstance(loader, list | tuple | dict):
            raise ConfigError(f"{part}_dataloader gives several loaders", "data.source._target_", self.path, fix="Give one.")
        if isinstance(getattr(loader, "sampler", None), DistributedSampler):
            message = f"{part}_dataloader has a DistributedSampler, and each process takes its rows of every batch here already"
            raise ConfigError(message, "data.source._target_", self.path, fix="Leave the sampler out.")
        return loader

    def train_dataloader(self) -> Steps:
        return Steps(_Training(self, self._loader("train"), *self._data_axis()), self)  # pyright: ignore[reportArgumentType]

    def _eval_dataloader(self, split: str) -> Any:
        return _Evaluation(self, self._loader(split), *self._data_axis())

    def checked(self, batch: Any) -> Any:
        """`batch`, if the task can read it."""
        if self.dicts and not (isinstance(batch, dict) and all(isinstance(x, Tensor) for x in batch.values())):
            message = f"gives batches that are {type(batch).__name__}, and the tasks of this program read dicts of tensors (tokens, targets)"
            fix = "Return such a dict from collate_fn, or write a LightningModule as the task."
            raise ConfigError(message, "data.source._target_", self.path, fix=fix)
        return batch


class _Training:
    """This rank's micro-batches from `data.samples` to the end of that epoch. `len()` is that of a whole epoch, as Lightning counts."""

    def __init__(self, data: OwnData, loader: Any, rank: int, world: int) -> None:
        self.data, self.loader, self.rank, self.world = data, loader, rank, world
        self.position = data.samples

    def __len__(self) -> int:
        return self.data.steps_per_epoch * self.data.accumulation

    def __iter__(self) -> Iterator[Any]:
        data, steps = self.data, self.data.steps_per_epoch
        epoch, done = divmod(self.position // data.batch_size, steps)
        batches = seeded(self.loader, data.seed * 1_000_003 + (0 if data.overfit_batches else epoch))
        parts = self.world * data.accumulation
        for step, batch in enumerate(batches):
            if step >= steps:
                return
            if step < done:
                continue
            rows = rows_of(data.checked(batch))
            if rows != data.batch_size:
                message = f"counts the samples of an optimizer step, and a batch of {data.path} has {rows}"
                raise ConfigError(message, "data.batch_size", data.batch_size, fix=f"Use data.batch_size={rows}.")
            size = rows // parts
            for micro in range(data.accumulation):
                first = (micro * self.world + self.rank) * size
                if micro + 1 == data.accumulation:
                    self.position = (epoch * steps + step + 1) * data.batch_size
                yield cut(batch, rows, slice(first, first + size))


class _Evaluation:
    """This rank's rows of every batch. Where they do not divide by the ranks, the last row is repeated; repeated `targets` are ignored."""

    def __init__(self, data: OwnData, loader: Any, rank: int, world: int) -> None:
        self.data, self.loader, self.rank, self.world = data, loader, rank, world

    def __len__(self) -> int:
        return 0 if self.loader is None else len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in seeded(self.loader, self.data.seed):
            rows = rows_of(self.data.checked(batch))
            size = -(-rows // self.world)
            index = torch.arange(self.rank * size, (self.rank + 1) * size)
            share = cut(batch, rows, index.clamp(max=rows - 1))
            if isinstance(share, dict) and isinstance(share.get("targets"), Tensor) and not share["targets"].is_floating_point():
                share["targets"][index >= rows] = IGNORED
            yield share


def seeded(loader: Any, seed: int) -> Iterator[Any]:
    """The batches of `loader`, shuffled by `seed`: the sampler and the workers draw their seeds from the global generator at the first batch.

    The generator's own state is left as it was, so that a validation does not change the training after it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        batches = iter(loader)
        first = next(batches, None)
    if first is not None:
        yield first
        yield from batches


def rows_of(batch: Any) -> int:
    """The number of samples in a batch: the length of its first tensor with a dimension."""
    for x in _leaves(batch):
        if isinstance(x, Tensor) and x.ndim:
            return x.shape[0]
    raise ConfigError("a batch holds no tensor, so its samples cannot be counted", "data.source._target_", fix="Return tensors from collate_fn.")


def _leaves(batch: Any) -> Iterator[Any]:
    if isinstance(batch, Mapping | list | tuple):
        for x in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _leaves(x)
    else:
        yield batch


def cut(batch: Any, rows: int, index: slice | Tensor) -> Any:
    """The rows `index` of everything in `batch` that has `rows` of them: tensors, and lists of texts or numbers.

    A list of tensors, as torch's default collate_fn makes them, becomes a tuple: the list of a step's micro-batches is told from a batch by that.
    """
    if isinstance(batch, Tensor):
        return batch[index] if batch.ndim and batch.shape[0] == rows else batch
    if isinstance(batch, Mapping):
        return {name: cut(x, rows, index) for name, x in batch.items()}
    if not isinstance(batch, list | tuple):
        return batch
    if len(batch) == rows and not any(isinstance(x, Tensor | list | tuple | Mapping) for x in batch):
        return batch[index] if isinstance(index, slice) else [batch[i] for i in index.tolist()]
    parts = [cut(x, rows, index) for x in batch]
    return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)
