"""The base of all data modules: the position as one integer, the same order of samples in every layout, and this rank's batches."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from meshformer.config.errors import ConfigError
from meshformer.data.tokenizer import Tokenizer, load_tokenizer
from meshformer.data.windows import Batch, Batches, FirstSamples, GlobalBatchSampler, Order, collated


class Steps:
    """Yields one list of this rank's micro-batches for each optimizer step. Adds the time spent waiting for them to ``data.waited``."""

    def __init__(self, loader: Batches | DataLoader[Batch], data: SampledData) -> None:
        self.loader, self.data = loader, data

    def __len__(self) -> int:
        return len(self.loader) // self.data.accumulation

    def __iter__(self) -> Iterator[list[Batch]]:
        batches = iter(self.loader)
        while True:
            begun = time.perf_counter()
            step = list(islice(batches, self.data.accumulation))
            self.data.waited += time.perf_counter() - begun
            if not step:
                return
            yield step

    def __getattr__(self, name: str) -> Any:  # Lightning reads attributes of a DataLoader: sampler, num_workers, …
        if name == "loader":  # copy and pickle look attributes up before `__init__` has set `loader`
            raise AttributeError(name)
        return getattr(self.loader, name)


class SampledData(LightningDataModule):
    """Base class of the data modules. A subclass implements ``order``, ``training_set``, ``eval_batches``, ``identity`` and ``model_settings``.

    Args:
        batch_size: samples in one optimizer step over all processes and micro-batches.
        seed: determines the order of the samples.
        eval_batch_size: samples in one evaluation batch over all data-parallel ranks, rounded up to a multiple of them; by default as
            many as a training micro-batch. It changes speed and memory, never the result.
        workers: loader processes for training; 0 is fastest for data in memory.
        accumulation: micro-batches in one optimizer step.

    ``samples`` is the position in the data: training samples consumed so far, over all epochs and processes. callbacks/checkpoint.py sets it
    after each optimizer step; the checkpoint saves it, and the next ``train_dataloader()`` starts there.
    ``waited`` counts the seconds that this process has waited for its training batches.
    ``classes`` names the classes of labelled data; ``mean_length`` is the mean number of tokens in a sample, None for images.
    """

    classes: list[str] | None = None
    mean_length: float | None = None
    tokenizer: Any = None

    def __init__(self, batch_size: int, seed: int, eval_batch_size: int | None = None, workers: int = 0, accumulation: int = 1) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.seed = seed
        self.eval_batch_size = eval_batch_size
        self.workers = workers
        self.accumulation = accumulation
        self.overfit_batches: int | None = None  # set by job/build.py: train on the first batches again and again
        self.samples = 0
        self.waited = 0.0

    # Abstract methods, implemented by TextData, SequenceData and ImageData.

    def order(self) -> Order:
        """The order of the training samples."""
        raise NotImplementedError

    def training_set(self) -> Any:
        """A picklable dataset whose ``__getitems__`` takes what the sampler yields and returns a collated batch."""
        raise NotImplementedError

    def eval_batches(self, split: str, batch_size: int, data_rank: int, data_world: int) -> Any:
        """A sequence of this rank's batches of ``batch_size`` samples, as many on every rank."""
        raise NotImplementedError

    @property
    def identity(self) -> str:
        """A string that identifies the samples: two data modules with the same samples have the same string."""
        raise NotImplementedError

    def model_settings(self) -> dict[str, int]:
        """The sizes that a model takes from its data."""
        raise NotImplementedError

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch, whatever the number of ranks."""
        return self._sampler(data_rank=0, data_world=1, accumulation=1).steps_per_epoch

    def train_dataloader(self) -> Steps:
        """This rank's micro-batches, a list for each step, from ``samples`` on."""
        return Steps(self._train_loader(), self)

    def _train_loader(self) -> Batches | DataLoader[Batch]:
        sampler = self._sampler(*self._data_axis(), self.accumulation, self.samples)
        samples = self.training_set()
        if self.workers == 0:
            return Batches(samples.__getitems__, sampler, self._on_gpu())
        return DataLoader(
            samples,
            batch_sampler=sampler,  # pyright: ignore[reportArgumentType]  # it yields arrays, which DataLoader passes to __getitems__ unchanged
            collate_fn=collated,  # pyright: ignore[reportArgumentType]  # __getitems__ returns a collated batch
            num_workers=self.workers,
            persistent_workers=True,
            pin_memory=self._on_gpu(),
            worker_init_fn=_ignore_stop_signals,
            # forkserver, the default, starts a server process in each rank; a signal to the process group ends it and the loader workers.
            multiprocessing_context="fork" if "fork" in multiprocessing.get_all_start_methods() else None,
            generator=torch.Generator(),  # without it, each iterator would draw a seed from the global generator
        )

    def val_dataloader(self) -> Batches:
        return self._eval_dataloader("val")

    def test_dataloader(self) -> Batches:
        return self._eval_dataloader("test")

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples, "seed": self.seed, "identity": self.identity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ConfigError when the position belongs to another order of samples: other data, tokenizer or seed."""
        if state_dict["identity"] != self.identity:
            raise ConfigError(
                "the checkpoint was trained on other text or with another tokenizer than this run's data",
                fix="Restore the files it was trained on, or start with stage=finetune stage.init_from=RUN, which takes the weights alone",
            )
        if state_dict["seed"] != self.seed:
            raise ConfigError(f"the checkpoint's order of samples was drawn with seed {state_dict['seed']}", "seed", self.seed)
        self.samples = state_dict["samples"]

    def _sampler(self, data_rank: int, data_world: int, accumulation: int, start_sample: int = 0) -> GlobalBatchSampler:
        order = self.order()
        if self.overfit_batches is not None:
            order = FirstSamples(order, self.overfit_batches * self.batch_size)
        return GlobalBatchSampler(order, self.batch_size, accumulation, data_rank, data_world, start_sample)

    def _eval_dataloader(self, split: str) -> Batches:
        data_rank, data_world = self._data_axis()
        wanted = self.batch_size // self.accumulation if self.eval_batch_size is None else self.eval_batch_size
        batches = self.eval_batches(split, max(1, -(-wanted // data_world)), data_rank, data_world)
        return Batches(batches.__getitem__, range(len(batches)), self._on_gpu())

    def _data_axis(self) -> tuple[int, int]:
        """(rank, size) along the data axis: the strategy knows which processes share a batch."""
        axis = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return (axis["rank"], axis["num_replicas"]) if axis else (0, 1)

    def _on_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"


class FolderData(SampledData):
    """Samples that are prepared in a folder of the cache, with their tokenizer. A subclass implements ``prepared_folder`` too."""

    # Abstract method, implemented by SequenceData and SpeechData.

    def prepared_folder(self) -> Path:
        """The folder, made where the cache has none; of several processes, the first to get the lock makes it."""
        raise NotImplementedError

    @cached_property
    def folder(self) -> Path:
        return self.prepared_folder()

    @cached_property
    def tokenizer(self) -> Tokenizer:  # pyright: ignore[reportIncompatibleVariableOverride]
        return load_tokenizer(self.folder / "tokenizer.json")

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def prepare_data(self) -> None:
        _ = self.folder

    def setup(self, stage: str | None = None) -> None:
        _ = self.folder


def _ignore_stop_signals(worker: int) -> None:
    """Ignore stop signals in a loader worker: SLURM, Kubernetes and Ctrl-C send them to the whole process group, and the trainer needs its workers
    until its current step ends.

    A worker exits when the trainer shuts it down, or within seconds of the trainer's death (torch's worker loop watches its parent process).
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
