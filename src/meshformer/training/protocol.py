"""The strategy methods that the step, the evaluation and the callbacks need in addition to Lightning's."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from meshformer.compat.torch import foreach_norm

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy as Base
else:
    Base = object


class StepStrategy(Base):
    """Mixin for Lightning's strategies. These defaults assume that each rank holds the whole model; MeshStrategy overrides them."""

    averaged_over: int = 1  # number of ranks if the backward pass averages gradients over ranks; 1 if it sums them
    holds_whole_model: bool = True
    blocks_per_stage: list[int] | None = None  # with pipeline parallelism

    @property
    def random_rank(self) -> int:
        """Seeds dropout: equal on ranks that repeat the same computation, whose masks must agree; different on all others."""
        return self.global_rank  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def is_first_token_rank(self) -> bool:
        """Whether this rank is the first among those with different tokens. It alone keeps sums restored from a checkpoint, so they count once."""
        return self.is_global_zero

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Without Lightning's precision context: `forward_backward` enters it for the forward pass only."""
        task: Any = self.lightning_module
        return task.training_step(*args, **kwargs)

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Leaves a step's list of micro-batches on the CPU: the step moves one at a time."""
        if isinstance(batch, list):
            return batch
        return super().batch_to_device(batch, device, dataloader_idx)  # pyright: ignore[reportAttributeAccessIssue]

    def forward_backward(self, batch: dict[str, Tensor], scale: float, last: bool) -> tuple[Tensor, Tensor]:
        """Accumulates the gradient of `scale` × the batch's loss sum; returns (loss sum, token count), detached.

        With DDP and FSDP the backward pass of the `last` micro-batch of a step reduces the gradients over ranks.
        """
        with nullcontext() if last else self.without_reduction():
            with self.precision_plugin.train_step_context():
                wrapped: Any = self.model  # the task, or DDP around it
                loss_sum, count = wrapped(batch, "train")
            self.backward(loss_sum * scale, None)
        return loss_sum.detach(), count

    def process_groups(self) -> dict[str, Any]:
        """Name -> process group of this rank, for those that training uses, in the same order on every rank."""
        return {"world": dist.group.WORLD} if dist.is_initialized() else {}

    def without_reduction(self) -> AbstractContextManager[Any]:
        return nullcontext()

    @torch.no_grad()
    def finish_gradients(self, optimizer: torch.optim.Optimizer) -> tuple[list[Tensor], Tensor, Tensor]:
        """Returns (local gradients reduced over all axes, their norms, the global norm). With 16-mixed, unscales the gradients of `optimizer` first.

        A collective on a mesh.
        """
        if (scaler := getattr(self.precision_plugin, "scaler", None)) is not None:
            scaler.unscale_(optimizer)
        task: Any = self.lightning_module
        gradients = [p.grad for p in task.trained if p.grad is not None]
        norms = torch.stack(foreach_norm(gradients, 2, dtype=torch.float32))
        return gradients, norms, torch.linalg.vector_norm(norms)

    def from_last_stage(self, tensor: Tensor) -> Tensor:
        """With a pipeline: broadcasts `tensor` in place from the last stage, which computes loss and metrics. Otherwise returns it unchanged."""
        return tensor

    def whole_weights(self) -> dict[str, Tensor] | None:
        """Name -> full (unsharded) parameter on the CPU, on global rank 0; None on the others. A collective; needs memory for the whole model."""
        raise NotImplementedError("each process holds the whole model: use task.model")

    def reshard(self) -> None:
        """Frees the full parameters that FSDP keeps after a forward pass. Call it before reading or writing the shards."""
