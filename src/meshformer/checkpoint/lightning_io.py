"""How Lightning saves and loads: its checkpoint dictionary to and from checkpoint folders, in the foreground or in a background thread."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor

from meshformer.printing import say

from .optimizer import PREFIX, names_by_number, state_tensors
from .read import read_rest, read_tensors
from .weights import AVERAGE
from .write import State, StepFailed, state_of, write_folder, write_state


class FolderCheckpointIO(CheckpointIO):
    """Saves and loads the Trainer's checkpoint dictionary. On disk, optimizer state is keyed by parameter name.

    A strategy that saves from several processes calls `write` itself. callbacks.Checkpoint sets three attributes: `asynchronous` (a thread
    writes while training continues), `tolerant` (a save that fails is reported and training continues) and `then` (a function that the process
    which completes a checkpoint calls with its path). `failed` says whether the last save failed. With `fresh_optimizer`, the state of the
    checkpoint's optimizer is not loaded, since this run has another one.
    """

    def __init__(self) -> None:
        self.asynchronous = self.tolerant = self.failed = self.fresh_optimizer = False
        self.then: Callable[[Path], None] | None = None
        self._background = Background()
        self._is_first = True

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.write(Path(path), *split(checkpoint))

    def write(self, path: Path, tensors: Mapping[str, Tensor], rest: dict[str, Any], group: dist.ProcessGroup | None = None) -> None:
        """`write_folder`, now or in the background. In the background, `group` must be a gloo group that nothing else uses."""
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
        """Waits until no checkpoint is being written, and raises the error of a save in the background."""
        with self._tolerating():
            self._background.wait()

    @contextmanager
    def _tolerating(self) -> Iterator[None]:
        try:
            yield
        except StepFailed as error:  # raised on all ranks that save, so that all of them continue
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


class Background:
    """Writes checkpoints in a thread, one at a time, from a copy in host memory that is freed when the checkpoint is written."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        path: Path,
        tensors: Mapping[str, Tensor],
        rest: dict[str, Any],
        group: dist.ProcessGroup | None = None,
        then: Callable[[], None] | None = None,
    ) -> None:
        """`write_folder` of the present state; returns once it is copied. The thread calls `then()` when the folder is complete.

        Waits for the previous save first, and raises its error. `group` must be a gloo group that nothing else uses, since the thread
        communicates in it while training continues.
        """
        self.wait()
        state = _copied(tensors, rest, group)

        def work() -> None:
            try:
                write_state(path, state, group)
                if then is not None:
                    then()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=work, name=f"save {Path(path).name}")
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Waits until the thread has ended, and raises its error, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error


def _copied(tensors: Mapping[str, Tensor], rest: dict[str, Any], group: dist.ProcessGroup | None) -> Callable[[], State]:
    """A function that returns a copy of the present state. If copying fails on this rank, the function raises that error inside `write_state`,
    which reports it to all ranks; raised here, it would leave the others waiting."""
    try:
        state = state_of(tensors, rest, group)
        copy = state._replace(pieces={name: piece.on_host() for name, piece in state.pieces.items()})
    except Exception as error:
        failure = error

        def fail() -> State:
            raise failure

        return fail
    return lambda: copy


def without_optimizer(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint dictionary without optimizer state. Of the schedule only its step is kept, since its learning rates are the old optimizer's."""

    def stays(name: str, value: Any) -> bool:
        rates = isinstance(value, list) and value and all(isinstance(x, (int, float, Tensor)) for x in value)
        return value is not None and name != "lr_lambdas" and not rates

    schedules = checkpoint.get("lr_schedulers", [])
    kept = [{name: value for name, value in schedule.items() if stays(name, value)} | {"lr_lambdas": []} for schedule in schedules]
    return {**checkpoint, "optimizer_states": [], "lr_schedulers": kept}


def split(checkpoint: dict[str, Any], skip: Collection[str] = ()) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by name, everything else) of Lightning's checkpoint dictionary. The optimizers' `param_groups` are in the second.

    `skip`: parameters whose optimizer state is left out, since it is saved under another name.
    """
    rest = dict(checkpoint)
    tensors = dict(rest.pop("state_dict"))
    optimizers = rest.get("optimizer_states", [])
    for optimizer in optimizers:
        tensors.update(state_tensors(optimizer, skip))
    rest["optimizer_states"] = [{"param_groups": optimizer["param_groups"]} for optimizer in optimizers]
    return tensors, rest
