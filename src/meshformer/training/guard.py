"""Records losses and non-finite steps on the device. The host reads the records only when a metrics row is written, so a step needs no sync."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class NonFiniteStep(NamedTuple):
    """The first step since the last row with a non-finite gradient or loss; the same on every rank.

    `parameter`: of the parameters with a non-finite gradient, the last in model order, which the backward pass reached first; None if there is
    none. `parameters`: their number. `ranks`: the ranks where that parameter's (reduced) gradient is not finite. `loss_ranks`: the ranks whose own
    loss was not finite, where the failure started. `gradient`: whether the gradient or its global norm was not finite, not just the loss.
    """

    step: int
    learning_rate: float
    parameter: str | None
    parameters: int
    ranks: list[int]
    loss_ranks: list[int]
    gradient: bool


MAX_PENDING = 1024  # records on the device after which the host reads them even though no row is due


class Guard:
    """Loss sums and gradient flags since the last row. The host reads them (a sync) at a row, at a checkpoint, or after `MAX_PENDING` records.

    Until then a step only appends its tensors to a list: summing them on the device would be twenty scalar operations, 0.2 ms on a slow core.
    """

    def __init__(self, device: torch.device, since_last_row: tuple[float, float], skipped: float, earlier: NonFiniteStep | None):
        self.device = device
        self.loss_sum, self.count = since_last_row  # over this rank's finite losses
        self.skipped = skipped  # steps since the start of the run
        self.step = math.inf  # the first with a non-finite gradient; the same on all ranks
        self.loss_step = math.inf  # the first with a non-finite loss on this rank
        self.norms: list[float] = []  # gradient norms of self.step, one per parameter
        self.rates: dict[int, float] = {}  # step -> learning rate
        self.earlier = earlier  # restored from the checkpoint
        self._losses: list[tuple[int, Tensor, Tensor]] = []
        self._gradients: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def loss(self, step: int, loss: Tensor, count: Tensor) -> None:
        """Records a micro-batch's loss sum and token count (scalars on the device). The row's mean leaves out non-finite losses."""
        self._losses.append((step, loss, count))
        if len(self._losses) == MAX_PENDING:
            self._read_pending()

    def gradient(self, step: int, learning_rate: float, bad: Tensor, skip: Tensor, norms: Tensor) -> None:
        """Records a step. `bad`: its gradient is not finite; `skip`: its update is skipped; `norms`: one per local gradient. All on the device."""
        if len(self._gradients) == MAX_PENDING:
            self._read_pending()
        self._gradients.append((step, bad, skip, norms))
        self.rates[step] = learning_rate

    def _read_pending(self) -> None:
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

    def summarise(self, strategy: Any) -> tuple[int, int | None, tuple[float, float]]:
        """(skipped steps, first step with a non-finite loss or gradient on any rank, (loss sum, count) over the data ranks). A collective."""
        self._read_pending()
        mine = torch.tensor((self.loss_sum, self.count), dtype=torch.float64, device=self.device)
        loss_sum, count = strategy.reduce(mine, reduce_op="sum").tolist()
        step = min(self.step, self.loss_step)
        if dist.is_initialized():
            steps = torch.tensor(step, dtype=torch.float64, device=self.device)
            dist.all_reduce(steps, dist.ReduceOp.MIN)
            step = steps.item()
        return int(self.skipped), None if math.isinf(step) else int(step), (loss_sum, count)

    def describe(self, step: int | None, task: Any) -> NonFiniteStep | None:
        """Describes the failure that `summarise` found at `step`. A collective if `step` is not None; it may be slow."""
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
        return NonFiniteStep(step, self.rates.get(step, math.nan), parameter, len(found), ranks, losses, bad_gradient)

    def reset(self) -> None:
        self.loss_sum, self.count = 0.0, 0.0
        self.step = self.loss_step = math.inf
        self.rates.clear()
        self.earlier = None


def _on_host(values: tuple[Tensor, ...]) -> list[Any]:
    """The values of scalar tensors, with one transfer."""
    return torch.stack(values).tolist() if values else []
