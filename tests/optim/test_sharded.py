"""Sharded parameters and the same gradients: the same update as on one process (CONTRACTS 12)."""

from functools import cache
from importlib import import_module
from typing import Any

import pytest
import torch
import torch._dynamo  # fully_shard imports it: once here, instead of on every rank
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from harness import run_ranks
from meshformer.optim import adamw, muon, sgd
from meshformer.optim.gather_compute_scatter import _plan
from meshformer.optim.shardwise import ShardwiseSGD

torch.set_num_threads(1)
STEPS = 3
LAYOUTS = {  # mesh axes and their degrees
    "shard 2": {"shard": 2},
    "shard 4": {"shard": 4},
    "replicate 2": {"replicate": 2},
    "shard 2 x tensor 2": {"shard": 2, "tensor": 2},
    "replicate 2 x shard 2 x tensor 2": {"replicate": 2, "shard": 2, "tensor": 2},
}
MAKE = {
    "adamw": lambda p: adamw(p, lr=1e-2),
    "sgd": lambda p: sgd(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "muon": lambda p: muon(p, lr=0.02, weight_decay=0.1, dtype="float32", fused=False),
}


class Block(nn.Module):
    """Matrices of several shapes that divide evenly (q), unevenly (up, down), and leave some of four ranks with nothing (few)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 13), nn.Linear(13, 8)
        self.few = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.few(self.norm(self.down(self.up(self.q(x)))))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.embedding = nn.Embedding(7, 8)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(draw(p.shape, i))


def draw(shape, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cut(model: Blocks, axes: dict[str, int]) -> None:
    mesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
    if "tensor" in axes:
        plan = {"q": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel(), "few": ColwiseParallel()}
        for block in model.blocks:
            parallelize_module(block, mesh["tensor"], plan, src_data_rank=None)
            distribute_module(block.norm, mesh["tensor"])
        distribute_module(model.embedding, mesh["tensor"])
    data = tuple(axis for axis in axes if axis != "tensor")
    if data == ("replicate",):
        distribute_module(model, mesh)
        return
    for block in model.blocks:
        fully_shard(block, mesh=mesh[data])
    fully_shard(model, mesh=mesh[data])


def give_gradients(model: Blocks, step: int) -> None:
    """The same in every layout; some arrive uncut, as gradients of the tensor axis may."""
    for i, p in enumerate(model.parameters()):
        full = draw(p.shape, 1000 * step + i) * step
        if isinstance(p, DTensor):
            placements = p.placements if i % 4 else [Replicate()] * p.device_mesh.ndim
            p.grad = distribute_tensor(full, p.device_mesh, placements, src_data_rank=None)
        else:
            p.grad = full


def distance_to_one_process(axes: dict[str, int], make: str) -> tuple[float, str]:
    """(largest difference of a parameter after some steps; placements seen). In between, a new optimizer loads the old one's state."""
    whole, sharded = Blocks(), Blocks()
    cut(sharded, axes)
    for model in (whole, sharded):
        optimizer = MAKE[make](model.named_parameters())
        for step in range(1, STEPS + 1):
            give_gradients(model, step)
            optimizer.step()
            if step == 2:
                saved = optimizer.state_dict()
                optimizer = MAKE[make](model.named_parameters())
                optimizer.load_state_dict(saved)
        for p in model.parameters():
            states = [x for key, x in optimizer.state[p].items() if key != "step"]
            assert states and all(type(x) is (DTensor if isinstance(p, DTensor) else Tensor) and x.shape == p.shape for x in states)
    differences = [(p.detach().full_tensor() - q).abs().max().item() for p, q in zip(sharded.parameters(), whole.parameters(), strict=True)]
    return max(differences), str({p.placements for p in sharded.parameters()})


def on_a_rank(axes: dict[str, int]) -> dict[str, Any]:
    dist.init_process_group("gloo")
    found: dict[str, Any] = {make: distance_to_one_process(axes, make) for make in MAKE}
    model = Blocks()
    cut(model, axes)
    matrices = [p for name, p in model.named_parameters() if isinstance(p, DTensor) and p.ndim == 2 and name.startswith("blocks")]
    plan = _plan(matrices[0].device_mesh, tuple((tuple(m.shape), m.placements) for m in matrices))
    found["assigned"] = plan.assigned
    wholes = [torch.arange(m.numel()).view(m.shape) for m in matrices]
    cuts = [distribute_tensor(x, m.device_mesh, m.placements, src_data_rank=None) for x, m in zip(wholes, matrices, strict=True)]
    found["regions"] = [torch.equal(x[plan.regions[k][plan.me]], cuts[k].to_local()) for k, x in enumerate(wholes)]
    # Negative control: each rank orthogonalises what it happens to hold, as torch.optim.Muon would.
    import_module("meshformer.optim.muon").gather_compute_scatter = lambda function, held, matrices: [
        x for k, piece in enumerate(held) for x in (function([piece]) if piece.numel() else [held[k]])
    ]
    return {**found, "muon on pieces": distance_to_one_process(axes, "muon")}


@cache
def on_ranks(layout: str) -> list[dict[str, Any]]:
    return run_ranks(torch.Size(LAYOUTS[layout].values()).numel(), on_a_rank, LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_update_is_that_of_one_process(layout):
    for found in on_ranks(layout):
        assert max(found[make][0] for make in MAKE) < 1e-6, found
        if "shard" in layout and "tensor" in layout:
            assert "_StridedShard" in found["muon"][1], "FSDP over the tensor axis cuts in strides"


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if "shard" in layout])
def test_negative_control_muon_on_pieces_is_seen(layout):
    assert min(found["muon on pieces"][0] for found in on_ranks(layout)) > 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_knows_its_rows_and_columns(layout):
    """Updates alone would not tell: Muon moves the rows of a matrix whose rows are exchanged just as it moves those of the matrix."""
    assert all(all(found["regions"]) for found in on_ranks(layout))


def test_matrices_are_spread_over_all_ranks_copies_included():
    assigned, *others = [found["assigned"] for found in on_ranks("replicate 2 x shard 2 x tensor 2")]
    assert all(other == assigned for other in others)
    assert sorted(k for ks in assigned for k in ks) == list(range(8)) and {len(ks) for ks in assigned} == {1}


def after_a_backward_pass() -> list[bool]:
    """With gradients as FSDP itself leaves them, three rows on four ranks: (no row here, yet a gradient, and all rows moved)."""
    dist.init_process_group("gloo")
    model = Blocks()
    cut(model, LAYOUTS["shard 4"])
    few = model.blocks[0].few.weight
    optimizer = muon(model.named_parameters(), dtype="float32")
    before = few.detach().full_tensor()
    model.blocks[0](torch.ones(2, 8) * (1 + dist.get_rank())).square().sum().backward()
    optimizer.step()
    moved = (few.detach().full_tensor() - before).abs().amin()
    return [few.to_local().numel() == 0, few.grad is not None, moved.item() > 0]


def test_a_rank_with_nothing_of_a_matrix_takes_part():
    assert run_ranks(4, after_a_backward_pass) == [[False, True, True]] * 3 + [[True, True, True]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sgd_in_any_type_is_the_formula(dtype: torch.dtype) -> None:
    """torch 2.13's fused kernel is not, for 16-bit numbers on a CPU."""
    weight, gradient = torch.randn(1000).to(dtype), torch.randn(1000).to(dtype)
    p = torch.nn.Parameter(weight.clone())
    p.grad = gradient.clone()
    ShardwiseSGD([{"params": [p]}], lr=0.1, momentum=0.0, weight_decay=0.0, nesterov=False).step()
    torch.testing.assert_close(
        p.detach().float(), weight.float() - 0.1 * gradient.float(), atol=0.02 if dtype != torch.float32 else 1e-6, rtol=0
    )
