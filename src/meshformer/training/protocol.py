"""What a step, evaluation and the callbacks ask of a strategy, beyond what Lightning's strategies have."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from meshformer.compat.torch import foreach_norm

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy as Base
else:
    Base = object


class StepStrategy(Base):
    """Mixed into Lightning's strategies. These methods are those of processes that each hold the whole model; MeshStrategy has its own."""

    averaged_over: int = 1  # ranks over which a backward pass averages gradients, where it does not sum them
    holds_whole_model: bool = True
    blocks_per_stage: list[int] | None = None  # of a pipeline

    @property
    def random_rank(self) -> int:
        """Equal on ranks that hold copies of one computation, whose dropout must agree; different on all others."""
        return self.global_rank  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def is_first_token_rank(self) -> bool:
        """Whether this rank is the first of those that see different tokens, which takes over sums that were restored."""
        return self.is_global_zero

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Without Lightning's precision context, which is for forward passes alone: `forward_backward` opens it."""
        task: Any = self.lightning_module
        return task.training_step(*args, **kwargs)

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """A step's micro-batches (a list) stay where they are: the step moves one at a time."""
        if isinstance(batch, list):
            return batch
        return super().batch_to_device(batch, device, dataloader_idx)  # pyright: ignore[reportAttributeAccessIssue]

    def forward_backward(self, batch: dict[str, Tensor], scale: float, last: bool) -> tuple[Tensor, Tensor]:
        """Adds the gradient of `scale` × the batch's loss sum to the parameters'; returns (loss sum, count of tokens), detached.

        Behind the `last` micro-batch of a step gradients are reduced over ranks, where a backward pass does that.
        """
        with nullcontext() if last else self.without_reduction():
            with self.precision_plugin.train_step_context():
                wrapped: Any = self.model  # the task, or DDP around it
                loss_sum, count = wrapped(batch, "train")
            self.backward(loss_sum * scale, None)
        return loss_sum.detach(), count

    def without_reduction(self) -> AbstractContextManager[Any]:
        return nullcontext()

    @torch.no_grad()
    def finish_gradients(self, optimizer: torch.optim.Optimizer) -> tuple[list[Tensor], Tensor, Tensor]:
        """This rank's part of the step's gradient, complete over all axes, the norm of each, and the norm of the whole. A collective on a mesh.

        16-mixed's loss scale is divided out first (`optimizer` tells of which parameters).
        """
        if (scaler := getattr(self.precision_plugin, "scaler", None)) is not None:
            scaler.unscale_(optimizer)
        task: Any = self.lightning_module
        gradients = [p.grad for p in task.trained if p.grad is not None]
        norms = torch.stack(foreach_norm(gradients, 2, dtype=torch.float32))
        return gradients, norms, torch.linalg.vector_norm(norms)

    def from_last_stage(self, tensor: Tensor) -> Tensor:
        """What the ranks that hold the head measured, on every rank of a pipeline; elsewhere `tensor` itself. A collective, in place."""
        return tensor

    def whole_weights(self) -> dict[str, Tensor] | None:
        """Every parameter, whole and on the host, by name: on global rank 0; None elsewhere. A collective, and as much memory as the model."""
        raise NotImplementedError("each process holds the whole model")

    def reshard(self) -> None:
        """Frees whole parameters that FSDP keeps, so that parameters are this rank's pieces again: before these are read or written."""
