"""Lightning's checkpoint dictionary to and from the checkpoints of folder.py."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor

from meshformer.printing import say

from .background import Background
from .folder import read_rest, read_tensors, write_folder
from .optimizer import PREFIX, names_by_number, state_tensors
from .ranks import StepFailed
from .weights import AVERAGE


class FolderCheckpointIO(CheckpointIO):
    """Saves and loads what the Trainer's checkpoint connector hands over; optimizer state is keyed by parameter name on disk.

    `asynchronous` (training goes on while a thread writes), `then` (called with its path by the process that completes a checkpoint) and
    `tolerant` (a save that fails is told, and no error) are set by callbacks.Checkpoint. `failed`: whether the last save did.
    `fresh_optimizer`: the checkpoint's optimizer is another one, so what is loaded has the weights and the position alone.
    A strategy that saves from several processes calls `write` itself.
    """

    def __init__(self) -> None:
        self.asynchronous = self.tolerant = self.failed = self.fresh_optimizer = False
        self.then: Callable[[Path], None] | None = None
        self._background = Background()
        self._is_first = True

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.write(Path(path), *split(checkpoint))

    def write(self, path: Path, tensors: Mapping[str, Tensor], rest: dict[str, Any], group: dist.ProcessGroup | None = None) -> None:
        """`write_folder`, now or in the background. For the background, `group` is a gloo group of its own."""
        self.wait()
        self.failed = False
        self._is_first = group is None or dist.get_rank(group) == 0
        then = partial(self.then, path) if self.then is not None and self._is_first else None
        if self.asynchronous:
            self._background.save(path, tensors, rest, group, then)
            return
        with self._tolerating():
            write_folder(path, tensors, rest, group)
            if then is not None:
                then()

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is being written in the background."""
        return self._background.running

    def wait(self) -> None:
        """Returns when no checkpoint is being written; raises what failed in the background."""
        with self._tolerating():
            self._background.wait()

    @contextmanager
    def _tolerating(self) -> Iterator[None]:
        try:
            yield
        except StepFailed as error:  # on all ranks that save, so all of them go on
            self.failed = True
            if not self.tolerant:
                raise
            if self._is_first:
                say(f"warning: {error}; training goes on, and the next save tries again", error=True)

    def teardown(self) -> None:
        self.wait()

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint, tensors = read_rest(Path(path)), read_tensors(Path(path))
        checkpoint["state_dict"] = {key: x for key, x in tensors.items() if not key.startswith((PREFIX, AVERAGE))}
        if self.fresh_optimizer:
            return without_optimizer(checkpoint)
        states: dict[str, tuple[dict[int, Any], int]] = {}
        for optimizer in checkpoint["optimizer_states"]:
            optimizer["state"] = {}
            states |= {name: (optimizer["state"], number) for number, name in names_by_number(optimizer["param_groups"]).items()}
        for key, x in tensors.items():
            if key.startswith(PREFIX):
                name, _, entry = key.removeprefix(PREFIX).rpartition(".")
                state, number = states[name]
                state.setdefault(number, {})[entry] = x
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        shutil.rmtree(path, ignore_errors=True)


def without_optimizer(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The same for another optimizer: no state, and of the schedule its step alone, since the learning rates it keeps are the old one's."""
    schedules = [{**schedule, "base_lrs": None, "_last_lr": None} for schedule in checkpoint.get("lr_schedulers", [])]
    kept = [{k: v for k, v in schedule.items() if v is not None and k != "lr_lambdas"} | {"lr_lambdas": []} for schedule in schedules]
    return {**checkpoint, "optimizer_states": [], "lr_schedulers": kept}


def split(checkpoint: dict[str, Any], skip: Collection[str] = ()) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by key, everything else) of Lightning's checkpoint dictionary. Of the optimizers, `param_groups` stay in the latter.

    `skip`: parameters whose optimizer state is saved under another name.
    """
    rest = dict(checkpoint)
    tensors = dict(rest.pop("state_dict"))
    optimizers = rest.get("optimizer_states", [])
    for optimizer in optimizers:
        tensors.update(state_tensors(optimizer, skip))
    rest["optimizer_states"] = [{"param_groups": optimizer["param_groups"]} for optimizer in optimizers]
    return tensors, rest
