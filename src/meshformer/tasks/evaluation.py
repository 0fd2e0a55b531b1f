"""Evaluation on the validation and test splits; every item counts once in any layout."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MetricCollection

from meshformer.model.settings import IGNORED

from .base import Task

# Options for every metric: `Evaluated` sums the states over the ranks with different items. torchmetrics' own sync would sum over all ranks.
SUMMED_HERE: dict[str, Any] = {"ignore_index": IGNORED, "validate_args": False, "sync_on_compute": False}


class Evaluated(Task):
    """A task that logs val/loss, the mean over every counted item of the split, and further metrics.

    For torchmetrics whose states are sums, a subclass overrides `metrics` (with the options SUMMED_HERE) and calls `update_metrics` in `score`;
    `figures` turns loss and metrics into the logged values.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._eval_sums: Any = 0.0  # this rank's loss sum and count, in fp64
        # In a list, so that torchmetrics are no submodules: DDP would broadcast their state, and checkpoints would save it.
        self._metrics: list[MetricCollection] = []

    def metrics(self, outputs: int) -> MetricCollection:
        """The metrics for a model with `outputs` classes; none by default."""
        return MetricCollection({})

    def figures(self, phase: str, loss: Tensor, computed: dict[str, Tensor]) -> dict[str, Tensor]:
        """Name -> scalar, logged as `phase/name`; `computed` holds the values of the metrics."""
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
        # logger=False: callbacks.Rows logs them, with step numbers that count optimizer steps
        self.log_dict({f"{phase}/{name}": value.float() for name, value in values.items()}, logger=False)
        self._eval_sums = 0.0

    def _computed(self) -> dict[str, Tensor]:
        """The values of the metrics, from states summed over the ranks with different items. A collective."""
        outputs = self.outputs_of(getattr(self.trainer, "datamodule", None))
        if not self._metrics and outputs is None:
            return {}
        if not self._metrics:  # a pipeline stage without the head has seen no outputs
            self._metrics.append(self.metrics(outputs).to(self.device))  # pyright: ignore[reportArgumentType]
        strategy: Any = self.trainer.strategy
        collection = self._metrics[0]
        for metric in collection.values(copy_state=False):
            for name in metric.metric_state:
                total = strategy.reduce(getattr(metric, name), reduce_op="sum")
                setattr(metric, name, strategy.from_last_stage(total))
        with warnings.catch_warnings():  # torchmetrics warns on ranks that saw no outputs
            warnings.simplefilter("ignore")
            computed = collection.compute()
        collection.reset()
        return computed

    def outputs_of(self, data: Any) -> int | None:
        """The number of outputs to pass to `metrics`, from the data module; None for a task without metrics."""
        return None

    def headline(self, final: dict[str, float]) -> str:
        """The result of the run in one line, from its last metrics."""
        return ", ".join(f"validation {name.removeprefix('val/')} {value:.4f}" for name, value in final.items() if name.startswith("val/"))

    def results(self, data: Any) -> dict[str, str]:
        """File name -> text, written into the run folder at the end."""
        return {}

    def drawings(self, data: Any) -> dict[str, Any]:
        """Name -> figure of matplotlib, for the loggers at the end; empty where matplotlib is not installed."""
        return {}

    def sample_text(self) -> str | None:
        """A text that shows what the model does, after each validation: RUN/samples/. A collective; the last pipeline stage's text counts."""
        return None

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")
