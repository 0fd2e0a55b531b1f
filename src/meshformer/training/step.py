"""One optimizer step, top to bottom: the same lines for one process, DDP and every mesh layout.

Token weighting: a micro-batch contributes the *sum* of its token losses, and the accumulated gradient is divided by the number of counted tokens
of the whole step, over all micro-batches and data ranks. The mean over tokens is then exact even where micro-batches or ranks hold
different numbers of counted tokens, which the usual mean of means gets wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from meshformer.compat.lightning import micro_batch_to_device
from meshformer.compat.torch import foreach_div_
from meshformer.optim.shardwise import ShardwiseOptimizer

from .protocol import StepStrategy

Batch = dict[str, Tensor]


def optimizer_step(task: Any, micro_batches: list[Batch]) -> Tensor:
    """Trains `task` on this rank's micro-batches of one step; returns the mean loss of their tokens, a scalar on the device.

    Nothing here waits for the device. Where the gradient is not finite on any rank, or `task.refuses` says so, no rank changes its weights or
    its optimizer state; the step counts all the same, and the schedule moves on.
    """
    trainer, optimizer = task.trainer, task.optimizers()
    strategy: StepStrategy = trainer.strategy
    step = trainer.global_step + 1
    zero_gradients(task, optimizer)

    # Forward and backward passes. `tokens_per_step` keeps the loss at a usual size for 16-bit gradients; it is divided out below.
    scale = strategy.averaged_over / task.tokens_per_step
    losses = tokens = torch.zeros((), device=task.device)
    for number, batch in enumerate(micro_batches):
        # Dropout depends on (seed, step, micro-batch, rank) alone: a resumed run draws what the uninterrupted one would have drawn.
        reseed(task.device, task.seed, step - 1, number, strategy.random_rank)
        batch = micro_batch_to_device(task, batch)
        loss_sum, count = strategy.forward_backward(batch, scale, number + 1 == len(micro_batches))
        task.guard.loss(step, loss_sum, count)
        losses, tokens = losses + loss_sum, tokens + count

    # The whole gradient, its norm, and the tokens of all ranks. A norm less itself is 0, or NaN where it is not finite, which the sum keeps.
    gradients, norms, norm = strategy.finish_gradients(optimizer.optimizer)
    all_tokens, not_finite = strategy.reduce(torch.stack((tokens, norm - norm)), reduce_op="sum")
    divisor = all_tokens.clamp(min=1) / task.tokens_per_step
    task.grad_norm = norm / divisor

    # Guard: whether this update is made at all.
    bad = not_finite != 0
    skip = bad if task.refuses is None else bad | task.refuses(task.grad_norm, bad, step)
    task.guard.gradient(step, optimizer.param_groups[0]["lr"], bad, skip, norms)

    # Clip by the global norm: one more factor in the divisor.
    if task.gradient_clip_val:
        divisor = divisor * ((task.grad_norm + 1e-6) / task.gradient_clip_val).clamp(min=1)

    divide_or_skip(optimizer.optimizer, gradients, divisor, skip)
    optimizer.step()
    step_schedules(trainer, "step", step)
    return losses / tokens.clamp(min=1)


def zero_gradients(task: Any, optimizer: Any) -> None:
    """Before the forward pass, which then does not run beside the old gradients in memory."""
    for callback in task.trainer.callbacks:
        callback.on_before_zero_grad(task.trainer, task, optimizer.optimizer)
    task.on_before_zero_grad(optimizer.optimizer)
    optimizer.zero_grad()


def divide_or_skip(optimizer: torch.optim.Optimizer, gradients: list[Tensor], divisor: Tensor, skip: Tensor) -> None:
    """Our optimizers divide gradients as they read them, and skip on the device. For others the host has to ask."""
    if isinstance(optimizer, ShardwiseOptimizer):
        optimizer.grad_scale, optimizer.found_inf = divisor, skip
    elif skip:
        optimizer.zero_grad()
    elif gradients:  # a pipeline rank may hold frozen layers alone
        foreach_div_(gradients, divisor)


def step_schedules(trainer: Any, interval: str, number: int) -> None:
    """Moves on the schedules that count in `interval`s ("step" or "epoch"), of which `number` are over."""
    for config in trainer.lr_scheduler_configs:
        if config.interval == interval and number % config.frequency == 0:
            config.scheduler.step()


def reseed(device: torch.device, *numbers: int) -> None:
    """Seeds the device's global generator from several integers (splitmix64's finaliser after each)."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ number) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
        state ^= state >> 31
    # Not torch.manual_seed: for a device type that is not initialised it queues itself, with a stack trace, at every call.
    torch.default_generator.manual_seed(state >> 1)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(state >> 1)
