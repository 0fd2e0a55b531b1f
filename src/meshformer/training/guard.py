"""Numbers that go wrong, noted on the device: a step whose gradient is not finite changes nothing, and the host learns of it at the next row."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Trouble(NamedTuple):
    """The first step since the last row whose gradient or loss was not finite; the same on every rank.

    `parameter` is the first that the backward pass reached, None where all gradients, or only their own norms, are finite; `parameters` counts
    all. `ranks` hold that parameter's gradient, after the sum over ranks; `loss_ranks`, whose own loss was not finite, say where it began.
    """

    step: int
    learning_rate: float
    parameter: str | None
    parameters: int
    ranks: list[int]
    loss_ranks: list[int]
    gradient: bool


FOLD = 1024  # steps or micro-batches noted as they came, before the host looks at them though no row is due


class Guard:
    """Sums and notes since the last row. The host looks at them, and waits for the device, at a row, at a checkpoint, or when they are `FOLD`.

    Until then a step costs no more than an entry in a list: twenty operations on single numbers would be 0.2 ms on a slow core.
    """

    def __init__(self, device: torch.device, since_last_row: tuple[float, float], skipped: float, earlier: Trouble | None):
        self.device = device
        self.loss_sum, self.count = since_last_row  # this rank's, of finite losses
        self.skipped = skipped  # steps of the whole run
        self.step = math.inf  # first with a bad gradient; all ranks agree on it
        self.loss_step = math.inf  # first with a bad loss on this rank
        self.norms: list[float] = []  # of the gradients of self.step
        self.rates: dict[int, float] = {}
        self.earlier = earlier  # noted before a checkpoint that this run goes on from
        self._losses: list[tuple[int, Tensor, Tensor]] = []
        self._gradients: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def loss(self, step: int, loss: Tensor, count: Tensor) -> None:
        """A micro-batch's loss sum and count. They enter the row's mean where the loss is finite."""
        self._losses.append((step, loss, count))
        if len(self._losses) == FOLD:
            self._fold()

    def gradient(self, step: int, learning_rate: float, bad: Tensor, skip: Tensor, norms: Tensor) -> None:
        """`bad`: whether the step's gradient is not finite; `skip`: whether its update is not made; `norms`: of this rank's gradients."""
        if len(self._gradients) == FOLD:
            self._fold()
        self._gradients.append((step, bad, skip, norms))
        self.rates[step] = learning_rate

    def _fold(self) -> None:
        steps, *others = zip(*self._losses, strict=True) if self._losses else ((), (), ())
        for step, loss, count in zip(steps, *map(_on_host, others), strict=True):
            if math.isfinite(loss):
                self.loss_sum, self.count = self.loss_sum + loss, self.count + count
            else:
                self.loss_step = min(self.loss_step, step)
        self._losses.clear()
        steps, *flags, norms = zip(*self._gradients, strict=True) if self._gradients else ((), (), (), ())
        for step, bad, skip, some in zip(steps, *map(_on_host, flags), norms, strict=True):
            self.skipped += skip
            if bad and step < self.step:
                self.step, self.norms = step, some.tolist()
        self._gradients.clear()

    def look(self, strategy: Any) -> tuple[int, int | None, tuple[float, float]]:
        """(steps skipped, first step with something bad on any rank, (loss sum, count) over the data ranks). A collective."""
        self._fold()
        mine = torch.tensor((self.loss_sum, self.count), dtype=torch.float64, device=self.device)
        loss_sum, count = strategy.reduce(mine, reduce_op="sum").tolist()
        step = min(self.step, self.loss_step)
        if dist.is_initialized():
            steps = torch.tensor(step, dtype=torch.float64, device=self.device)
            dist.all_reduce(steps, dist.ReduceOp.MIN)
            step = steps.item()
        return int(self.skipped), None if math.isinf(step) else int(step), (loss_sum, count)

    def describe(self, step: int | None, task: Any) -> Trouble | None:
        """Describes the failure that `look` found at `step`. A collective where `step` is not None; it may be slow."""
        if self.earlier is not None or step is None:
            return self.earlier
        bad_gradient = self.step == step
        mine: dict[str, Any] = {"names": [], "loss": self.loss_step == step}
        if bad_gradient:
            held = [(task.aliases.get(name, name), p) for name, p in task.model.named_parameters() if p.requires_grad]
            if len(held) != len(self.norms):
                held = [(name, p) for name, p in held if p.grad is not None]
            mine["names"] = [name for (name, _), norm in zip(held, self.norms, strict=False) if not math.isfinite(norm)]
        everyone: list[Any] = [mine]
        if dist.is_initialized():
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, mine)
        found = {name for one in everyone for name in one["names"]}
        parameter = max(found, key=task.model_names.index, default=None)
        ranks = [rank for rank, one in enumerate(everyone) if parameter in one["names"]]
        losses = [rank for rank, one in enumerate(everyone) if one["loss"]]
        return Trouble(step, self.rates.get(step, math.nan), parameter, len(found), ranks, losses, bad_gradient)

    def reset(self) -> None:
        self.loss_sum, self.count = 0.0, 0.0
        self.step = self.loss_step = math.inf
        self.rates.clear()
        self.earlier = None


def _on_host(values: tuple[Tensor, ...]) -> list[Any]:
    """Tensors' numbers, fetched at once."""
    return torch.stack(values).tolist() if values else []
