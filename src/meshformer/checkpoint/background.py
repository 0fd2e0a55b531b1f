"""Saving while training goes on: a copy in the host's memory is written by a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from .folder import State, state_of, write_state


class Background:
    """One save at a time; costs as much memory as what is saved, until it is written."""

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
        """`write_folder` of the state as it is now; returns when it is copied. `then()` is called, on the thread, when the folder is complete.

        Waits for the save before, and raises what failed in it. `group` must be a gloo group that nothing else uses: the thread communicates
        in it while this one goes on.
        """
        self.wait()
        state = _now(tensors, rest, group)

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
        """Returns when nothing is being written; raises, once, what failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error


def _now(tensors: Mapping[str, Tensor], rest: dict[str, Any], group: dist.ProcessGroup | None) -> Callable[[], State]:
    """A function that returns a copy of the state as it is now. It raises what kept this rank from copying: the others are to hear of it."""
    try:
        state = state_of(tensors, rest, group)
        copy = state._replace(pieces={name: piece.on_host() for name, piece in state.pieces.items()})
    except Exception as error:
        failure = error

        def fail() -> State:
            raise failure

        return fail
    return lambda: copy
