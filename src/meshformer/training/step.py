"""One optimizer step, top to bottom: the same lines for one process, DDP and every mesh layout.

Token weighting: a micro-batch contributes the *sum* of its token losses, and the accumulated gradient is divided by the number of counted tokens
of the whole step, over all micro-batches and data ranks. This is the exact mean over tokens even if micro-batches or ranks have different numbers
of counted tokens, where the usual mean of means is biased.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from meshformer.compat.lightning import micro_batch_to_device
from meshformer.optim.shardwise import ShardwiseOptimizer

from .protocol import StepStrategy

Batch = dict[str, Tensor]


def optimizer_step(task: Any, micro_batches: list[Batch]) -> Tensor:
    """Trains `task` on this rank's micro-batches of one step; returns the mean loss of their tokens, a scalar on the device.

    There is no host sync. If the gradient is not finite on any rank, or `task.should_skip` returns true, no rank changes its weights or optimizer
    state; the step still counts, and the learning-rate schedule advances.
    """
    trainer, optimizer = task.trainer, task.optimizers()
    strategy: StepStrategy = trainer.strategy
    step = trainer.global_step + 1
    zero_gradients(task, optimizer)

    # Forward and backward passes. Dividing by `tokens_per_step` keeps 16-bit gradients in range; `divisor` corrects it to the exact count.
    scale = strategy.averaged_over / task.tokens_per_step
    losses = tokens = torch.zeros((), device=task.device)
    for number, batch in enumerate(micro_batches):
        # Dropout depends on (seed, step, micro-batch, rank) only, so a resumed run draws the same masks as an uninterrupted one.
        reseed(task.device, task.seed, step - 1, number, strategy.random_rank)
        batch = micro_batch_to_device(task, batch)
        loss_sum, count = strategy.forward_backward(batch, scale, number + 1 == len(micro_batches))
        task.guard.loss(step, loss_sum, count)
        losses, tokens = losses + loss_sum, tokens + count

    # Gradient norm and token count over all ranks. norm − norm is 0, or NaN if the norm is not finite, and a NaN survives the sum over ranks.
    gradients, norms, norm = strategy.finish_gradients(optimizer.optimizer)
    all_tokens, not_finite = strategy.reduce(torch.stack((tokens, norm - norm)), reduce_op="sum")
    divisor = all_tokens.clamp(min=1) / task.tokens_per_step
    task.grad_norm = norm / divisor

    # Skip the update?
    bad = not_finite != 0
    skip = bad if task.should_skip is None else bad | task.should_skip(task.grad_norm, bad, step)
    task.guard.gradient(step, optimizer.param_groups[0]["lr"], bad, skip, norms)

    # Clip by the global norm: one more factor in the divisor.
    if task.gradient_clip_val:
        divisor = divisor * ((task.grad_norm + 1e-6) / task.gradient_clip_val).clamp(min=1)

    divide_or_skip(optimizer.optimizer, gradients, divisor, skip)
    optimizer.step()
    step_schedules(trainer, "step", step)
    if trainer.is_last_batch:
        step_schedules(trainer, "epoch", trainer.current_epoch + 1)
    return losses / tokens.clamp(min=1)


def zero_gradients(task: Any, optimizer: Any) -> None:
    """Frees the old gradients before the forward pass, and calls the hooks that Lightning calls in automatic optimization."""
    for callback in task.trainer.callbacks:
        callback.on_before_zero_grad(task.trainer, task, optimizer.optimizer)
    task.on_before_zero_grad(optimizer.optimizer)
    optimizer.zero_grad()


def divide_or_skip(optimizer: torch.optim.Optimizer, gradients: list[Tensor], divisor: Tensor, skip: Tensor) -> None:
    """Our optimizers divide gradients and skip on the device. Other optimizers need a host sync to read `skip`."""
    if isinstance(optimizer, ShardwiseOptimizer):
        optimizer.grad_scale, optimizer.found_inf = divisor, skip
    elif skip:
        optimizer.zero_grad()
    else:
        for gradient in gradients:
            gradient.div_(divisor)


def step_schedules(trainer: Any, interval: str, number: int) -> None:
    """Steps the learning-rate schedules with this `interval` ("step" or "epoch"); `number`: completed intervals."""
    for config in trainer.lr_scheduler_configs:
        if config.interval == interval and number % config.frequency == 0:
            config.scheduler.step()


def reseed(device: torch.device, *numbers: int) -> None:
    """Seeds the global generators of the CPU and the device with a hash of several integers (splitmix64's finaliser)."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ number) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
        state ^= state >> 31
    # Not torch.manual_seed: for uninitialised device types it queues a call together with a stack trace, every time.
    torch.default_generator.manual_seed(state >> 1)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(state >> 1)
