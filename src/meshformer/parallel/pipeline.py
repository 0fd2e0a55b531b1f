"""Pipeline parallelism: each rank holds consecutive layers, and micro-batches pass through the ranks (GPipe, Huang et al. 2019).

The schedules are torch.distributed.pipelining's; stages.py splits the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
)
from torch.distributed.tensor import DTensor

from .stages import check_between, run_part

SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": ScheduleInterleavedZeroBubble,
}


class Stage(nn.Module):
    """One stage as the schedules call it: hidden states in and out. The other inputs of the model are looked up by the micro-batch's number.

    The precision context is entered here, so that the backward pass, which the schedule runs, is outside of it.
    """

    def __init__(self, part: Any, context: Callable[[], AbstractContextManager[Any]]):
        super().__init__()
        self.part, self.context = part, context
        self.micro_inputs: list[dict[str, Any]] = []

    def forward(self, x: Tensor, number: Tensor) -> Tensor:
        with self.context():
            output = run_part(self.part, self.micro_inputs[int(number)], x)
        # Schedules of torch 2.11 require the strides of the first pass, and logits gathered from uneven shards are a view of a padded tensor.
        return output.contiguous()


class Pipeline:
    """Runs batches through the stages of this rank and the other ranks of its pipeline. The strategy sets `Task.pipeline` to `losses`."""

    def __init__(self, task: Any, stages: list[Any], numbers: list[int], n_stages: int, mesh: DeviceMesh, strategy: dict[str, Any]):
        self.task, self.stages, self.numbers, self.n_stages = task, stages, numbers, n_stages
        self.group, self.rank, self.size = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        self.schedule, self.microbatches = SCHEDULES[strategy["schedule"]], strategy["microbatches"]
        self.has_first, self.has_last = 0 in numbers, n_stages - 1 in numbers
        self.last_rank = (n_stages - 1) % self.size
        self._schedules: dict[Any, Any] = {}
        self._micro: list[dict[str, Tensor]] = []
        self._phase = "train"
        self._loss_sums: dict[int, Tensor] = {}  # number of a micro-batch -> its loss sum and count
        self._scale = 1.0
        self._checked = False
        # Stage number -> arguments of PipelineStage. plan/live_memory.py knows the shapes that the ranks of a run send each other first.
        self.shapes: Callable[[int], dict[str, Any]] = lambda number: {}

    def losses(self, batch: dict[str, Tensor], phase: str) -> tuple[Tensor, Tensor]:
        """(loss sum, count) of the batch, the same on every rank of the pipeline, without gradients. A collective."""
        return self._run(batch, phase, train=False)

    def forward_backward(self, batch: dict[str, Tensor], scale: float) -> tuple[Tensor, Tensor]:
        """As `losses`, and accumulates the gradient of `scale` × the loss sum in the parameters."""
        self._scale = scale
        return self._run(batch, "train", train=True)

    def _run(self, batch: dict[str, Tensor], phase: str, train: bool) -> tuple[Tensor, Tensor]:
        if not self._checked:
            self._check_same_batch(batch)
        size = next(iter(batch.values())).shape[0]
        n = self.microbatches if train else max(n for n in range(1, self.microbatches + 1) if size % n == 0)
        cuts = {name: x.chunk(n) if x.shape[0] == size else [x] * n for name, x in batch.items()}
        self._micro, self._phase = [{name: parts[i] for name, parts in cuts.items()} for i in range(n)], phase
        for stage in self.stages:
            stage.micro_inputs = [self.task.arguments(micro, phase) for micro in self._micro]
        if not self._checked:
            self._checked = True
            for stage in self.stages:
                check_between(stage.part, stage.micro_inputs[0])
        arguments = (next(iter(self.task.inputs(batch).values())),) if self.has_first else ()
        number = torch.arange(n)
        keywords: dict[str, Any] = {"number": number, "return_outputs": False}
        if self.has_last:
            keywords |= {"target": number, "losses": []}
        known = len(self._schedules)
        schedule = self._schedule(train, n, batch)
        with _searching(first=len(self._schedules) > known):
            (schedule.step if train else schedule.eval)(*arguments, **keywords)
        total = torch.zeros(2, dtype=torch.float64, device=self.task.device)
        if self.has_last:
            for i in range(n):
                total += self._loss_sums.pop(i)
        dist.broadcast(total, group=self.group, group_src=self.last_rank)
        return total[0].float(), total[1].long()

    def _schedule(self, train: bool, n: int, batch: dict[str, Tensor]) -> Any:
        """The schedule for a batch's shapes. PipelineStage allocates buffers for one shape, so each shape gets its own stages and schedule."""
        key = (train, n, torch.is_inference_mode_enabled(), *(tuple(x.shape) for x in batch.values()))
        if key not in self._schedules:
            multi = issubclass(self.schedule, PipelineScheduleMulti)
            device = self.task.device
            stages = [
                PipelineStage(s, i, self.n_stages, device, group=self.group, **self.shapes(i))
                for s, i in zip(self.stages, self.numbers, strict=True)
            ]
            make: Any = self.schedule if train else ScheduleLoopedBFS if multi else ScheduleGPipe
            # The losses are sums, and scale_grads=True would divide the accumulated gradients by n at every call.
            self._schedules[key] = make(stages if multi else stages[0], n_microbatches=n, loss_fn=self._loss, scale_grads=False)
        return self._schedules[key]

    def _loss(self, output: Tensor, number: Tensor) -> Tensor:
        i = int(number)
        with self.stages[-1].context():
            loss_sum, count = self.task.scored(output, self._micro[i], self._phase)
        self._loss_sums[i] = torch.stack((loss_sum.detach().double(), count.double()))
        return loss_sum * self._scale

    def _check_same_batch(self, batch: dict[str, Tensor]) -> None:
        """RuntimeError if ranks of one pipeline got different batches, for example by augmentation seeded by rank. A collective."""
        sums = torch.stack([x.double().sum() for x in batch.values()])
        both = torch.cat((sums, -sums))
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self.group)
        if not torch.equal(both[: len(sums)], -both[len(sums) :]):
            raise RuntimeError("the ranks of one pipeline were given different batches: augmentation must not depend on the process")

    def add_tied(self, tied: Mapping[str, str]) -> None:
        """Sums the gradients of parameters that the first and the last stage share; `tied`: name in the last -> name in the first."""
        parameters = dict(self.task.model.named_parameters(remove_duplicate=False))
        peer = self.last_rank if self.has_first else 0
        for other, name in tied.items():
            if (other in parameters) == (name in parameters):  # neither stage is on this rank, or both are and autograd has summed already
                continue
            matrix = parameters.get(name, parameters.get(other))
            if matrix is None or not matrix.requires_grad:
                continue
            mine = local_tensor(matrix.grad)
            theirs = torch.empty_like(mine)
            send = dist.P2POp(dist.isend, mine, group=self.group, group_peer=peer)
            receive = dist.P2POp(dist.irecv, theirs, group=self.group, group_peer=peer)
            for work in dist.batch_isend_irecv([send, receive]):
                work.wait()
            mine.add_(theirs)


def local_tensor(x: Any) -> Tensor:
    """The local tensor of a DTensor; a plain tensor itself."""
    return x.to_local() if isinstance(x, DTensor) else x


def _searching(first: bool) -> AbstractContextManager[Any]:
    """trainer.detect_anomaly in a schedule's call. In its first one torch finds the shapes that stages exchange, by passes over uninitialised memory,
    whose NaNs are none of the model's."""
    return torch.autograd.set_detect_anomaly(True, check_nan=not first) if torch.is_anomaly_enabled() else nullcontext()
