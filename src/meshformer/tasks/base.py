"""What every task shares: a Transformer, a token-weighted loss, one optimizer step that means the same in every layout.

Token weighting: a micro-batch contributes the *sum* of its token losses. Before clipping, the accumulated gradient is divided by the number
of tokens of the whole step, counted over all micro-batches and all data ranks. The mean over tokens is then exact even when micro-batches
or ranks hold different numbers of counted tokens, which the usual mean of means gets wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

Optimizer = Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer]
Schedule = Callable[[int], Callable[[int], float]]


class Task(pl.LightningModule):
    """A subclass says `losses(batch, phase) -> (loss sum, count of what was summed)`; the rest is here.

    `model` builds the network when Lightning calls `configure_model`; `optimizer` takes named parameters; `schedule` takes the number of
    steps and returns the multiplier of the learning rate at each. `tokens_per_step` only scales the loss to a usual size before the backward
    pass; it cancels out.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        optimizer: Optimizer | None = None,
        schedule: Schedule | None = None,
        max_steps: int = 1,
        seed: int = 0,
        tokens_per_step: int = 1,
    ):
        super().__init__()
        self.make_model, self.make_optimizer, self.make_schedule = model, optimizer, schedule
        self.max_steps, self.seed, self.tokens_per_step = max_steps, seed, tokens_per_step
        self.model: Any = None
        self._restored = (0.0, 0.0)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_current_fx_name":  # Lightning sets this string about fifty times a step; nn.Module's checks would cost 0.3 ms of it
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def losses(self, batch: dict[str, Tensor], phase: str) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} must define losses(batch, phase)")

    def configure_model(self) -> None:
        if self.model is None:
            self.model = self.make_model()

    # --- one training step

    @property
    def data_rank_and_size(self) -> tuple[int, int]:
        sampler = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        return sampler["rank"], sampler["num_replicas"]

    def on_train_start(self) -> None:
        self._data_rank, data_size = self.data_rank_and_size
        accumulation = self.trainer.accumulate_grad_batches
        # Lightning divides the loss by the accumulation and the data axis averages gradients: both are undone here.
        self._loss_scale = accumulation * data_size / self.tokens_per_step
        self._accumulation = accumulation
        self._trained = [p for p in self.model.parameters() if p.requires_grad]  # walking the modules at every step would cost more
        # Running values stay on the device; a callback reads them once every `log_every_n_steps`. They are no buffers: DDP would broadcast
        # those, and bf16-true would round them.
        self.step_count = torch.zeros((), dtype=torch.float32, device=self.device)  # counted tokens of the step in progress, this rank's
        self.grad_norm = torch.zeros((), dtype=torch.float32, device=self.device)
        since_last_row = self._restored if self._data_rank == 0 else (0.0, 0.0)
        self.loss_sum, self.loss_count = torch.tensor(since_last_row, dtype=torch.float64, device=self.device)  # this rank's

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # So that the first row after a resume is the mean since the last row before it.
        checkpoint["since_last_row"] = self._totals().tolist()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._restored = tuple(checkpoint["since_last_row"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        # Dropout depends on (seed, step, micro-batch, data rank) alone: a resumed run draws what the uninterrupted one would have drawn.
        self._reseed(_mix(self.seed, self.trainer.global_step, batch_idx % self._accumulation, self._data_rank))
        loss_sum, count = self.losses(batch, "train")
        self.step_count += count
        self.loss_sum += loss_sum.detach()
        self.loss_count += count
        return loss_sum * self._loss_scale

    def _reseed(self, seed: int) -> None:
        # Not torch.manual_seed: where a device type is not initialised it queues itself for later, with a stack trace, at every call.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index or 0].manual_seed(seed)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Turns the accumulated sum into the mean over the step's tokens and clips it by its global norm, in one pass over the gradients."""
        count = self.trainer.strategy.reduce(self.step_count, reduce_op="sum")
        gradients = [p.grad for p in self._trained if p.grad is not None]
        scale = self.tokens_per_step / count.clamp(min=1)
        self.grad_norm.copy_(torch.nn.utils.get_total_norm(gradients) * scale)
        if gradient_clip_val:
            scale = scale * (gradient_clip_val / (self.grad_norm + 1e-6)).clamp(max=1)
        torch._foreach_mul_(gradients, scale)
        self.step_count.zero_()

    def _totals(self) -> Tensor:
        """Loss sum and count since the last row, over the data ranks; a collective."""
        return self.trainer.strategy.reduce(torch.stack((self.loss_sum, self.loss_count)), reduce_op="sum")

    def running_metrics(self, reset: bool = True) -> dict[str, Tensor]:
        """What was measured since the last reset, summed over the data ranks; every rank must call it at the same step."""
        loss_sum, count = self._totals()
        if reset:
            self.loss_sum.zero_()
            self.loss_count.zero_()
        return {"train/loss": loss_sum / count.clamp(min=1), "train/grad_norm": self.grad_norm.clone()}

    def configure_optimizers(self) -> Any:
        assert self.make_optimizer is not None
        optimizer = self.make_optimizer(self.model.named_parameters())
        if self.make_schedule is None:
            return optimizer
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.make_schedule(self.max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _mix(*numbers: int) -> int:
    """One 63-bit seed from several integers (splitmix64's finaliser after each)."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ number) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
        state ^= state >> 31
    return state >> 1
