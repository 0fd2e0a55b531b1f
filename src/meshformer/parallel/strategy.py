"""The Lightning strategy of every layout except `single` and `ddp`: it shards the model over a device mesh.

The order (torchtitan's, with the pipeline first): split into pipeline stages → tensor parallelism → context parallelism → activation checkpointing
and compilation → FSDP → allocate → initialise. Until it is allocated the model is on the meta device, so a rank never holds more than its shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from meshformer.checkpoint.lightning_io import FolderCheckpointIO, split, without_optimizer
from meshformer.checkpoint.optimizer import complete_groups, read_optimizer
from meshformer.checkpoint.pieces import piece_of
from meshformer.checkpoint.read import read_rest
from meshformer.checkpoint.weights import load_weights
from meshformer.compat.torch import foreach_norm
from meshformer.config.degrees import Degrees, uses_fsdp
from meshformer.config.errors import ConfigError
from meshformer.model.draw import fill_part
from meshformer.model.layout import plan_of, retie, ties
from meshformer.model.meta_device import allocate
from meshformer.printing import say
from meshformer.training.protocol import StepStrategy

from .context import ContextAxis
from .memory_options import apply_memory_options
from .mesh import AXES, GROUPS_OF_AXES, make_mesh
from .output_check import check_same_output, output_of, trial_batch
from .pipeline import Pipeline, Stage, local_tensor
from .products import overlap
from .sharded import reshard, shard, without_reduction
from .stages import balanced, check_pipeline_plan, cut, held_blocks, stage_costs
from .tensor import apply_tensor_parallel, check_tensor_plan


class MeshStrategy(StepStrategy, ModelParallelStrategy):
    """`settings` is a resolved `strategy` config node; `compile` is trainer.compile and `context_length` the data's.

    `init_from`, set before `fit`: a checkpoint with the initial weights. Parameters that match `reinit` are not loaded, and those that match
    `new_parts` are not loaded if they are missing there or have another shape.
    """

    def __init__(self, settings: dict[str, Any], compile: bool = False, context_length: int = 1, device: str = "cpu"):
        self.timeout = timedelta(seconds=settings["timeout"])
        # With a GPU also gloo, for collectives on CPU tensors (cpu_offload, asynchronous checkpoints).
        super().__init__(timeout=self.timeout, process_group_backend="gloo" if device == "cpu" else "cpu:gloo,cuda:nccl")
        self._mesh: DeviceMesh | None = None
        self.settings, self.compile, self.context_length = settings, compile, context_length
        self.degrees = Degrees.from_config(settings)
        self.init_from: Path | None = None
        self.new_parts: tuple[str, ...] = ()
        self.reinit: Sequence[str] | None = ()
        self.pipeline: Pipeline | None = None
        self.context: ContextAxis | None = None
        self._built = False
        self._loss_parallel: AbstractContextManager[Any] = nullcontext()

    # --- processes

    def setup_environment(self) -> None:
        super().setup_environment()
        if self._mesh is None:
            self.make_mesh()
            # Saving a checkpoint uses its own gloo group, since it may run in the background while training uses the others.
            self._checkpoint_group: Any = dist.new_group(backend="gloo", timeout=self.timeout)

    def make_mesh(self) -> None:
        self._mesh = make_mesh(self.degrees, self.root_device.type)

    @property
    def device_mesh(self) -> DeviceMesh:
        """Overrides Lightning's mesh, which has two axes."""
        assert self._mesh is not None, "setup_environment makes it"
        return self._mesh

    def axis(self, name: str) -> DeviceMesh:
        """One mesh axis, or a named group of them (see mesh.py)."""
        return self.device_mesh[name]

    def process_groups(self) -> dict[str, Any]:
        groups = super().process_groups() | {name: self.axis(name).get_group() for name in (*AXES, *GROUPS_OF_AXES)}
        named: dict[str, tuple[str, Any]] = {}
        for name, group in groups.items():  # an axis of all ranks has the world's own group, a group of axes may have that of one axis
            named.setdefault(group.group_name, (name, group))
        return dict(named.values())

    holds_whole_model = False

    @property
    def averaged_over(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """FSDP averages gradients over its ranks; our own all-reduce sums them."""
        return self.degrees.data * self.degrees.context if self._uses_fsdp else 1

    @property
    def random_rank(self) -> int:
        """Ranks with different tokens, layers or parts of a layer need different dropout masks; ranks that compute the same need equal ones."""
        axes = ["pipeline", "replicate", "shard", "context"] + ["tensor"] * self.settings["sequence_parallel"]
        rank = 0
        for name in axes:
            rank = rank * getattr(self.degrees, name) + self.axis(name).get_local_rank()
        return rank

    @property
    def is_first_token_rank(self) -> bool:
        return self.axis("tokens").get_local_rank() == 0

    @property
    def _uses_fsdp(self) -> bool:
        return uses_fsdp(self.settings)

    # --- the model

    def setup(self, trainer: Any) -> None:
        assert self.accelerator is not None and self.lightning_module is not None
        self.accelerator.setup(trainer)
        if not self._built:
            self._build(self.lightning_module)
            self._built = True
        self.open_loss_parallel()
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def open_loss_parallel(self) -> None:
        """Opens torch's `loss_parallel` if the layout has it, until `teardown`, because backward passes need it too."""
        if self.degrees.tensor > 1 and self.settings["loss_parallel"]:
            self._loss_parallel = loss_parallel()
            self._loss_parallel.__enter__()

    def _build(self, task: Any) -> None:
        model, whole = self.parallelize(task)
        if any(p.is_meta for p in model.parameters()):
            self.allocate(model)
            fill(model, task.seed, self.aliases)
        else:
            self.model_to_device()
        if self.init_from is not None:
            partial = self.pipeline is not None
            load_weights(model, self.init_from, partial, self.aliases, new=self.new_parts, reinit=self.reinit, whole=whole)
        self.model = self.lightning_module
        self.weigh_shards(task)

    def parallelize(self, task: Any) -> tuple[Any, set[str]]:
        """Splits and shards the task's model in place; returns it and the names of the whole model's tensors. Allocates nothing if it is on meta."""
        settings, degrees = self.settings, self.degrees
        model: Any = self.precision_plugin.convert_module(task.model)
        self.ties = ties(model)
        whole = set(model.state_dict())  # before a pipeline splits the model
        parts, numbers = [model], [0]
        n_stages = degrees.pipeline * settings["stages_per_rank"]
        self._check_plan(model, n_stages)
        if degrees.pipeline > 1:
            numbers = [self.axis("pipeline").get_local_rank() + k * degrees.pipeline for k in range(settings["stages_per_rank"])]
            counts = settings["blocks_per_stage"] or balanced(*stage_costs(model, self.context_length), n_stages)
            self.blocks_per_stage, parts = counts, cut(model, counts, numbers)
        if degrees.context > 1:
            self.context = ContextAxis(self.axis("context"), settings["context_method"])
        compile_options = overlap(self.axis("tensor")) if settings["async_tensor_parallel"] else None
        whole_output = self._unsharded_output(task, model)
        for part in parts:  # the stages of this rank, or the whole model without a pipeline
            if degrees.tensor > 1:
                apply_tensor_parallel(part, self.axis("tensor"), settings["sequence_parallel"], settings["loss_parallel"])
            if self.context is not None:  # after tensor parallelism: Ulysses shards the remaining local heads
                self.context.apply(part)
            if whole_output is not None:
                self._check_output(task, part, whole_output)
            apply_memory_options(held_blocks(part), settings["activation_checkpointing"], self.compile, compile_options)
        stages: list[Any] = list(parts)
        if degrees.pipeline > 1:
            stages = [Stage(part, self.precision_plugin.forward_context) for part in parts]
        self._stages = stages
        if self._uses_fsdp:
            mesh = self.device_mesh["replicate", "sharded"] if degrees.replicate > 1 else self.axis("sharded")
            after_forward = settings["reshard_after_forward"]
            for stage, part in zip(stages, parts, strict=True):
                shard(stage, held_blocks(part), mesh, settings, degrees.pipeline == 1 if after_forward == "auto" else after_forward)
            if self.is_global_zero and not held_blocks(parts[0]):
                say("the model has no list of blocks: FSDP gathers all of it at once")
        if degrees.pipeline > 1:
            self.pipeline = Pipeline(task, stages, numbers, n_stages, self.axis("pipeline"), settings)
            task.pipeline, task.aliases = self.pipeline.losses, self.aliases
        return model, whole

    def allocate(self, model: Any) -> None:
        """Gives every parameter of a model on meta memory of its own, without values. Buffers that have values keep them."""
        allocate(model, torch.device("cpu") if self.settings["cpu_offload"] else self.root_device)
        if not self._uses_fsdp:
            retie(model, self.ties)  # to_empty gave each tied name a tensor of its own

    def _check_plan(self, model: Any, n_stages: int) -> None:
        """ConfigError if the model has no Plan for an axis of this layout, or cannot be split that way."""
        plan = plan_of(model)
        for axis in ("tensor", "context", "pipeline"):
            if (degree := getattr(self.degrees, axis)) > 1 and (lacking := "a Plan" if plan is None else plan.lacks(axis)):
                message = f"the model lacks {lacking} (docs/make_it_yours/model.md)"
                raise ConfigError(message, f"strategy.{axis}", degree, fix="Add it, or use strategy=fsdp or ddp.")
        if self.degrees.tensor > 1:
            check_tensor_plan(model, self.degrees.tensor, self.settings["sequence_parallel"])
        if self.degrees.pipeline > 1:
            check_pipeline_plan(model, n_stages)

    def _unsharded_output(self, task: Any, model: Any) -> Tensor | None:
        """The output of the unsharded model, to compare with (output_check.py). None where that is impossible: on the meta device, for a pipeline
        stage alone, and on a GPU, where the unsharded model may not fit."""
        shared = self.degrees.tensor > 1 or self.degrees.context > 1
        if not shared or self.degrees.pipeline > 1 or self.root_device.type != "cpu" or any(p.is_meta for p in model.parameters()):
            return None
        return output_of(model, task, trial_batch(self.context_length))

    def _check_output(self, task: Any, model: Any, expected: Tensor) -> None:
        axis = "tensor" if self.degrees.tensor > 1 else "context"
        batch = trial_batch(self.context_length)
        if self.context is not None:
            batch = self.context.cut(batch)
            expected = expected.chunk(self.degrees.context, dim=1)[self.axis("context").get_local_rank()]
        check_same_output(model, task, batch, expected, axis, getattr(self.degrees, axis))

    def weigh_shards(self, task: Any) -> None:
        """Weights for the global gradient norm: 1 / (number of ranks with the same shard), for each trained parameter; 0 for a tied duplicate."""
        ranks = self.world_size // self.degrees.pipeline
        self._trained: list[tuple[Any, float]] = []
        self._weights: Tensor | None = None
        for name, p in task.model.named_parameters():
            shards = 1
            if isinstance(p, DTensor):
                for size, placement in zip(p.device_mesh.shape, p.placements, strict=True):
                    shards *= size if placement.is_shard() or "Strided" in type(placement).__name__ else 1
            weight = 0.0 if name in self.aliases else shards / ranks
            if p.requires_grad:
                self._trained.append((p, weight))

    @property
    def aliases(self) -> dict[str, str]:
        """Tied weights in a pipeline: the name of a parameter on the last stage -> its name in the whole model, where it exists only once."""
        if self.pipeline is None:
            return {}
        mine = {name for name, _ in self.pipeline.task.model.named_parameters(remove_duplicate=False)}
        return {other: name for other, name in self.ties.items() if other in mine and name not in mine}

    # --- a step

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        batch = super().batch_to_device(batch, device, dataloader_idx)
        return batch if self.context is None or isinstance(batch, list) else self.context.cut(batch)

    def forward_backward(self, batch: dict[str, Tensor], scale: float, last: bool) -> tuple[Tensor, Tensor]:
        if self.pipeline is None:
            return super().forward_backward(batch, scale, last)
        # The schedule runs all forward and backward passes, and FSDP reduces at its end, so Lightning's backward hooks are called after it.
        loss_sum, count = self.pipeline.forward_backward(batch, scale)
        self.precision_plugin.pre_backward(loss_sum, self.lightning_module)  # pyright: ignore[reportArgumentType]
        self.precision_plugin.post_backward(loss_sum, self.lightning_module)  # pyright: ignore[reportArgumentType]
        return loss_sum, count

    def without_reduction(self) -> AbstractContextManager[Any]:
        if self._uses_fsdp and self.settings["reduce_gradients"] == "last":
            return without_reduction(self.lightning_module.model)  # pyright: ignore[reportOptionalMemberAccess, reportArgumentType]
        return nullcontext()

    @torch.no_grad()
    def finish_gradients(self, optimizer: torch.optim.Optimizer) -> tuple[list[Tensor], Tensor, Tensor]:
        held = [(p, weight) for p, weight in self._trained if p.grad is not None]
        for p, _ in held:
            gradient: Any = p.grad
            if isinstance(gradient, DTensor) and gradient.placements != p.placements:  # pyright: ignore[reportAttributeAccessIssue]
                # Each rank has a partial sum of the gradients of embeddings and of RMSNorms on sequence shards; redistribute() adds them up.
                p.grad = gradient.redistribute(placements=p.placements)  # pyright: ignore[reportAttributeAccessIssue]
        gradients = [local_tensor(p.grad) for p, _ in held]
        if self.pipeline is not None:
            self.pipeline.add_tied(self.ties)
            if self.degrees.replicate > 1 and not self._uses_fsdp:
                self._all_reduce(gradients)
        total = torch.zeros((), dtype=torch.float64, device=self.root_device)
        norms = torch.zeros(0, device=self.root_device)
        if gradients:
            norms = torch.stack(foreach_norm(gradients, 2, dtype=torch.float32))
            if self._weights is None or len(self._weights) != len(held):  # cached: a copy to the GPU in every step would be a sync
                self._weights = torch.tensor([weight for _, weight in held], dtype=torch.float64, device=norms.device)
            total += norms.double().square() @ self._weights
        dist.all_reduce(total)
        return gradients, norms, total.sqrt().float()

    def _all_reduce(self, gradients: list[Tensor]) -> None:
        """Sums the gradients over `replicate` in one all-reduce."""
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, group=self.axis("replicate").get_group())
        for gradient, total in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))

    # --- metrics

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduces over the ranks with different tokens (`tokens`), so that tensor and pipeline ranks do not count twice."""
        return all_reduced(tensor, group if group is not None else self.axis("tokens").get_group(), reduce_op)

    def from_last_stage(self, tensor: Tensor) -> Tensor:
        if self.pipeline is not None:
            dist.broadcast(tensor, group=self.pipeline.group, group_src=self.pipeline.last_rank)
        return tensor

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        given = torch.tensor(int(decision), device=self.root_device)
        dist.all_reduce(given, op=dist.ReduceOp.MIN if all else dist.ReduceOp.MAX)
        return bool(given.item())

    def whole_weights(self) -> dict[str, Tensor] | None:
        task: Any = self.lightning_module
        self.reshard()
        mine: dict[str, Tensor] = {}
        for name, p in task.model.named_parameters():
            full = p.full_tensor() if isinstance(p, DTensor) else p
            if name not in self.aliases:
                mine[name] = full.detach().cpu()
        if self.pipeline is None:
            return mine if self.global_rank == 0 else None
        parts: list[Any] | None = [None] * self.pipeline.size if self.pipeline.rank == 0 else None
        dist.gather_object(mine, parts, group=self.pipeline.group, group_dst=0)
        if parts is None or self.global_rank != 0:
            return None
        return {name: value for part in parts for name, value in part.items()}

    # --- checkpoints: every rank writes and reads its own shards, by name

    def lightning_module_state_dict(self) -> dict[str, Any]:
        self.reshard()
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return optimizer.state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        self._checkpoints.wait()  # a background save uses the same process group
        tensors, rest = split(checkpoint, skip=set(self.aliases.values()))
        for optimizer in rest["optimizer_states"]:
            groups: list[Any] = [None] * self.world_size
            dist.all_gather_object(groups, optimizer["param_groups"], group=self._checkpoint_group)
            optimizer["param_groups"] = complete_groups(groups, self.lightning_module.model_names)  # pyright: ignore
        self._checkpoints.write(Path(self.broadcast(filepath)), tensors, rest, self._checkpoint_group)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path, task = Path(self.broadcast(checkpoint_path)), self.lightning_module
        assert task is not None
        self.reshard()
        load_weights(task.model, path, partial=self.pipeline is not None, aliases=self.aliases, averaged=False)  # pyright: ignore[reportArgumentType]
        rest = read_rest(path)
        if self._checkpoints.fresh_optimizer:
            return without_optimizer(rest)
        for optimizer, saved in zip(self.optimizers, rest["optimizer_states"], strict=False):
            optimizer.load_state_dict(read_optimizer(path, optimizer, saved["param_groups"]))
        return rest

    @property
    def _checkpoints(self) -> FolderCheckpointIO:
        assert isinstance(self.checkpoint_io, FolderCheckpointIO), "job/build.py gives the Trainer a FolderCheckpointIO"
        return self.checkpoint_io

    def reshard(self) -> None:
        for stage in self._stages:
            reshard(stage)

    def teardown(self) -> None:
        self.checkpoint_io.teardown()
        self._loss_parallel.__exit__(None, None, None)
        self._loss_parallel = nullcontext()
        super().teardown()


def all_reduced(tensor: Any, group: Any, reduce_op: Any) -> Any:
    """The sum or mean over `group`. Unlike Lightning's reduction it has no barrier, which would be a host sync in every step on GPUs."""
    if not isinstance(tensor, Tensor):
        return tensor
    total = tensor.clone()
    dist.all_reduce(total, group=group)
    return total if str(reduce_op).lower().endswith("sum") else total / dist.get_world_size(group)


@torch.no_grad()
def fill(model: Any, seed: int, aliases: dict[str, str]) -> None:
    """Initialises each rank's shards. A value depends on (seed, parameter name) only, so no communication is needed."""
    for name, p in model.named_parameters():
        piece = piece_of(p)
        if piece is not None:
            fill_part(piece.data, piece.slices, p.shape, partial(model.initial_value, aliases.get(name, name), p.shape, seed))
