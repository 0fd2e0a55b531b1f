"""Windows of tokens, and the order of the training samples.

B samples in a batch, T time (context length). A batch is ``{"tokens": (B, T), "targets": (B, T)}``, both int64; ``targets`` is ``tokens``
one step later, and IGNORED where there is nothing to predict.

Training order is a function of (seed, epoch, sample number) alone. Ranks and micro-batches are slices of that one order, so an optimizer
step has the same samples for any number of ranks, and one integer, the samples consumed so far, is the position to resume from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from meshformer.config.errors import ConfigError
from meshformer.data.tokenizer import Tokens
from meshformer.model.settings import IGNORED

Batch = dict[str, Tensor]
Starts = npt.NDArray[np.int64]


class _TokenFile:
    """Tokens as a plain array for speed (indexing a ``np.memmap`` costs three times as much), reopened by name in loader workers."""

    def __init__(self, tokens: Tokens) -> None:
        self._file = tokens
        self.array = np.asarray(tokens)

    def check(self, ids: Tokens, vocab_size: int | None) -> None:
        """ConfigError for an id outside the vocabulary. Only some blocks of a large file are verified at a start."""
        if vocab_size is not None and ids.max(initial=0) >= vocab_size:
            place = Path(self._file.filename).parent if isinstance(self._file, np.memmap) and self._file.filename else "the prepared data"
            message = f"the prepared tokens hold the id {ids.max()}, and there are {vocab_size} tokens: the file was damaged on its disk"
            raise ConfigError(message, "data", fix=f"Delete {place}; the next start prepares it anew")

    def __len__(self) -> int:
        return len(self.array)

    def __getstate__(self) -> dict[str, Any]:
        file = self._file
        if isinstance(file, np.memmap):  # pickling would send the whole corpus to every worker
            return {"path": file.filename, "dtype": file.dtype, "offset": file.offset, "shape": file.shape}
        return {"array": self.array}

    def __setstate__(self, state: dict[str, Any]) -> None:
        file = state["array"] if "array" in state else np.memmap(state["path"], state["dtype"], "r", state["offset"], state["shape"])
        self.__init__(file)


class WindowDataset(Dataset[Batch]):
    """Training samples, indexed by their first token. A window is ``context_length + 1`` tokens, its input the first T, its targets the last T."""

    def __init__(self, tokens: Tokens, context_length: int, vocab_size: int | None = None) -> None:
        self._tokens, self._vocab_size = _TokenFile(tokens), vocab_size
        self._reach = np.arange(context_length + 1)

    def __len__(self) -> int:
        return max(0, len(self._tokens) - len(self._reach) + 1)

    def __getitem__(self, start: int) -> Batch:
        """Return one sample: ``tokens`` and ``targets`` of shape (T,)."""
        return {name: value[0] for name, value in self.__getitems__([start]).items()}

    def __getitems__(self, starts: Sequence[int] | Starts) -> Batch:
        """Return a whole batch, already collated. DataLoader calls this with what its ``batch_sampler`` yields."""
        positions = np.asarray(starts)[:, None] + self._reach
        windows = self._tokens.array[positions]
        self._tokens.check(windows, self._vocab_size)
        # NumPy copies small arrays faster than torch (8 × 256 tokens: 20 µs a batch instead of 40).
        inputs, targets = (part.astype(np.int64, order="C") for part in (windows[:, :-1], windows[:, 1:]))
        return {"tokens": torch.from_numpy(inputs), "targets": torch.from_numpy(targets)}


def collated(batch: Batch) -> Batch:
    """DataLoader's ``collate_fn`` for a dataset that returns whole batches (a named function, so that it pickles)."""
    return batch


class Batches:
    """A loader in this process: ``read(key)`` for each key.

    Stands where ``DataLoader(num_workers=0)`` would, which adds 75 us of its own to a batch that takes 20 us to read, and draws a number
    from the global random generator each time it starts, so that a validation would change the training after it.
    """

    def __init__(self, read: Callable[[Any], Batch], keys: Sampler[Any] | range, pin_memory: bool = False) -> None:
        self.read = read
        self.keys = keys
        self.pin_memory = pin_memory

    def __len__(self) -> int:
        return len(self.keys)  # pyright: ignore[reportArgumentType]  # torch's Sampler declares no length, ours has one

    def __iter__(self) -> Iterator[Batch]:
        for key in self.keys:
            batch = self.read(key)
            yield {name: value.pin_memory() for name, value in batch.items()} if self.pin_memory else batch


class Order(Protocol):
    """``starts(epoch)``: for each of the epoch's ``n_samples`` samples the key that the dataset takes, a number or a row of numbers,
    which depends on (seed, epoch) only. ``told``: a sentence with the number of samples, for error messages."""

    n_samples: int
    told: str

    def starts(self, epoch: int) -> Starts: ...


class EpochOrder:
    """The first token of each sample, epoch by epoch.

    An epoch cuts the tokens into N windows, one every T tokens, from an offset in 0 … T-1, in a random order. Offset and order are drawn anew in
    each epoch. N is the same every epoch: ``n_tokens // T - 1``, or 1 for a text shorter than 2T.
    """

    def __init__(self, n_tokens: int, context_length: int, seed: int) -> None:
        if n_tokens < context_length + 1:
            raise ConfigError(
                f"the training text has {n_tokens} tokens and one sample needs {context_length + 1}", "data.context_length", context_length
            )
        self.seed = seed
        self.context_length = context_length
        self.n_samples = max(1, n_tokens // context_length - 1)
        self.told = f"the training text has only {self.n_samples} samples of {context_length} tokens"
        self._n_offsets = min(context_length, n_tokens - self.n_samples * context_length)

    def starts(self, epoch: int) -> Starts:
        """Token positions at which the epoch's samples 0 … N-1 start, shape (N,)."""
        generator = np.random.default_rng([self.seed, epoch])
        offset = int(generator.integers(self._n_offsets))
        return generator.permutation(self.n_samples) * self.context_length + offset


class FirstSamples:
    """The first ``n_samples`` samples of an order's first epoch, the same in every epoch: ``trainer.overfit_batches``."""

    def __init__(self, order: Order, n_samples: int) -> None:
        self.inner, self.n_samples, self.told = order, min(n_samples, order.n_samples), order.told

    def starts(self, epoch: int) -> Starts:
        return self.inner.starts(0)[: self.n_samples]


class GlobalBatchSampler(Sampler[Starts]):
    """One rank's micro-batches: arrays of ``batch_size / (data_world * accumulation)`` starts, cut from the global order.

    Args:
        batch_size: samples in one optimizer step, over all ranks and micro-batches.
        accumulation: micro-batches in one optimizer step.
        data_rank, data_world: index and number of the data-parallel slices; the ranks of a tensor or pipeline group share one.
        start_sample: samples consumed before, over all epochs.

    An epoch is ``N // batch_size`` full steps. ``len()`` is the number of micro-batches of a whole epoch, also after a resume in the middle of one,
    because a trainer counts batches from the epoch's start. Iterating yields the batches from ``position`` to the end of that epoch. There is
    no ``set_epoch``, since Lightning's epoch is one too high after a resume in the middle of an epoch.
    """

    def __init__(
        self, order: Order, batch_size: int, accumulation: int = 1, data_rank: int = 0, data_world: int = 1, start_sample: int = 0
    ) -> None:
        parts = data_world * accumulation
        if batch_size < 1 or batch_size % parts:
            below = batch_size // parts * parts
            nearest = f"{below} or {below + parts}" if below > 0 else f"{parts}"
            message = f"{data_world} data-parallel ranks x {accumulation} micro-batches do not divide it"
            raise ConfigError(message, "data.batch_size", batch_size, f"Use {nearest}")
        self.steps_per_epoch = order.n_samples // batch_size
        if self.steps_per_epoch == 0:
            fix = f"Use {order.n_samples // parts * parts} or less" if order.n_samples >= parts else "Use more data"
            if isinstance(order, EpochOrder):
                fix = f"{fix.replace('more data', 'a longer text')}, or a smaller data.context_length"
            raise ConfigError(order.told, "data.batch_size", batch_size, fix)
        self.order = order
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.data_rank, self.data_world = data_rank, data_world
        self.position = start_sample  # samples in the steps whose micro-batches have all been yielded

    def __len__(self) -> int:
        return self.steps_per_epoch * self.accumulation

    def __iter__(self) -> Iterator[Starts]:
        # A generator runs nothing before its first `next`, so it reads `position` when iteration starts, not when the iterator is created.
        epoch_samples = self.steps_per_epoch * self.batch_size
        epoch, inside = divmod(self.position, epoch_samples)
        starts = self.order.starts(epoch)[:epoch_samples]
        steps = starts.reshape(self.steps_per_epoch, self.accumulation, self.data_world, -1, *starts.shape[1:])[:, :, self.data_rank]
        # A position saved with another batch size (fork=) may lie inside a step, which is then repeated from its start.
        for step in range(inside // self.batch_size, self.steps_per_epoch):
            *first, last = steps[step]
            yield from first
            self.position = epoch * epoch_samples + (step + 1) * self.batch_size
            yield last


class EvalBatches(Dataset[Batch]):
    """All tokens of a file in order, as collated batches: every token but the first is a target exactly once.

    Windows of T tokens do not overlap. The last window, the last batch, and ranks without a window are padded with token 0 and targets
    IGNORED: all ranks have the same number of batches of the same shape, and the token-weighted mean
    over them does not depend on ``batch_size`` or ``data_world``.

    Args:
        batch_size: windows in a batch, on each rank.
    """

    def __init__(
        self, tokens: Tokens, context_length: int, batch_size: int, data_rank: int = 0, data_world: int = 1, vocab_size: int | None = None
    ) -> None:
        self._tokens, self._vocab_size = _TokenFile(tokens), vocab_size
        self.context_length = context_length
        self.batch_size = batch_size
        self.data_rank, self.data_world = data_rank, data_world

    def __len__(self) -> int:
        return math.ceil((len(self._tokens) - 1) / (self.context_length * self.batch_size * self.data_world))

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shape = self.batch_size, self.context_length
        size = self.batch_size * self.context_length
        first = (index * self.data_world + self.data_rank) * size
        piece = self._tokens.array[first : first + size + 1]
        self._tokens.check(piece, self._vocab_size)
        n_targets = max(0, len(piece) - 1)
        tokens = torch.zeros(size, dtype=torch.int64)
        targets = torch.full((size,), IGNORED)
        tokens[:n_targets] = torch.from_numpy(piece[:n_targets].astype(np.int64))
        targets[:n_targets] = torch.from_numpy(piece[1:].astype(np.int64))
        return {"tokens": tokens.view(shape), "targets": targets.view(shape)}
