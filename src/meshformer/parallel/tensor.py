"""Tensor parallel: every matrix of a model cut by columns or rows over the `tensor` axis (Shoeybi et al. 2019, Megatron-LM).

q, k, v, gate and up are cut by columns (output features: heads, hidden units), o and down by rows, so that a block needs one exchange after
attention and one after the feed-forward network. Embedding and head are cut along the vocabulary. With sequence parallel (Korthikanti et al.
2022) activations between those exchanges are cut along time: the all-reduce becomes a reduce-scatter and an all-gather of the same
volume, and norms, residuals and their memory are shared out.

Which module is cut how is said by the model's Plan. Parameters that are not cut become DTensors too, replicated, so that all live on one mesh.
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

from meshformer.compat.torch import exchange_parameters
from meshformer.compat.torch_distributed import ColumnStyle, RowStyle, Style
from meshformer.config.errors import ConfigError
from meshformer.model import LoraLinear, head_loss
from meshformer.model.layout import STYLES, plan_of, retie, ties, uncovered

from .stages import StandIn, held_blocks


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


class OnPieces(Style):
    """A linear layer on each rank's part of the sequence, by the whole weight: plain tensors in and out, gradients are sums over that part.

    Written out, since a DTensor of torch 2.11 that is cut along time refuses the layer's view.
    """

    def apply(self, module: Any, mesh: DeviceMesh) -> nn.Module:
        def forward(x: Tensor) -> Tensor:
            weight, bias = (None if p is None else p.to_local(grad_placements=(Partial(),)) for p in (module.weight, module.bias))
            return nn.functional.linear(x, weight, bias)  # pyright: ignore[reportArgumentType]

        distribute_module(module, mesh)
        module.forward = forward
        return module


class Columns(ColumnStyle):
    """Of an adapter B is cut like the weight, by output features, and A is whole: the forward pass exchanges nothing."""

    def cut(self, module: Any, mesh: DeviceMesh) -> None:
        adapter = _taken(module)
        super().cut(module, mesh)
        _put(module, adapter, mesh, lora_A=Replicate(), lora_B=Shard(0))


class Rows(RowStyle):
    """Of an adapter A is cut like the weight, by input features, and B is whole: B of the sum of A's partial products."""

    def cut(self, module: Any, mesh: DeviceMesh) -> None:
        adapter = _taken(module)
        super().cut(module, mesh)
        _put(module, adapter, mesh, lora_A=Shard(1), lora_B=Replicate())


class VocabularyColumns(ColumnStyle):
    """The head, cut along the vocabulary. Its logits are laid out as asked; where it sums the loss itself, each rank does so over its entries."""

    def cut(self, module: Any, mesh: DeviceMesh) -> None:
        super().cut(module, mesh)
        rank, size = mesh.get_local_rank(), mesh.size()
        widest = -(-module.out_features // size)
        start = min(widest * rank, module.out_features)

        def loss(x_BTC: DTensor, targets_BT: Tensor) -> Tensor:
            weight, bias = module.weight.to_local(), None if module.bias is None else module.bias.to_local()
            x_BTC = x_BTC.to_local(grad_placements=(Partial(),))  # pyright: ignore[reportAssignmentType]
            return head_loss(x_BTC, weight, bias, targets_BT, combine=over(mesh.get_group()), start=start, widest=widest)

        module.loss = loss


def over(group: Any) -> Callable[[Tensor, str], None]:
    """Takes the largest, or the sum, of numbers over the ranks of `group`, in place."""
    operations = {"max": dist.ReduceOp.MAX, "sum": dist.ReduceOp.SUM}

    def combine(x: Tensor, how: str) -> None:
        dist.all_reduce(x, operations[how], group)

    return combine


def _taken(module: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter of a layer, taken out of it: torch's own styles cut every parameter that they find by columns."""
    if not isinstance(module, LoraLinear):
        return {}
    adapter = {name: getattr(module, name) for name in ("lora_A", "lora_B")}
    for name in adapter:
        delattr(module, name)
    return adapter


def _put(module: nn.Module, adapter: dict[str, nn.Parameter], mesh: DeviceMesh, **placements: Any) -> None:
    for name, p in adapter.items():
        cut = distribute_tensor(p, mesh, [placements[name]], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(cut, requires_grad=p.requires_grad))


class Gathered(Style):
    """Hands a module its first argument whole, one DTensor for all the layers inside that read it: one gather (or, of gradients, one
    all-reduce) for q, k and v together."""

    def __init__(self, given: Any):
        self.given = given

    def apply(self, module: Any, mesh: DeviceMesh) -> nn.Module:
        def whole(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            x = inputs[0]
            x = x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, (self.given,), run_check=False)
            return x.redistribute(placements=(Replicate(),)), *inputs[1:]

        module.register_forward_pre_hook(whole)
        return module


class OwnParameters(Style):
    """Parameters of a module that has other modules inside: all of them on every rank, and plain tensors while it runs."""

    def apply(self, module: Any, mesh: DeviceMesh) -> nn.Module:
        own: dict[str, Any] = {}
        for name, p in module.named_parameters(recurse=False):
            whole = distribute_tensor(p, mesh, [Replicate()], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(whole, requires_grad=p.requires_grad))

        def enter(_: nn.Module, inputs: Any) -> None:
            plain = {name: p.to_local(grad_placements=(Replicate(),)) for name, p in module.named_parameters(recurse=False)}
            own.update(exchange_parameters(module, plain))

        def leave(_: nn.Module, inputs: Any, output: Any) -> None:
            exchange_parameters(module, own)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, always_call=True)
        return module


def check_tensor_plan(model: nn.Module, degree: int, sequence_parallel: bool) -> None:
    """ConfigError where the model's plan does not say how to cut every parameter into `degree` parts."""
    plan = plan_of(model)
    assert plan is not None, "parallel/check.py asks for a plan"
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
    """Cuts a model, or the part of one that this rank holds, in place, as its plan says. `mesh` is the one-dimensional tensor axis."""
    plan, tied = plan_of(model), ties(model)
    assert plan is not None
    between = Shard(1) if sequence_parallel else Replicate()  # activations (B, T, C) between the exchanges
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    starts_here = not plan.embed or not isinstance(model.get_submodule(plan.embed[0]), StandIn)
    for name, module in reversed(list(model.named_modules())):  # what lies inside first
        if next(module.parameters(recurse=False), None) is not None:
            style = _style(plan.style(name), module, between, sequence_parallel, loss_parallel)
            parallelize_module(module, mesh, style, src_data_rank=None)
        if any(fnmatchcase(name, pattern) for pattern in plan.gather):
            parallelize_module(module, mesh, Gathered(between), src_data_rank=None)
    retie(model, tied)  # each of the two was replaced by a parameter of its own
    for name in frozen:  # torch 2.13's SequenceParallel makes parameters anew, with gradients
        model.get_parameter(name).requires_grad_(False)
    for name in plan.per_head:
        model.get_submodule(name).share_heads(mesh.get_local_rank(), mesh.size())
    if starts_here and (blocks := held_blocks(model)):
        # Embeddings are added up whole, so the cut along time comes after them. Without it the first block is handed what the others are,
        # not a tensor still under way, for which it would be compiled apart.
        def begin(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            if not sequence_parallel:
                return inputs[0].clone(), *inputs[1:]
            whole = DTensor.from_local(inputs[0], mesh, (Replicate(),), run_check=False)
            return whole.redistribute(placements=(Shard(1),)).to_local(), *inputs[1:]

        blocks[0].register_forward_pre_hook(begin)


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
    if style == "heads":  # (B, T, H, D): each rank has its own heads, and their one gain
        return SequenceParallel(sequence_dim=2, use_local_output=True)
    if style == "sequence" and sequence_parallel:
        return OnPieces() if isinstance(module, nn.Linear) else SequenceParallel(use_local_output=True)
    return OwnParameters() if any(True for _ in module.children()) else Replicated()
