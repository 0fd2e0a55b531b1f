"""Preemption by a scheduler and Ctrl-C: the run saves a checkpoint after the current step and stops."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from meshformer.config.errors import Stopped

from .checkpoint import Checkpoint

REASONS = (None, "preempted", "interrupted")  # ranks exchange the index into this tuple
EXCHANGE_SECONDS = 0.5  # target time between two exchanges
LONGEST_WAIT = 100  # most steps between two exchanges
STOP_SIGNALS = {signal.SIGUSR1: "preempted", signal.SIGTERM: "preempted", signal.SIGINT: "interrupted"}


class StopSignals:
    """Context in which SIGTERM, SIGUSR1 and Ctrl-C only set `requested`; a second signal ends the process at once, wherever it is.

    `by_agent`: this process is a rank of our own elastic agent. The terminal sends Ctrl-C to every process, so a rank ignores it and waits for
    the parent, which forwards it as SIGUSR1. A rank does not exit at a second signal either, because SLURM signals each process of a job step and
    the parent forwards its own signals too. The agent itself sends SIGTERM when another rank has failed: then `leaving()` returns True, and the
    process exits at once.
    """

    def __init__(self, by_agent: bool, leaving: Callable[[], bool] = lambda: True):
        self.by_agent, self.leaving = by_agent, leaving
        self.requested: str | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._pipe: int | None = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # signal handlers can only be set in the main thread
            self._before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN if self.by_agent and number == signal.SIGINT else self._on_signal)
            if self.by_agent and self._pipe is None:  # train() enters the context a second time in a rank
                self._watch()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._pipe)  # ends the thread
            self._pipe = None

    def _watch(self) -> None:
        """Starts a thread that handles SIGTERM at once: a Python handler would wait until the main thread returns, for example from a collective."""
        read, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)

        def watch() -> None:
            while number := os.read(read, 1):
                if number[0] == signal.SIGTERM and self.leaving():
                    os._exit(1)
            os.close(read)

        threading.Thread(target=watch, daemon=True).start()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = STOP_SIGNALS[signal.Signals(number)]
        for again in () if self.by_agent else STOP_SIGNALS:  # the default handler ends the process even inside a hanging collective
            signal.signal(again, signal.SIG_DFL)


class Preemption(Callback):
    """Stops training on all ranks after the same step once a rank has received a signal: saves, then raises Stopped on every rank.

    Ranks exchange the signal about twice a second (or after every step, if steps take longer) with an asynchronous all-reduce on the CPU, which
    overlaps with the next step. If the last step is due for validation, it is validated first, so the resumed run skips nothing. State: none.
    """

    def __init__(self, signals: StopSignals):
        self.signals = signals
        self._pending: tuple[Any, torch.Tensor] | None = None
        self.group: Any = None
        self._reason: str | None = None
        self._wait, self._steps, self._since = 1, 0, 0.0  # steps between exchanges, steps since the last one, and its time

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._reason, self._pending = None, None
        self._wait, self._steps, self._since = 1, 0, time.monotonic()
        if trainer.world_size > 1 and self.group is None:
            self.group = dist.new_group(backend="gloo")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._reason = self._reason or self._agreed()
        if self._reason and not any(c.validates_now(trainer) for c in self._savers(trainer)):
            self._stop(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._finish()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._reason and trainer.state.fn == "fit":
            self._stop(trainer)

    def _agreed(self) -> str | None:
        """The stop reason that all ranks know from the last exchange, or None. In a single process: the signal received so far."""
        if self.group is None:
            return self.signals.requested
        agreed = 0
        if self._pending is not None:
            work, numbers = self._pending
            work.wait()
            self._pending = None
            agreed, fewer = numbers.tolist()
            self._wait = LONGEST_WAIT - fewer
        self._steps += 1
        if self._steps >= self._wait:
            now = time.monotonic()
            fit = int(EXCHANGE_SECONDS * self._steps / max(now - self._since, 1e-6))
            # The maximum over ranks of the reason, and of LONGEST_WAIT − wait, which gives the minimum of the waits.
            numbers = torch.tensor([REASONS.index(self.signals.requested), LONGEST_WAIT - min(max(fit, 1), LONGEST_WAIT)])
            self._pending = (dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self.group, async_op=True), numbers)
            self._steps, self._since = 0, now
        return REASONS[agreed]

    def settle(self) -> None:
        """Waits until no all-reduce is in flight; the next step still reads the result of the last one."""
        if self._pending is not None:
            self._pending[0].wait()

    def _finish(self) -> None:
        """Completes a pending all-reduce, so that no rank exits while another still waits for it."""
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None

    def _savers(self, trainer: pl.Trainer) -> list[Checkpoint]:
        return [c for c in trainer.callbacks if isinstance(c, Checkpoint)]  # pyright: ignore[reportAttributeAccessIssue]

    def _stop(self, trainer: pl.Trainer) -> None:
        self._finish()
        step, savers = trainer.global_step, self._savers(trainer)
        for saver in savers:
            if saver.saved_step != step or saver.lost(trainer):
                saver.save(trainer)
        if not savers:
            raise Stopped(self._reason or "", step, False)
        trainer.strategy.checkpoint_io.wait()  # pyright: ignore[reportAttributeAccessIssue]
        if any(saver.lost(trainer) for saver in savers):  # a warning has given the reason
            raise Stopped(self._reason or "", step, False, "the save failed")
        raise Stopped(self._reason or "", step, True)
