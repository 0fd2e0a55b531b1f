"""Tensor parallelism: every matrix is sharded by columns or rows over the `tensor` axis (Megatron-LM, Shoeybi et al. 2019).

q, k, v, gate and up are sharded by columns (output features: heads, hidden units), o and down by rows, so a block needs one all-reduce after
attention and one after the feed-forward network. Embedding and head are sharded along the vocabulary. With sequence parallelism (Korthikanti et
al. 2022) the activations in between are sharded along time: a reduce-scatter and an all-gather of the same volume replace the all-reduce, and
norms, residuals and their memory are sharded too.

The model's Plan gives the style of each module. Parameters without sharding become replicated DTensors, so that all are on one mesh.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, RowwiseParallel, SequenceParallel, parallelize_module

from meshformer.compat.torch_distributed import ColumnStyle, RowStyle, Style
from meshformer.config.errors import ConfigError
from meshformer.model import LoraLinear, head_loss
from meshformer.model.layout import STYLES, plan_of, retie, ties, uncovered

from .stages import Placeholder, held_blocks


class Replicated(Style):
    """The module computes the same on every rank: plain tensors in and out, parameters as replicated DTensors."""

    def apply(self, module: Any, mesh: DeviceMesh) -> nn.Module:
        def inward(_: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
            return tuple(
                DTensor.from_local(x, mesh, (Replicate(),), run_check=False) if isinstance(x, Tensor) and not isinstance(x, DTensor) else x
                for x in inputs
            )

        def outward(_: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
            return output.to_local() if isinstance(output, DTensor) else output

        return distribute_module(module, mesh, None, inward, outward)  # pyright: ignore[reportArgumentType]


class SequenceLinear(Style):
    """A linear layer with replicated weights, applied to each rank's tokens: plain tensors in and out, weight gradients are partial sums.

    It replaces `forward`, because the view inside nn.Linear fails for DTensors sharded along time (torch 2.11).
    """

    def apply(self, module: Any, mesh: DeviceMesh) -> nn.Module:
        def forward(x: Tensor) -> Tensor:
            weight, bias = (None if p is None else p.to_local(grad_placements=(Partial(),)) for p in (module.weight, module.bias))
            return nn.functional.linear(x, weight, bias)  # pyright: ignore[reportArgumentType]

        distribute_module(module, mesh)
        module.forward = forward
        return module


class Columns(ColumnStyle):
    """Column-parallel. A LoRA adapter's B is sharded by output features like the weight, and A is replicated, so no communication is added."""

    def partition(self, module: Any, mesh: DeviceMesh) -> None:
        adapter = _detach_adapter(module)
        super().partition(module, mesh)
        _attach_adapter(module, adapter, mesh, lora_A=Replicate(), lora_B=Shard(0))


class Rows(RowStyle):
    """Row-parallel. A LoRA adapter's A is sharded by input features like the weight, and B is replicated and applied to the sum of A's outputs."""

    def partition(self, module: Any, mesh: DeviceMesh) -> None:
        adapter = _detach_adapter(module)
        super().partition(module, mesh)
        _attach_adapter(module, adapter, mesh, lora_A=Shard(1), lora_B=Replicate())


class VocabularyColumns(ColumnStyle):
    """The head, sharded along the vocabulary. `loss` computes the summed cross-entropy from each rank's logits without gathering them."""

    def partition(self, module: Any, mesh: DeviceMesh) -> None:
        super().partition(module, mesh)
        rank, size = mesh.get_local_rank(), mesh.size()
        widest = -(-module.out_features // size)
        start = min(widest * rank, module.out_features)

        def loss(x_BTC: DTensor, targets_BT: Tensor) -> Tensor:
            weight, bias = module.weight.to_local(), None if module.bias is None else module.bias.to_local()
            x_BTC = x_BTC.to_local(grad_placements=(Partial(),))  # pyright: ignore[reportAssignmentType]
            return head_loss(x_BTC, weight, bias, targets_BT, combine=all_reduce_over(mesh.get_group()), start=start, widest=widest)

        module.loss = loss


def all_reduce_over(group: Any) -> Callable[[Tensor, str], None]:
    """An in-place all-reduce (`max` or `sum`) over `group`, for `head_loss`."""
    operations = {"max": dist.ReduceOp.MAX, "sum": dist.ReduceOp.SUM}

    def combine(x: Tensor, how: str) -> None:
        dist.all_reduce(x, operations[how], group)

    return combine


def _detach_adapter(module: nn.Module) -> dict[str, nn.Parameter]:
    """Removes a layer's LoRA parameters and returns them: torch's style would shard every parameter of the module in the same way."""
    if not isinstance(module, LoraLinear):
        return {}
    adapter = {name: getattr(module, name) for name in ("lora_A", "lora_B")}
    for name in adapter:
        delattr(module, name)
    return adapter


def _attach_adapter(module: nn.Module, adapter: dict[str, nn.Parameter], mesh: DeviceMesh, **placements: Any) -> None:
    for name, p in adapter.items():
        cut = distribute_tensor(p, mesh, [placements[name]], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(cut, requires_grad=p.requires_grad))


class Gathered(Style):
    """All-gathers a module's first argument once for all layers inside, for example q, k and v; in the backward pass their gradients are
    reduced together too."""

    def __init__(self, given: Any):
        self.given = given

    def apply(self, module: Any, mesh: DeviceMesh) -> nn.Module:
        def whole(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            x = inputs[0] if inputs else next(iter(named.values()))
            x = x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, (self.given,), run_check=False)
            x = x.redistribute(placements=(Replicate(),))
            return ((x, *inputs[1:]), named) if inputs else (inputs, {**named, next(iter(named)): x})

        module.register_forward_pre_hook(whole, with_kwargs=True)
        return module


class ReplicatedParameters(Style):
    """For the parameters of a module that also has submodules: replicated DTensors, and plain tensors while its forward runs."""

    def apply(self, module: Any, mesh: DeviceMesh) -> nn.Module:
        own: dict[str, Any] = {}
        for name, p in module.named_parameters(recurse=False):
            whole = distribute_tensor(p, mesh, [Replicate()], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(whole, requires_grad=p.requires_grad))

        def enter(_: nn.Module, inputs: Any) -> None:
            own.update(module.named_parameters(recurse=False))
            for name, p in own.items():
                delattr(module, name)
                vars(module)[name] = p.to_local(grad_placements=(Replicate(),))  # `setattr` takes it for a parameter and refuses it

        def leave(_: nn.Module, inputs: Any, output: Any) -> None:
            for name, p in own.items():  # all of them, so their order stays
                del vars(module)[name]
                module.register_parameter(name, p)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, always_call=True)
        return module


def check_tensor_plan(model: nn.Module, degree: int, sequence_parallel: bool) -> None:
    """ConfigError if the plan does not cover every parameter, or a sharded size does not divide by `degree`."""
    plan = plan_of(model)
    assert plan is not None, "MeshStrategy._check_plan requires a plan"
    if bare := uncovered(model, plan):
        names = ", ".join(bare[:3]) + (f" and {len(bare) - 3} more" if len(bare) > 3 else "")
        fix = f"Add a pattern for the module to `tensor` of its Plan: {', '.join(STYLES)}."
        raise ConfigError(f"the model's plan does not say how to cut {names}", "strategy.tensor", degree, fix=fix)
    for name in plan.divides:
        if getattr(model, name) % degree:
            message = f"the model's {name}={getattr(model, name)} does not divide by it"
            raise ConfigError(message, "strategy.tensor", degree, fix="Use another degree, or another model.")
    for name, module in model.named_modules():
        style = plan.style(name)
        size = {"columns": "out_features", "rows": "in_features"}.get(style or "")
        if size and hasattr(module, size) and getattr(module, size) % degree:
            message = f"{name} has {getattr(module, size)} {size.replace('_', ' ')}, which do not divide by it"
            raise ConfigError(message, "strategy.tensor", degree, fix="Use another degree, or another model.")
    if sequence_parallel and "sequence" not in plan.tensor.values():
        message = "cuts activations along time, and the model's plan has no module that acts on each token by itself (`sequence`)"
        raise ConfigError(message, "strategy.sequence_parallel", "true", fix="Use strategy.sequence_parallel=false.")


def apply_tensor_parallel(model: Any, mesh: DeviceMesh, sequence_parallel: bool, loss_parallel: bool) -> None:
    """Shards a model, or the pipeline stage of one, in place according to its plan. `mesh` is the one-dimensional tensor axis."""
    plan, tied = plan_of(model), ties(model)
    assert plan is not None
    between = Shard(1) if sequence_parallel else Replicate()  # placement of the activations (B, T, C) between the collectives
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    starts_here = not plan.embed or not isinstance(model.get_submodule(plan.embed[0]), Placeholder)
    for name, module in reversed(list(model.named_modules())):  # submodules before their parents
        if next(module.parameters(recurse=False), None) is not None:
            style = _style(plan.style(name), module, between, sequence_parallel, loss_parallel)
            parallelize_module(module, mesh, style, src_data_rank=None)
        if any(fnmatchcase(name, pattern) for pattern in plan.gather):
            parallelize_module(module, mesh, Gathered(between), src_data_rank=None)
    retie(model, tied)  # parallelize_module gave each tied name a new parameter
    for name in frozen:  # torch 2.13's SequenceParallel creates new parameters with requires_grad=True
        model.get_parameter(name).requires_grad_(False)
    for name in plan.per_head:
        model.get_submodule(name).share_heads(mesh.get_local_rank(), mesh.size())
    gathers = not starts_here and sequence_parallel and plan.whole_sequences
    if gathers:
        model.get_submodule(plan.embed[0]).register_forward_hook(lambda _, inputs, hidden: _gathered(hidden, mesh))
    if (starts_here or gathers) and (blocks := held_blocks(model)):
        # The embedding's output is all-reduced whole, so with sequence parallelism the first block's input is where the sequence is split among
        # the ranks. Without it, clone() turns the AsyncCollectiveTensor that the all-reduce returns into a plain tensor, since torch.compile
        # would compile the first block separately from the others.
        def prepare_input(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            if not sequence_parallel:
                return inputs[0].clone(), *inputs[1:]
            whole = DTensor.from_local(inputs[0], mesh, (Replicate(),), run_check=False)
            return whole.redistribute(placements=(Shard(1),)).to_local(), *inputs[1:]

        blocks[0].register_forward_pre_hook(prepare_input)


def _gathered(hidden_BTC: Tensor, mesh: DeviceMesh) -> Tensor:
    """Whole sequences from each rank's part of the time dimension."""
    cut = DTensor.from_local(hidden_BTC, mesh, (Shard(1),), run_check=False)
    return cut.redistribute(placements=(Replicate(),)).to_local()


def _style(style: str | None, module: nn.Module, between: Any, sequence_parallel: bool, loss_parallel: bool) -> ParallelStyle:
    if style == "columns":
        return Columns(input_layouts=between)
    if style == "rows":
        return Rows(output_layouts=between)
    if style == "vocabulary" and isinstance(module, nn.Embedding):
        return RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
    if style == "vocabulary":
        out = Shard(-1) if loss_parallel else Replicate()
        return VocabularyColumns(input_layouts=between, output_layouts=out, use_local_output=not loss_parallel)
    if style == "heads":  # (B, T, H, D): each rank has its own heads, and all share one gain
        return SequenceParallel(sequence_dim=2, use_local_output=True)
    if style == "sequence" and sequence_parallel:
        return SequenceLinear() if isinstance(module, nn.Linear) else SequenceParallel(use_local_output=True)
    return ReplicatedParameters() if any(True for _ in module.children()) else Replicated()
