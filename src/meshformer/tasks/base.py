"""The base class of tasks: a model, a loss summed over tokens, the optimizer and its schedule. training/step.py has the training step."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from meshformer.compat.lightning import MicroBatches
from meshformer.config.arguments import places
from meshformer.config.errors import ConfigError
from meshformer.model.layout import blocks_name
from meshformer.training.guard import Guard, NonFiniteStep
from meshformer.training.step import optimizer_step

# Lightning calls these in automatic optimization only, so an override would be ignored.
NOT_CALLED = ("optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping", "lr_scheduler_step")
Optimizer = Callable[..., torch.optim.Optimizer]  # (named parameters, all_names=..., blocks=...) -> optimizer
Schedule = Callable[[int], Callable[[int], float]]


class Task(MicroBatches):
    """A subclass implements two methods: `inputs(batch)`, the model's arguments, and `score(output, batch, phase) -> (loss sum, count)`.

    `model` builds the network when Lightning calls `configure_model`; `optimizer` takes named parameters; `schedule` takes the number of steps and
    returns a function from the step to the multiplier of the learning rate, or it is a class of torch.optim.lr_scheduler, and takes the
    optimizer. `tokens_per_step` is an estimate that only keeps the scale of the loss during the backward pass; training/step.py corrects it to
    the exact count.
    """

    objective = "next"  # the training objective: it selects the targets (data/objectives.py)
    writes_text = False  # whether the model's outputs are next-token logits
    learns_from: tuple[str, ...] | None = None  # accepted values of data.kind; None: tasks/check.py does not check the data
    needs_column: str | None = None  # a setting of the data source that must name a column, if the source has it
    own_head = False  # whether the task trains a new head instead of loading that of pretrained weights
    hub_tag: str | None = None  # what the Hugging Face hub calls such a task, for model cards
    pooled = False  # whether the model has one output per sample, pooled over its tokens

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
        self._signature_of, self._signature = 0, ({}, False, {})
        # With pipeline parallelism the strategy sets this: (batch, phase) -> (loss sum, count), computed by all stages.
        self.pipeline: Callable[[dict[str, Tensor], str], tuple[Tensor, Tensor]] | None = None
        self.aliases: dict[str, str] = {}  # set by the strategy: parameter name in this pipeline stage -> in the whole model
        # Set by callbacks.Spike: (gradient norm, whether it is not finite, step) -> whether to skip the update; tensors on the device.
        self.should_skip: Callable[[Tensor, Tensor, int], Tensor] | None = None
        self.failure: NonFiniteStep | None = None  # found by the last `running_metrics`
        self._restored, self._restored_guard = (0.0, 0.0), (0.0, None)
        self.automatic_optimization = False  # training/step.py performs the step
        self.gradient_clip_val: float | None = None  # set by job/build.py

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """Argument name of our models -> tensor of the batch, or None if this batch has none. The first is the input of the first pipeline stage."""
        raise NotImplementedError(f"{type(self).__name__} must define inputs(batch)")

    def phase_inputs(self, batch: dict[str, Tensor], phase: str) -> dict[str, Any]:
        """`inputs` plus further arguments for this phase (train, val or test)."""
        return self.inputs(batch)

    def arguments(self, batch: dict[str, Tensor], phase: str) -> dict[str, Any]:
        """Keyword arguments for the model's forward, the input first: `phase_inputs`, renamed to the model's parameter names (config/arguments.py).

        Arguments that are None are left out; required positions are then 0, 1, 2, …, (1, T). ConfigError for an argument the model does not accept.
        """
        given = self.phase_inputs(batch, phase)
        held = tuple(name for name, x in given.items() if x is not None)
        parameters, open_ended, known = self._forward_signature
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
    def _forward_signature(self) -> tuple[dict[str, bool], bool, dict[tuple[str, ...], dict[str, str]]]:
        """(parameter of the model's forward -> required or not, whether it accepts **kwargs, cache of matched argument names)."""
        if self._signature_of != id(self.model):
            parameters = inspect.signature(self.model.forward).parameters.values()
            by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
            open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
            self._signature_of, self._signature = id(self.model), ({p.name: p.default is p.empty for p in by_name}, open_ended, {})
        return self._signature

    def score(self, output: Tensor, batch: dict[str, Tensor], phase: str) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} must define score(output, batch, phase)")

    def forward(self, batch: dict[str, Tensor], phase: str) -> tuple[Tensor, Tensor]:
        """`losses` as a module call, because DDP wraps `forward`."""
        return self.losses(batch, phase)

    def losses(self, batch: dict[str, Tensor], phase: str) -> tuple[Tensor, Tensor]:
        """(loss sum, count) of a batch; `phase` is train, val or test."""
        if self.pipeline is not None:
            return self.pipeline(batch, phase)
        return self.scored(self.model(**self.arguments(batch, phase)), batch, phase)

    def scored(self, output: Tensor, batch: dict[str, Tensor], phase: str) -> tuple[Tensor, Tensor]:
        """`score`, with the loss as a plain tensor: loss parallelism returns a DTensor."""
        loss_sum, count = self.score(output, batch, phase)
        return getattr(loss_sum, "full_tensor", lambda: loss_sum)(), count

    def configure_model(self) -> None:
        if self.model is None:
            self.model = self.make_model()
            # Recorded before a pipeline splits the model.
            self.model_names, self.model_blocks = [name for name, _ in self.model.named_parameters()], blocks_name(self.model)

    # --- one training step

    def setup(self, stage: str) -> None:
        for hook in NOT_CALLED if stage == "fit" else ():
            if is_overridden(hook, self):
                kind = type(self)
                message = f"overrides {hook}, which is not called here: a step is written out in training/step.py"
                raise ConfigError(message, "task._target_", f"{kind.__module__}.{kind.__qualname__}", fix="Override training_step.")

    def on_train_start(self) -> None:
        if self.pipeline is not None and type(self).losses is not Task.losses:
            message = f"{type(self).__name__} overrides losses, and in a pipeline only score is called, for each of its micro-batches"
            raise ConfigError(message, "strategy.pipeline", fix="Override score.")
        strategy: Any = self.trainer.strategy
        for schedule in self.trainer.lr_scheduler_configs:
            if isinstance(schedule.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                raise ConfigError("ReduceLROnPlateau has no metric to monitor here", "task._target_", type(self).__name__, fix="Use schedule=….")
        self.trained = [p for p in self.model.parameters() if p.requires_grad]  # cached: walking the modules at every step is slow
        # Running values stay on the device, and a callback reads them once every `log_every_n_steps`. They are not buffers, because DDP would
        # broadcast buffers and bf16-true would round them.
        self.grad_norm: Tensor | float = 0.0
        since_last_row = self._restored if strategy.is_first_token_rank else (0.0, 0.0)
        self.guard = Guard(self.device, since_last_row, *self._restored_guard)

    def training_step(self, batch: list[dict[str, Tensor]], batch_idx: int) -> Tensor:
        """One optimizer step; `batch` is the list of this rank's micro-batches."""
        return optimizer_step(self, batch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not hasattr(self, "guard"):  # only validated or tested, so the restored values are unchanged
            skipped, failure = self._restored_guard
            checkpoint["since_last_row"], checkpoint["guard"] = self._restored, {"skipped": skipped, "trouble": failure and tuple(failure)}
            return
        # The first row after a resume must be the mean since the last row before the checkpoint.
        skipped, step, checkpoint["since_last_row"] = self.guard.summarise(self.trainer.strategy)
        failure = self.guard.describe(step, self)
        checkpoint["guard"] = {"skipped": skipped, "trouble": failure and tuple(failure)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._restored = tuple(checkpoint["since_last_row"])
        guard = checkpoint.get("guard", {"skipped": 0, "trouble": None})  # checkpoints of version 0.1 have no guard
        self._restored_guard = (guard["skipped"], guard["trouble"] and NonFiniteStep(*guard["trouble"]))

    def running_metrics(self, reset: bool = True) -> dict[str, float]:
        """Metrics since the last reset, over all ranks. A collective and a sync: every rank must call it at the same step.

        The mean loss leaves out micro-batches with a non-finite loss; `self.failure` reports these and non-finite gradients.
        """
        skipped, step, (loss_sum, count) = self.guard.summarise(self.trainer.strategy)
        self.failure = self.guard.describe(step, self)
        if reset:
            self.guard.reset()
        loss = loss_sum / count if count else float("nan")
        return {"train/loss": loss, "train/grad_norm": float(self.grad_norm), "train/skipped_steps": float(skipped)}

    def configure_optimizers(self) -> Any:
        assert self.make_optimizer is not None
        named = [(self.aliases.get(name, name), p) for name, p in self.model.named_parameters()]
        whole: dict[str, Any] = {"blocks": self.model_blocks}
        if self.pipeline is not None:  # the optimizer's checks and groups depend on the names of the whole model
            whole["all_names"] = self.model_names
        takes = inspect.signature(self.make_optimizer).parameters
        optimizer = self.make_optimizer(named, **{name: value for name, value in whole.items() if name in takes})
        if self.make_schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._schedule_of(optimizer), "interval": "step"}}

    def _schedule_of(self, optimizer: torch.optim.Optimizer) -> Any:
        """torch's scheduler for `make_schedule`: one of its own classes, or LambdaLR around our multipliers."""
        assert self.make_schedule is not None
        kind = getattr(self.make_schedule, "func", self.make_schedule)
        if isinstance(kind, type) and issubclass(kind, torch.optim.lr_scheduler.LRScheduler):
            try:
                return self.make_schedule(optimizer)  # pyright: ignore[reportArgumentType]
            except (TypeError, ValueError) as error:
                raise ConfigError(f"it cannot be made ({error})", "schedule._target_", f"{kind.__module__}.{kind.__qualname__}") from None
        multiplier = self.make_schedule(self.max_steps)
        multipliers = [_zero_before(group.get("first_step", 0), multiplier) for group in optimizer.param_groups]
        return torch.optim.lr_scheduler.LambdaLR(optimizer, multipliers)


def _zero_before(first: int, multiplier: Callable[[int], float]) -> Callable[[int], float]:
    return (lambda step: multiplier(step) if step >= first else 0.0) if first else multiplier
