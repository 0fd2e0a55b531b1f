"""Tensor parallel: every matrix of a Transformer cut by columns or rows over the `tensor` axis (Shoeybi et al. 2019, Megatron-LM).

q, k, v, gate and up are cut by columns (output features: heads, hidden units), o and down by rows, so that a block needs one exchange after
attention and one after the feed-forward network. Embedding and head are cut along the vocabulary. With sequence parallel (Korthikanti et al.
2022) activations between those exchanges are cut along time: the all-reduce becomes a reduce-scatter and an all-gather of the same
volume, and norms, residuals and their memory are shared out.

The plan keys on module names. Parameters that are not cut become DTensors too, replicated, so that all live on one mesh.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from meshformer.model import HeadTransform, LoraLinear, head_loss


class Replicated(ParallelStyle):
    """The module computes the same on every rank: plain tensors in and out, parameters as replicated DTensors."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def inward(_: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
            return tuple(
                DTensor.from_local(x, mesh, (Replicate(),), run_check=False) if isinstance(x, Tensor) and not isinstance(x, DTensor) else x
                for x in inputs
            )

        def outward(_: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
            return output.to_local() if isinstance(output, DTensor) else output

        return distribute_module(module, device_mesh, None, inward, outward)  # pyright: ignore[reportArgumentType]


class OnPieces(ParallelStyle):
    """A linear layer on each rank's part of the sequence, by the whole weight: plain tensors in and out, gradients are sums over that part.

    Written out, since a DTensor of torch 2.11 that is cut along time refuses the layer's view.
    """

    def _apply(self, module: Any, device_mesh: DeviceMesh) -> nn.Module:
        def forward(x: Tensor) -> Tensor:
            weight, bias = (None if p is None else p.to_local(grad_placements=(Partial(),)) for p in (module.weight, module.bias))
            return nn.functional.linear(x, weight, bias)  # pyright: ignore[reportArgumentType]

        distribute_module(module, device_mesh)
        module.forward = forward
        return module


class Columns(ColwiseParallel):
    """Of an adapter B is cut like the weight, by output features, and A is whole: the forward pass exchanges nothing."""

    def _partition_linear_fn(self, name: str, module: Any, device_mesh: DeviceMesh) -> None:
        adapter = _taken(module)
        super()._partition_linear_fn(name, module, device_mesh)
        _put(module, adapter, device_mesh, lora_A=Replicate(), lora_B=Shard(0))


class Rows(RowwiseParallel):
    """Of an adapter A is cut like the weight, by input features, and B is whole: B of the sum of A's partial products."""

    def _partition_linear_fn(self, name: str, module: Any, device_mesh: DeviceMesh) -> None:
        adapter = _taken(module)
        super()._partition_linear_fn(name, module, device_mesh)
        _put(module, adapter, device_mesh, lora_A=Shard(1), lora_B=Replicate())


class VocabularyColumns(ColwiseParallel):
    """The head, cut along the vocabulary. Its logits are laid out as asked; where it sums the loss itself, each rank does so over its entries."""

    def _apply(self, module: Any, device_mesh: DeviceMesh) -> nn.Module:
        rank, size = device_mesh.get_local_rank(), device_mesh.size()
        widest = -(-module.out_features // size)
        start = min(widest * rank, module.out_features)

        def loss(x_BTC: DTensor, targets_BT: Tensor) -> Tensor:
            weight, bias = module.weight.to_local(), None if module.bias is None else module.bias.to_local()
            x_BTC = x_BTC.to_local(grad_placements=(Partial(),))  # pyright: ignore[reportAssignmentType]
            return head_loss(x_BTC, weight, bias, targets_BT, combine=over(device_mesh.get_group()), start=start, widest=widest)

        module.loss = loss
        return super()._apply(module, device_mesh)

    @staticmethod
    def _prepare_output_fn(output_layouts: Any, use_local_output: bool, mod: nn.Module, outputs: Any, device_mesh: DeviceMesh) -> Any:
        if not isinstance(outputs, DTensor):  # a loss
            return outputs
        return ColwiseParallel._prepare_output_fn(output_layouts, use_local_output, mod, outputs, device_mesh)


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
    return {name: module._parameters.pop(name) for name in ("lora_A", "lora_B")}  # pyright: ignore[reportReturnType]


def _put(module: nn.Module, adapter: dict[str, nn.Parameter], mesh: DeviceMesh, **placements: Any) -> None:
    for name, p in adapter.items():
        cut = distribute_tensor(p, mesh, [placements[name]], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(cut, requires_grad=p.requires_grad))


def apply_tensor_parallel(model: Any, mesh: DeviceMesh, sequence_parallel: bool, loss_parallel: bool) -> None:
    """Cuts a Transformer, or the part of one that this rank holds, in place. `mesh` is the one-dimensional tensor axis."""
    between = Shard(1) if sequence_parallel else Replicate()  # activations (B, T, C) between the exchanges
    norm = SequenceParallel(use_local_output=True) if sequence_parallel else Replicated()
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    whole: dict[str, ParallelStyle] = {}
    if model.embedding is not None:
        # Positions are added to whole sequences, so the cut along time comes after them.
        whole["embedding.tokens"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
        if sequence_parallel:
            whole["embedding"] = PrepareModuleOutput(output_layouts=Replicate(), desired_output_layouts=Shard(1))
        else:  # the first block gets what the others do, not a tensor still under way, for which it would be compiled apart
            model.embedding.register_forward_hook(lambda module, inputs, x_BTC: x_BTC.clone())
    if model.norm is not None:
        if isinstance(model.norm, HeadTransform):
            whole |= {"norm.dense": OnPieces() if sequence_parallel else norm, "norm.norm": norm}
        else:
            whole["norm"] = norm
    if model.head is not None:
        out = Shard(-1) if loss_parallel else Replicate()
        whole["head"] = VocabularyColumns(input_layouts=between, output_layouts=out, use_local_output=not loss_parallel)
    for block in model.blocks:
        parallelize_module(block, mesh, _block_plan(block, between, norm), src_data_rank=None)
    parallelize_module(model, mesh, whole, src_data_rank=None)
    if model.embedding is not None and model.head is not None:
        model.tie_weights()  # each of the two was replaced by a parameter of its own
    for module in model.modules():
        if any(not isinstance(p, DTensor) for p in module.parameters(recurse=False)):
            parallelize_module(module, mesh, Replicated(), src_data_rank=None)
    for name in frozen:  # torch 2.13's SequenceParallel makes parameters anew, with gradients
        model.get_parameter(name).requires_grad_(False)
    share_heads(model.position, mesh.get_local_rank(), mesh.size())


def _block_plan(block: Any, between: Any, norm: ParallelStyle) -> dict[str, ParallelStyle]:
    columns, rows = Columns, lambda: Rows(output_layouts=between)
    # One gather (or one all-reduce of the gradient) for q, k and v together: they are handed the same DTensor.
    plan: dict[str, Any] = {
        "attention_norm": norm,
        "attention": PrepareModuleInput(input_layouts=(between, *[None] * 5), desired_input_layouts=(Replicate(), *[None] * 5)),
        "attention.q": columns(),
        "attention.k": columns(),
        "attention.v": columns(),
        "attention.o": rows(),
        "mlp_norm": norm,
        "mlp": PrepareModuleInput(input_layouts=(between,), desired_input_layouts=(Replicate(),)),
        "mlp.gate": columns(),
        "mlp.up": columns(),
        "mlp.down": rows(),
    }
    for name in ("q_norm", "k_norm"):  # (B, T, H, D): each rank norms its own heads with the one shared gain
        plan[f"attention.{name}"] = SequenceParallel(sequence_dim=2, use_local_output=True)
    return {name: style for name, style in plan.items() if _has(block, name)}


def _has(module: nn.Module, name: str) -> bool:
    for part in name.split("."):
        module = getattr(module, part, None)  # pyright: ignore[reportAssignmentType]
    return module is not None


def share_heads(position: Any, rank: int, size: int) -> None:
    """A bias of the scores, or the slopes that give it (ALiBi), is computed for all heads; a rank adds the part of its own. In place."""
    name, heads = ("bias", 1) if position.has_own_bias else ("slopes", 0)
    whole = getattr(position, name)

    def of_own_heads(*args: Any) -> Tensor | None:
        of_all = whole(*args)
        return None if of_all is None else of_all.chunk(size, dim=heads)[rank]

    setattr(position, name, of_own_heads)
