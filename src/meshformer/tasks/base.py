"""What every task shares: a Transformer, a token-weighted loss, one optimizer step that means the same in every layout.

Token weighting: a micro-batch contributes the *sum* of its token losses. Before clipping, the accumulated gradient is divided by the number
of tokens of the whole step, counted over all micro-batches and all data ranks. The mean over tokens is then exact even when micro-batches
or ranks hold different numbers of counted tokens, which the usual mean of means gets wrong.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from meshformer.config.arguments import places
from meshformer.config.errors import ConfigError
from meshformer.model.layout import blocks_name
from meshformer.optim.shardwise import ShardwiseOptimizer, asked_freely

from .guard import Guard, Trouble

# What Lightning calls at every step, of the task and of each callback.
STEP_HOOKS = (
    "on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end",
)  # fmt: skip
TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
Optimizer = Callable[..., torch.optim.Optimizer]  # (named parameters, all_names=..., blocks=...) -> optimizer
Schedule = Callable[[int], Callable[[int], float]]


class Task(pl.LightningModule):
    """A subclass says what of a batch the model is given, `inputs(batch)`, by the names of our own models, and how its output is judged,
    `score(output, batch, phase) -> (loss sum, count of what was summed)`; the rest is here.

    `model` builds the network when Lightning calls `configure_model`; `optimizer` takes named parameters; `schedule` takes the number of
    steps and returns the multiplier of the learning rate at each. `tokens_per_step` only scales the loss to a usual size before the backward
    pass; it cancels out.
    `objective` is what the data is asked for (data/sequences.py); `writes_text` whether the model's outputs are the next tokens of a text.
    """

    objective = "next"
    writes_text = False

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
        self.model_blocks: str | None = None  # dotted name of the model's repeated blocks
        self._read_of, self._read = 0, ({}, False, {})
        # Where this process holds a part of the model only, the strategy puts the function here that runs all parts: (batch, phase) -> losses.
        self.pipeline: Callable[[dict[str, Tensor], str], tuple[Tensor, Tensor]] | None = None
        self.aliases: dict[str, str] = {}  # names here of what has another name in the whole model: set by the strategy
        # Where set (callbacks.Spike): (norm, whether it is not finite, step) -> whether that step's update shall not be made, on the device.
        self.refuses: Callable[[Tensor, Tensor, int], Tensor] | None = None
        self.trouble: Trouble | None = None  # what the last row found
        self._restored, self._restored_guard = (0.0, 0.0), (0.0, None)
        spare_empty_hooks(self, pl.LightningModule)
        self.clears_alone = False  # so that Lightning need not
        self._batches_stay = False  # where they are made, on the CPU, and nobody wants to see them pass

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_current_fx_name":  # Lightning sets this string about fifty times a step; nn.Module's checks would cost 0.3 ms of it
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """What of the batch the model is given; None for what it might hold and does not. The first is what enters the first pipeline stage."""
        raise NotImplementedError(f"{type(self).__name__} must define inputs(batch)")

    def given(self, batch: dict[str, Tensor], phase: str) -> dict[str, Any]:
        """`inputs`, and what else the model is given in this phase."""
        return self.inputs(batch)

    def arguments(self, batch: dict[str, Tensor], phase: str) -> dict[str, Any]:
        """Keyword arguments of the model's own forward, the input first: what is `given`, by the names of its parameters (config/arguments.py).

        What is None is left to the model; positions that it requires are then 0, 1, 2, …, (1, T). ConfigError for what it does not take.
        """
        given = self.given(batch, phase)
        held = tuple(name for name, x in given.items() if x is not None)
        parameters, open_ended, known = self._takes
        if held not in known:
            try:
                known[held] = places(parameters, open_ended, held, [name for name in given if name not in held])
            except ValueError as error:
                kind = type(self.model)
                raise ConfigError(str(error), "model._target_", f"{kind.__module__}.{kind.__qualname__}") from None
        taken = known[held]
        arguments = {taken[name]: given[name] for name in held}
        for name, parameter in taken.items():
            if name not in held and parameters.get(parameter):
                first = given[held[0]]
                arguments[parameter] = torch.arange(first.shape[1], device=first.device)[None] if name == "positions_BT" else None
        return arguments

    @property
    def _takes(self) -> tuple[dict[str, bool], bool, dict[tuple[str, ...], dict[str, str]]]:
        """Of the model's forward: parameter -> whether it is required; whether it takes **kwargs; and what was matched with it so far."""
        if self._read_of != id(self.model):
            parameters = inspect.signature(self.model.forward).parameters.values()
            by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
            open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
            self._read_of, self._read = id(self.model), ({p.name: p.default is p.empty for p in by_name}, open_ended, {})
        return self._read

    def score(self, output: Tensor, batch: dict[str, Tensor], phase: str) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} must define score(output, batch, phase)")

    def losses(self, batch: dict[str, Tensor], phase: str) -> tuple[Tensor, Tensor]:
        """(loss sum, count) of a batch; `phase` is train, val or test."""
        if self.pipeline is not None:
            return self.pipeline(batch, phase)
        return self.scored(self.model(**self.arguments(batch, phase)), batch, phase)

    def scored(self, output: Tensor, batch: dict[str, Tensor], phase: str) -> tuple[Tensor, Tensor]:
        """`score`, with a loss that ranks computed together (loss parallel) as a plain tensor."""
        loss_sum, count = self.score(output, batch, phase)
        return getattr(loss_sum, "full_tensor", lambda: loss_sum)(), count

    def configure_model(self) -> None:
        if self.model is None:
            self.model = self.make_model()
            # Of the whole model: a strategy may then leave this process a part of it.
            self.model_names, self.model_blocks = [name for name, _ in self.model.named_parameters()], blocks_name(self.model)

    # --- one training step

    @property
    def data_rank_and_size(self) -> tuple[int, int]:
        sampler = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        return sampler["rank"], sampler["num_replicas"]

    def on_train_start(self) -> None:
        data_rank, data_size = self.data_rank_and_size
        accumulation, strategy = self.trainer.accumulate_grad_batches, self.trainer.strategy
        # Lightning divides the loss by the accumulation and the data axes average gradients: both are undone here.
        self._loss_scale = accumulation * getattr(strategy, "averaged_over", data_size) / self.tokens_per_step
        self._accumulation = accumulation
        looking = any(callable(one.on_before_zero_grad) for one in (self, *self.trainer.callbacks))  # pyright: ignore[reportAttributeAccessIssue]
        self._clears_early = not looking and getattr(self.optimizer_zero_grad, "__func__", None) is Task.optimizer_zero_grad
        # A training step of the user's may leave gradients of its own behind.
        self.clears_alone = self._clears_early and getattr(self.training_step, "__func__", None) is Task.training_step
        own = (self, getattr(self.trainer, "datamodule", None))
        changed = any(one is not None and is_overridden(hook, one) for hook in TRANSFER_HOOKS for one in own)
        self._batches_stay = self.device.type == "cpu" and not changed
        # Ranks that compute different numbers draw differently, and ranks that hold copies of one computation alike.
        self._random_rank = getattr(strategy, "random_rank", data_rank)
        self._trained = [p for p in self.model.parameters() if p.requires_grad]  # walking the modules at every step would cost more
        # Running values stay on the device where the host would wait for them; a callback reads them once every `log_every_n_steps`. They are
        # no buffers: DDP would broadcast those, and bf16-true would round them.
        self.step_count = torch.zeros((), dtype=torch.float32, device=self.device)  # counted tokens of the step in progress, this rank's
        self.grad_norm: Tensor | float = 0.0
        since_last_row = self._restored if getattr(strategy, "is_first_token_rank", data_rank == 0) else (0.0, 0.0)
        self.guard = Guard(self.device, since_last_row, *self._restored_guard)

    def on_train_end(self) -> None:
        self._batches_stay = False  # another trainer may have another device, or other data

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not hasattr(self, "guard"):  # a trainer that has only validated or tested: nothing happened since what was restored
            skipped, trouble = self._restored_guard
            checkpoint["since_last_row"], checkpoint["guard"] = self._restored, {"skipped": skipped, "trouble": trouble and tuple(trouble)}
            return
        # So that the first row after a resume is the mean since the last row before it.
        skipped, step, checkpoint["since_last_row"] = self.guard.look(self.trainer.strategy)
        trouble = self.guard.describe(step, self)
        checkpoint["guard"] = {"skipped": skipped, "trouble": trouble and tuple(trouble)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._restored = tuple(checkpoint["since_last_row"])
        guard = checkpoint.get("guard", {"skipped": 0, "trouble": None})  # 0.1 saved none
        self._restored_guard = (guard["skipped"], guard["trouble"] and Trouble(*guard["trouble"]))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.trainer.accumulate_grad_batches != self._accumulation:
            now = self.trainer.accumulate_grad_batches
            raise ConfigError(
                f"something set it to {now} during training, and a step's samples and weights were settled when it began",
                "trainer.accumulate_grad_batches",
                self._accumulation,
                fix="Leave that callback out.",
            )
        if self._clears_early and batch_idx % self._accumulation == 0:
            clear_gradients(self.trainer.optimizers[0])  # Lightning does so behind the forward pass, which would run beside the old ones
        # Dropout depends on (seed, step, micro-batch, rank) alone: a resumed run draws what the uninterrupted one would have drawn.
        step = self.trainer.global_step
        self._reseed(_mix(self.seed, step, batch_idx % self._accumulation, self._random_rank))
        loss_sum, count = self.losses(batch, "train")
        self.step_count += count
        self.guard.loss(step + 1, loss_sum.detach(), count)
        return loss_sum * self._loss_scale

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        clear_gradients(optimizer)

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        return batch if self._stays() else super()._on_before_batch_transfer(batch, dataloader_idx)

    def _apply_batch_transfer_handler(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        return batch if self._stays() else super()._apply_batch_transfer_handler(batch, device, dataloader_idx)

    def _stays(self) -> bool:
        return self._batches_stay and self.device.type == "cpu"

    def _reseed(self, seed: int) -> None:
        # Not torch.manual_seed: where a device type is not initialised it queues itself for later, with a stack trace, at every call.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index or 0].manual_seed(seed)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Finds what turns the accumulated sum into the mean over the step's tokens, clipped by its global norm: one divisor for all gradients.

        Our optimizers divide by it in their step, as `grad_scale`: until then `p.grad` is the sum. For others gradients are divided here.

        Where the norm is not finite on any rank, nor is the update: every rank tells its optimizer, on the device, to change nothing.
        (Other optimizers than ours are given no gradients then, for which the host has to ask.) The step counts, and the schedule moves on.
        """
        strategy: Any = self.trainer.strategy
        if hasattr(strategy, "finished_gradients"):  # parameters are pieces: their norm takes the other ranks
            gradients, norms, norm = strategy.finished_gradients()
        else:
            gradients = [p.grad for p in self._trained if p.grad is not None]
            norms = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32))
            norm = torch.linalg.vector_norm(norms)
        # A norm less itself is 0, or NaN where it is not finite, which a sum over ranks keeps.
        numbers = strategy.reduce(torch.stack((self.step_count, norm - norm)), reduce_op="sum")
        if asked_freely(numbers.device) and self.refuses is None:  # then Python works with them; a tensor operation takes ten times as long
            (count, bad), norm = numbers.tolist(), norm.item()
        else:
            count, bad = numbers
        divisor, bad = _at_least(count, 1) / self.tokens_per_step, bad != 0
        grad_norm: Any = norm / divisor
        step, optimizer = self.trainer.global_step + 1, getattr(optimizer, "_optimizer", optimizer)
        skip = bad if self.refuses is None else bad | self.refuses(grad_norm, bad, step)
        self.guard.gradient(step, optimizer.param_groups[0]["lr"], bad, skip, norms)
        if gradient_clip_val:
            divisor = divisor * _at_least((grad_norm + 1e-6) / gradient_clip_val, 1)
        if isinstance(optimizer, ShardwiseOptimizer):
            optimizer.grad_scale, optimizer.found_inf = divisor, skip
        elif skip:
            clear_gradients(optimizer)
        elif gradients:  # a pipeline rank may hold frozen layers alone
            torch._foreach_div_(gradients, divisor)
        self.grad_norm = grad_norm
        self.step_count.zero_()

    def running_metrics(self, reset: bool = True) -> dict[str, float]:
        """What was measured since the last reset, over all ranks and on the host; every rank must call it at the same step.

        Of micro-batches whose loss is not finite the mean knows nothing: `trouble` tells of them, and of gradients that were not.
        """
        skipped, step, (loss_sum, count) = self.guard.look(self.trainer.strategy)
        self.trouble = self.guard.describe(step, self)
        if reset:
            self.guard.reset()
        loss = loss_sum / count if count else float("nan")
        return {"train/loss": loss, "train/grad_norm": float(self.grad_norm), "train/skipped_steps": float(skipped)}

    def configure_optimizers(self) -> Any:
        assert self.make_optimizer is not None
        named = [(self.aliases.get(name, name), p) for name, p in self.model.named_parameters()]
        whole: dict[str, Any] = {"blocks": self.model_blocks}
        if self.pipeline is not None:  # a part of the model: what the optimizer refuses, and its groups, depend on the whole
            whole["all_names"] = self.model_names
        takes = inspect.signature(self.make_optimizer).parameters
        optimizer = self.make_optimizer(named, **{name: value for name, value in whole.items() if name in takes})
        if self.make_schedule is None:
            return optimizer
        multiplier = self.make_schedule(self.max_steps)
        multipliers = [_from(group.get("first_step", 0), multiplier) for group in optimizer.param_groups]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, multipliers)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def spare_empty_hooks(owner: Any, base: type[Any]) -> None:
    """Lightning passes over a hook that cannot be called: those of `owner` that are still the empty ones of `base` become None."""
    for hook in STEP_HOOKS:
        if hook not in vars(owner) and getattr(type(owner), hook) is getattr(base, hook):
            vars(owner)[hook] = None


def clear_gradients(optimizer: torch.optim.Optimizer) -> None:
    """`zero_grad`, and where that is torch's without its record for the profiler, which costs more than the work."""
    optimizer = getattr(optimizer, "_optimizer", optimizer)
    if type(optimizer).zero_grad is not torch.optim.Optimizer.zero_grad:
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None


def _at_least(x: Any, least: float) -> Any:
    return x.clamp(min=least) if isinstance(x, Tensor) else max(x, least)


def _from(first: int, multiplier: Callable[[int], float]) -> Callable[[int], float]:
    return (lambda step: multiplier(step) if step >= first else 0.0) if first else multiplier


def _mix(*numbers: int) -> int:
    """One 63-bit seed from several integers (splitmix64's finaliser after each)."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ number) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
        state ^= state >> 31
    return state >> 1
