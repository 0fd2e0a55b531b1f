"""A run that is told to stop ends at a step boundary, saved: preemption by a scheduler, and Ctrl-C."""

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

REASONS = (None, "preempted", "interrupted")  # the number that ranks agree on is the place in here
AGREE_SECONDS = 0.5  # between two agreements: half a second is nothing to one who waits, and 14 steps of 35 ms
LONGEST_WAIT = 100  # steps
ASKING = {signal.SIGUSR1: "preempted", signal.SIGTERM: "preempted", signal.SIGINT: "interrupted"}


class StopSignals:
    """SIGTERM, SIGUSR1 and Ctrl-C only set a flag; the one after that ends the process at once, whatever it is doing.

    `by_agent`: in a rank of our own elastic agent Ctrl-C, which the terminal sends to every process, is the parent's to pass on (as SIGUSR1). So
    is the second signal: SLURM sends SIGTERM and SIGUSR1 to each process of a job step, and the parent passes its own on. The agent, too, sends
    SIGTERM, when another rank has failed: `leaving` tells whether that is so, and then the process ends at once.
    """

    def __init__(self, by_agent: bool, leaving: Callable[[], bool] = lambda: True):
        self.by_agent, self.leaving = by_agent, leaving
        self.asked: str | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._pipe: int | None = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # in a notebook's or a test's thread signals are not ours
            self._before = {number: signal.getsignal(number) for number in ASKING}
            for number in ASKING:
                signal.signal(number, signal.SIG_IGN if self.by_agent and number == signal.SIGINT else self._ask)
            if self.by_agent and self._pipe is None:  # train() enters again what the rank has entered
                self._watch()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._pipe)  # which ends the thread
            self._pipe = None

    def _watch(self) -> None:
        """A thread that looks at every SIGTERM at once: Python's own handlers wait until the main thread comes back, from a collective, say."""
        read, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)

        def watch() -> None:
            while number := os.read(read, 1):
                if number[0] == signal.SIGTERM and self.leaving():
                    os._exit(1)
            os.close(read)

        threading.Thread(target=watch, daemon=True).start()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = ASKING[signal.Signals(number)]
        for again in () if self.by_agent else ASKING:  # the default ends a process even inside a collective that never returns
            signal.signal(again, signal.SIG_DFL)


class Preemption(Callback):
    """Ends training after the step in which all ranks have heard that one was told to stop: saves, then raises Stopped on every rank.

    Ranks agree about twice a second, or after every step where steps are longer: by two integers, of which the hosts find the largest while the
    next step runs, so nobody waits for it. Where the step is also to be validated, it is, so that the resumed run misses nothing. State: none.
    """

    def __init__(self, signals: StopSignals):
        self.signals = signals
        self._pending: tuple[Any, torch.Tensor] | None = None
        self._group: Any = None
        self._reason: str | None = None
        self._wait, self._steps, self._since = 1, 0, 0.0  # steps between exchanges; how many since the last began; when that was

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._reason, self._pending = None, None
        self._wait, self._steps, self._since = 1, 0, time.monotonic()
        if trainer.world_size > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo")

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
        """What the ranks had asked for when they last exchanged, the same on all of them; in one process, what was asked for by now."""
        if self._group is None:
            return self.signals.asked
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
            fit = int(AGREE_SECONDS * self._steps / max(now - self._since, 1e-6))
            # The most that any rank asks for, and the fewest steps that any would wait.
            numbers = torch.tensor([REASONS.index(self.signals.asked), LONGEST_WAIT - min(max(fit, 1), LONGEST_WAIT)])
            self._pending = (dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self._group, async_op=True), numbers)
            self._steps, self._since = 0, now
        return REASONS[agreed]

    def _finish(self) -> None:
        """No rank may leave while another still waits for its part of this."""
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
        if any(saver.lost(trainer) for saver in savers):  # a warning has said why
            raise Stopped(self._reason or "", step, False, "the save failed")
        raise Stopped(self._reason or "", step, True)
