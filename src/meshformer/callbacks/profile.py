"""Records a few steps with torch.profiler on every rank, and splits their time into parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch.distributed.pipelining import PipelineStage
from torch.profiler import record_function

from meshformer.callbacks.media import log_drawing
from meshformer.callbacks.preemption import Preemption
from meshformer.compat.lightning import FETCH
from meshformer.parallel.table import local_sizes
from meshformer.printing import argument, say
from meshformer.profile.check import check_steps
from meshformer.profile.figure import draw_all
from meshformer.profile.parts import analyse, means, table
from meshformer.profile.trace import PREFIX

if TYPE_CHECKING:
    PositiveInt = int

TRIALS = 32  # concurrent all-reduces in each group: enough that both of its threads run some


class Profile(Callback):
    """Records the steps from `steps[0]` to `steps[1]`, both included, and writes RUN/profile/: a trace for each rank (for Perfetto or Chrome), the
    table parts.csv and figures, which loggers get too. `steps` null disables it, at no cost. `memory` also records allocations.

    A step begins with the fetch of its data and ends where the next begins, so it includes its rows, its checkpoint and its validation. While
    steps are recorded, Lightning's and the strategy's methods are wrapped in torch.profiler.record_function. After the last step all ranks write
    their traces, and wait until rank 0 has read them. State: none.
    """

    def __init__(self, steps: list[PositiveInt] | None = None, memory: bool = True):
        check_steps(steps)
        self.steps, self.memory = steps, memory
        self.folder: Path | None = None  # set by job/build.py: RUN/profile
        self._profiler: torch.profiler.profile | None = None
        self._open: list[tuple[str, Any]] = []  # record_function contexts that are open, outermost first
        self._replaced: list[tuple[Any, str, Any]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.steps is None:
            return
        if trainer.global_step >= self.steps[0]:
            if trainer.is_global_zero:
                say(f"callbacks.profile.steps={self.steps}: step {trainer.global_step} is done already, so nothing is recorded", error=True)
            return
        # Lightning calls `profiler.start` before it fetches a batch: the only hook between two steps.
        self._replace(trainer.profiler, "start", lambda action: self._fetches(trainer, pl_module) if action == FETCH else None)

    def _fetches(self, trainer: pl.Trainer, task: Any) -> None:
        assert self.steps is not None
        step = trainer.global_step + 1
        if step == self.steps[0]:
            self._begin(trainer, task)
        if self._profiler is not None:
            self._leave()
            if step > self.steps[1]:
                self._end(trainer)
                return
            self._enter(f"step {step}")
            self._enter("data")

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._profiler is not None:
            self._leave("data")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._profiler is not None:
            self._enter("validation")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._profiler is not None:
            self._leave("validation")

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._profiler is not None:  # the last recorded step is the run's last
            self._leave()
            self._end(trainer)
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._profiler = None  # not stopped: collectives may be in flight, and the run ends
        self._restore()

    # --- the window

    def _begin(self, trainer: pl.Trainer, task: Any) -> None:
        device = task.device.type
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities, profile_memory=self.memory)
        self._profiler.start()
        sizes = local_sizes(task, trainer.optimizers[0])
        about = {
            "rank": trainer.global_rank,
            "device": device,
            "sizes": {"weights": sizes["bytes"], "gradients": sizes["gradients"], "optimizer": sizes["optimizer"]},
        }
        self._profiler.add_metadata_json("meshformer", json.dumps(about))
        if device == "cpu":
            self._find_groups(trainer)
        self._put_marks(trainer, task)

    def _find_groups(self, trainer: Any) -> None:
        """Runs a few all-reduces in each process group inside record_function: gloo's events lack the group, but their thread ids give it away."""
        groups = trainer.strategy.process_groups()
        for callback in _preemption(trainer):
            groups |= {"signals": callback.group} if callback.group is not None else {}
        for name, group in groups.items():
            ranks = dist.get_process_group_ranks(group)
            with record_function(f"{PREFIX}group {name} {','.join(map(str, ranks))}"):
                for work in [dist.all_reduce(torch.zeros(1), group=group, async_op=True) for _ in range(TRIALS)]:
                    assert work is not None, "this rank is in its own groups"
                    work.wait()

    def _end(self, trainer: pl.Trainer) -> None:
        profiler, self._profiler = self._profiler, None
        self._restore()
        assert profiler is not None and self.folder is not None, "job/build.py sets Profile.folder"
        for callback in _preemption(trainer):
            callback.settle()  # a collective that ends after the profiler has stopped writes into freed memory: a segmentation fault
        profiler.stop()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self.folder / f"rank{trainer.global_rank}.json.gz"))
        except (OSError, RuntimeError) as error:
            say(f"warning: the trace of rank {trainer.global_rank} could not be written: {error}", error=True)
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            try:
                parts = analyse(self.folder)
                for drawing in draw_all(self.folder):
                    log_drawing(trainer.loggers, drawing, table(means(parts)) if drawing.stem == "parts" else [], trainer.global_step)
                say(f"recorded steps {self.steps}: meshformer profile {argument('run', self.folder.parent)}", error=True)
            except (OSError, ValueError) as error:  # a run must not end because its profile cannot be read
                say(f"warning: the recorded steps could not be analysed: {error}", error=True)

    # --- record_function contexts

    def _put_marks(self, trainer: pl.Trainer, task: Any) -> None:
        strategy: Any = trainer.strategy
        plain = trainer.profiler.profile
        self._replace(trainer.profiler, "profile", lambda action: _mark("checkpoint") if action == "save_checkpoint" else plain(action))
        self._replace(strategy, "backward", _marked(strategy.backward, lambda *_: "backward"))
        hooks = [
            strategy.model.register_forward_pre_hook(lambda *_: self._enter("forward")),
            strategy.model.register_forward_hook(lambda *_: self._leave("forward")),
        ]
        self._replaced += [(hook, "remove", None) for hook in hooks]
        finish, step = strategy.finish_gradients, strategy.training_step

        def finish_gradients(optimizer: Any) -> Any:
            self._enter("optimizer")  # from here to the end of the step
            return finish(optimizer)

        def training_step(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            self._leave("optimizer")
            return result

        self._replace(strategy, "finish_gradients", finish_gradients)
        self._replace(strategy, "training_step", training_step)
        if task.pipeline is not None:
            self._put_pipeline_marks(task)

    def _put_pipeline_marks(self, task: Any) -> None:
        """Wraps the methods with which a schedule runs one micro-batch through one stage."""
        self._replace(task, "scored", _marked(task.scored, lambda *_: "forward"))
        for name, kind in (("forward_one_chunk", "forward"), ("backward_one_chunk", "backward"), ("backward_weight_one_chunk", "weights")):

            def text(stage: Any, number: int, *_: Any, kind: str = kind, full_backward: bool = True, **__: Any) -> str:
                return f"stage {stage.stage_index} {kind if full_backward else 'inputs'} {number}"

            self._replace(PipelineStage, name, _marked(getattr(PipelineStage, name), text))

    def _enter(self, name: str) -> None:
        mark = _mark(name)
        mark.__enter__()
        self._open.append((name, mark))

    def _leave(self, name: str | None = None) -> None:
        """Closes the context `name` and those inside it, innermost first; without a name, all. Does nothing if `name` is not open."""
        if name is not None and name not in [entered for entered, _ in self._open]:
            return
        while self._open:
            left, mark = self._open.pop()
            mark.__exit__(None, None, None)
            if left == name:
                return

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        self._replaced.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, value)

    def _restore(self) -> None:
        while self._replaced:
            owner, name, before = self._replaced.pop()
            if name == "remove":  # a module's hook
                owner.remove()
            elif before is None:  # deleting the instance's attribute restores the class's method
                delattr(owner, name)
            else:
                setattr(owner, name, before)


def _preemption(trainer: Any) -> list[Preemption]:
    return [callback for callback in trainer.callbacks if isinstance(callback, Preemption)]


def _mark(name: str) -> record_function:
    return record_function(PREFIX + name)


def _marked(method: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
    """`method`, wrapped in record_function with a name that depends on the arguments."""

    @wraps(method)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with _mark(name(*args, **kwargs)):
            return method(*args, **kwargs)

    return inside
