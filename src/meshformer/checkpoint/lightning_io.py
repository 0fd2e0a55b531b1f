"""Lightning's checkpoint dictionary to and from the checkpoints of folder.py."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor

from .background import Background
from .folder import read_rest, read_tensors, write_folder
from .optimizer import PREFIX, names_by_number, state_tensors


class FolderCheckpointIO(CheckpointIO):
    """Saves and loads what the Trainer's checkpoint connector hands over; optimizer state is keyed by parameter name on disk.

    `asynchronous` (training goes on while a thread writes) and `then` (called by the process that completes a checkpoint, when it is complete)
    are set by callbacks.Checkpoint. A strategy that saves from several processes calls `write` itself.
    """

    def __init__(self) -> None:
        self.asynchronous = False
        self.then: Callable[[], None] | None = None
        self._background = Background()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.write(Path(path), *split(checkpoint))

    def write(self, path: Path, tensors: Mapping[str, Tensor], rest: dict[str, Any], group: dist.ProcessGroup | None = None) -> None:
        """`write_folder`, now or in the background. For the background, `group` is a gloo group of its own."""
        then = self.then if group is None or dist.get_rank(group) == 0 else None
        if self.asynchronous:
            self._background.save(path, tensors, rest, group, then)
            return
        write_folder(path, tensors, rest, group)
        if then is not None:
            then()

    def wait(self) -> None:
        """Returns when no checkpoint is being written; raises what failed in the background."""
        self._background.wait()

    def teardown(self) -> None:
        self.wait()

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint, tensors = read_rest(Path(path)), read_tensors(Path(path))
        checkpoint["state_dict"] = {key: x for key, x in tensors.items() if not key.startswith(PREFIX)}
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
