"""What every task shares: a model, a loss summed over tokens, the optimizer and its schedule. One training step: training/step.py."""

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
from meshformer.training.guard import Guard, Trouble
from meshformer.training.step import optimizer_step, step_schedules

# Lightning calls these in automatic optimization alone: an override would be ignored.
NOT_CALLED = ("optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping", "lr_scheduler_step")
Optimizer = Callable[..., torch.optim.Optimizer]  # (named parameters, all_names=..., blocks=...) -> optimizer
Schedule = Callable[[int], Callable[[int], float]]


class Task(MicroBatches):
    """A subclass says what of a batch the model is given, `inputs(batch)`, by the names of our own models, and how its output is judged,
    `score(output, batch, phase) -> (loss sum, count of what was summed)`; the rest is here.

    `model` builds the network when Lightning calls `configure_model`; `optimizer` takes named parameters; `schedule` takes the number of
    steps and returns the multiplier of the learning rate at each. `tokens_per_step` only scales the loss to a usual size before the backward
    pass; it cancels out.
    `objective` is what the data is asked for (data/sequences.py); `writes_text` whether the model's outputs are the next tokens of a text.
    """

    objective = "next"
    writes_text = False
    learns_from: tuple[str, ...] | None = None  # kinds of data (data.kind); None: tasks/check.py does not judge what the task works with
    needs_column: str | None = None  # setting of `data` that must name a column where the source has such a setting
    own_head = False  # the task trains a head that predicts no tokens: one that came with pretrained weights is left behind
    pooled = False  # one result from all tokens of a sample

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
        self.automatic_optimization = False  # the step is training/step.py's
        self.gradient_clip_val: float | None = None  # the global norm's limit; job/build.py sets it

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

    def forward(self, batch: dict[str, Tensor], phase: str) -> tuple[Tensor, Tensor]:
        """`losses`, as a call of the module: what DDP wraps."""
        return self.losses(batch, phase)

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
                raise ConfigError("ReduceLROnPlateau has no metric to look at here", "task._target_", type(self).__name__, fix="Use schedule=….")
        self.trained = [p for p in self.model.parameters() if p.requires_grad]  # walking the modules at every step would cost more
        # Running values stay on the device where the host would wait for them; a callback reads them once every `log_every_n_steps`. They are
        # no buffers: DDP would broadcast those, and bf16-true would round them.
        self.grad_norm: Tensor | float = 0.0
        since_last_row = self._restored if strategy.is_first_token_rank else (0.0, 0.0)
        self.guard = Guard(self.device, since_last_row, *self._restored_guard)

    def training_step(self, batch: list[dict[str, Tensor]], batch_idx: int) -> Tensor:
        """One optimizer step; `batch` is this rank's micro-batches of it."""
        return optimizer_step(self, batch)

    def on_train_epoch_end(self) -> None:
        step_schedules(self.trainer, "epoch", self.trainer.current_epoch + 1)

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


def _from(first: int, multiplier: Callable[[int], float]) -> Callable[[int], float]:
    return (lambda step: multiplier(step) if step >= first else 0.0) if first else multiplier
