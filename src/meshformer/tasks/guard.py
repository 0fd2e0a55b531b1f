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


FOLD = 64  # steps or micro-batches kept as they came before they are reduced to what they have in common


def not_finite(x: Tensor) -> Tensor:
    return (x - x) != 0  # half the time of ~x.isfinite(), which is four operations


class Guard:
    """Sums and notes since the last row. Nothing here waits for the device, but `look`, at a row or a checkpoint.

    A step costs no more than an entry in a list: twenty operations on single numbers would be 0.2 ms on a slow core.
    """

    def __init__(self, device: torch.device, since_last_row: tuple[float, float], skipped: float, earlier: Trouble | None):
        self.device = device
        self.totals = torch.tensor(since_last_row, dtype=torch.float64, device=device)  # this rank's loss sum and count, of finite losses
        self.skipped = torch.full((), skipped, dtype=torch.float64, device=device)  # steps of the whole run
        self.step = torch.full((), math.inf, dtype=torch.float64, device=device)  # first with a bad gradient; all ranks agree on it
        self.loss_step = self.step.clone()  # first with a bad loss on this rank
        self.norms = torch.zeros(0, device=device)  # of the gradients of self.step
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
        if len(self._gradients) == FOLD or (self._gradients and norms.shape != self._gradients[-1][3].shape):
            self._fold()
        self._gradients.append((step, bad, skip, norms))
        self.rates[step] = learning_rate

    def _fold(self) -> None:
        if self._losses:
            steps, losses, counts = zip(*self._losses, strict=True)
            values = torch.stack((torch.stack(losses).double(), torch.stack(counts).double()))
            bad = not_finite(values[0])
            self.totals += values.masked_fill(bad, 0).sum(1)
            self.loss_step = torch.minimum(self.loss_step, self._first(steps, bad))
            self._losses.clear()
        if self._gradients:
            steps, flags, skips, norms = zip(*self._gradients, strict=True)
            bad, rows = torch.stack(flags), torch.stack(norms)
            self.skipped += torch.stack(skips).sum()
            row = rows.index_select(0, bad.byte().argmax().view(1))[0]
            kept = self.norms if self.norms.shape == row.shape else torch.zeros_like(row)
            self.norms = torch.where(self.step.isinf(), row, kept)
            self.step = torch.minimum(self.step, self._first(steps, bad))
            self._gradients.clear()

    def _first(self, steps: tuple[int, ...], bad: Tensor) -> Tensor:
        """The first of `steps` that is bad; infinite if none is."""
        numbers = torch.tensor(steps, dtype=torch.float64, pin_memory=self.device.type == "cuda").to(self.device, non_blocking=True)
        return numbers.masked_fill(~bad, math.inf).min()

    def look(self, strategy: Any, *others: Tensor) -> tuple[int, int | None, list[float]]:
        """(steps skipped, first step with something bad on any rank, [loss sum, count, *others] over the data ranks). A collective.

        The one wait for the device."""
        self._fold()
        totals = strategy.reduce(self.totals, reduce_op="sum")
        steps = torch.minimum(self.step, self.loss_step)
        if dist.is_initialized():
            dist.all_reduce(steps, dist.ReduceOp.MIN)
        skipped, step, *numbers = torch.stack([self.skipped, steps, *totals, *(x.double() for x in others)]).tolist()
        return int(skipped), None if math.isinf(step) else int(step), numbers

    def describe(self, step: int | None, task: Any) -> Trouble | None:
        """What happened at `step`, of which `look` told. A collective where it is not None, and then as slow as it likes."""
        if self.earlier is not None or step is None:
            return self.earlier
        bad_gradient = self.step.item() == step
        mine: dict[str, Any] = {"names": [], "loss": self.loss_step.item() == step}
        if bad_gradient:
            held = [(task.aliases.get(name, name), p) for name, p in task.model.named_parameters() if p.requires_grad]
            if len(held) != len(self.norms):
                held = [(name, p) for name, p in held if p.grad is not None]
            mine["names"] = [name for (name, _), norm in zip(held, self.norms.tolist(), strict=False) if not math.isfinite(norm)]
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
        self.totals.zero_()
        self.step.fill_(math.inf)
        self.loss_step.fill_(math.inf)
        self.rates.clear()
        self.earlier = None
