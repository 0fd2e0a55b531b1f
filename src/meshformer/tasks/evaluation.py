"""What is measured on the validation and test parts: every item once, in any layout."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MetricCollection

from meshformer.model.settings import IGNORED

from .base import Task

# For every metric here: the states are summed by `Evaluated`, over the ranks that saw different items, and not once more by torchmetrics, over all.
SUMMED_HERE: dict[str, Any] = {"ignore_index": IGNORED, "validate_args": False, "sync_on_compute": False}


class Evaluated(Task):
    """A task that logs val/loss, the mean over every counted item of the part, and what `figures` makes of it and of its metrics.

    A subclass may keep torchmetrics whose states are sums, made with `sync_on_compute=False`: `metrics()` makes them, `score` feeds them by
    `update_metrics`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._eval_sums: Any = 0.0  # loss sum and count, this rank's; in double precision whatever the model computes in
        # In a list, which hides them from the module's own state: DDP and checkpoints would take an interest in it.
        self._metrics: list[MetricCollection] = []

    def metrics(self, outputs: int) -> MetricCollection:
        """The metrics of a model with so many outputs; none by default."""
        return MetricCollection({})

    def figures(self, phase: str, loss: Tensor, computed: dict[str, Tensor]) -> dict[str, Tensor]:
        """Name -> number, to log as `phase/name`; `computed` is what the metrics gave."""
        return {"loss": loss, **{name: value for name, value in computed.items() if value.ndim == 0}}

    def update_metrics(self, phase: str, prediction: Tensor, target: Tensor, outputs: int) -> None:
        if phase == "train":
            return
        if not self._metrics:
            self._metrics.append(self.metrics(outputs).to(prediction.device))
        self._metrics[0].update(prediction, target)

    def _evaluate(self, batch: dict[str, Tensor], phase: str) -> None:
        loss_sum, count = self.losses(batch, phase)
        self._eval_sums = self._eval_sums + torch.stack((loss_sum.detach().double(), count.double()))

    def _log_evaluation(self, phase: str) -> None:
        loss_sum, count = self.trainer.strategy.reduce(self._eval_sums, reduce_op="sum")
        values = self.figures(phase, loss_sum / count.clamp(min=1), self._computed())
        # logger=False: the run-record callback writes rows, with the step numbers that the rest of the project uses
        self.log_dict({f"{phase}/{name}": value.float() for name, value in values.items()}, logger=False)
        self._eval_sums = 0.0

    def _computed(self) -> dict[str, Tensor]:
        """The metrics over all ranks, from states that are summed over the ranks that saw different items. A collective."""
        outputs = self.outputs_of(getattr(self.trainer, "datamodule", None))
        if not self._metrics and outputs is None:
            return {}
        if not self._metrics:  # a pipeline rank without the head has seen no output
            self._metrics.append(self.metrics(outputs).to(self.device))  # pyright: ignore[reportArgumentType]
        strategy: Any = self.trainer.strategy
        collection = self._metrics[0]
        for metric in collection.values(copy_state=False):
            for name in metric.metric_state:
                total = strategy.reduce(getattr(metric, name), reduce_op="sum")
                setattr(metric, name, strategy.from_last_stage(total))
        with warnings.catch_warnings():  # a rank that saw no output is told that nothing was updated
            warnings.simplefilter("ignore")
            computed = collection.compute()
        collection.reset()
        return computed

    def outputs_of(self, data: Any) -> int | None:
        """The size that `metrics` is asked for, by the data module, where there is one; None for a task without metrics."""
        return None

    def headline(self, final: dict[str, float]) -> str:
        """The result in a line, from the run's last metrics."""
        return ", ".join(f"validation {name.removeprefix('val/')} {value:.4f}" for name, value in final.items() if name.startswith("val/"))

    def results(self, data: Any) -> dict[str, str]:
        """File name -> text, to be written into the run folder at the end."""
        return {}

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")
