"""A function of full matrices, applied to sharded ones: each matrix is gathered on one rank, which computes and scatters the result.

With DTensor.full_tensor all n ranks would receive and compute every matrix, with one or two collectives per matrix. Here each rank computes
1/n of the matrices and receives 1/n of the data, and each pair of ranks exchanges one message in either direction.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

Region = tuple[slice, slice]


class _Plan(NamedTuple):
    """Which rank computes which matrix, for matrices sharded over one mesh. Ranks are numbered by their position in the mesh."""

    ranks: tuple[int, ...]  # position in the mesh -> global rank
    me: int
    assigned: list[list[int]]  # [rank] -> the matrices that it computes
    senders: list[list[int]]  # [matrix] -> the ranks that send their shards to the computing rank: those of its own replica
    regions: list[list[Region]]  # [matrix][rank] -> rows and columns of the shard


def gather_compute_scatter(function: Callable[[list[Tensor]], list[Tensor]], shards: Sequence[Tensor], matrices: Sequence[DTensor]) -> list[Tensor]:
    """This rank's shards of `function(full matrices)`, which returns a matrix of the same shape and dtype for each.

    `shards`: this rank's shards of the function's inputs, all of one dtype. They are sharded like the 2-D parameters `matrices`, which must all
    be on one mesh. A collective over the mesh: every rank must pass the same matrices in the same order.
    """
    plan = _plan(matrices[0].device_mesh, tuple((tuple(m.shape), m.placements) for m in matrices))
    like, everyone, me, mine = shards[0], range(len(plan.ranks)), plan.me, plan.assigned[plan.me]

    sent = [[shards[k] for k in assigned if me in plan.senders[k]] for assigned in plan.assigned]
    expected = [[k for k in mine if rank in plan.senders[k]] for rank in everyone]
    received = _exchange(plan, sent, [[_shape(plan.regions[k][rank]) for k in expected[rank]] for rank in everyone], like)
    whole = {k: like.new_empty(matrices[k].shape) for k in mine}
    for rank in everyone:
        for k, shard in zip(expected[rank], received[rank], strict=True):
            whole[k][plan.regions[k][rank]] = shard

    results = dict(zip(mine, function(list(whole.values())) if mine else [], strict=True))
    sent = [[results[k][plan.regions[k][rank]] for k in mine] for rank in everyone]
    received = _exchange(plan, sent, [[_shape(plan.regions[k][me]) for k in assigned] for assigned in plan.assigned], like)
    found = {k: shard for ks, some in zip(plan.assigned, received, strict=True) for k, shard in zip(ks, some, strict=True)}
    return [found[k] for k in range(len(matrices))]


def _exchange(plan: _Plan, outgoing: list[list[Tensor]], incoming: list[list[tuple[int, int]]], like: Tensor) -> list[list[Tensor]]:
    """Sends the tensors `outgoing[rank]` to each rank and receives tensors of the shapes `incoming[rank]` from it, as one message each."""
    sent = [torch.cat([x.flatten() for x in tensors]) if tensors else like.new_empty(0) for tensors in outgoing]
    got = [like.new_empty(sum(map(math.prod, shapes))) for shapes in incoming]
    got[plan.me] = sent[plan.me]
    # Global ranks, because two ranks may differ in several mesh axes: no further process group is needed.
    messages = [
        dist.P2POp(operation, buffers[i], rank)
        for operation, buffers in ((dist.isend, sent), (dist.irecv, got))
        for i, rank in enumerate(plan.ranks)
        if i != plan.me and buffers[i].numel()
    ]
    for work in dist.batch_isend_irecv(messages) if messages else []:
        work.wait()
    return [
        [part.view(shape) for part, shape in zip(buffer.split([math.prod(s) for s in shapes]), shapes, strict=True)] if shapes else []
        for buffer, shapes in zip(got, incoming, strict=True)
    ]


@cache
def mesh_ranks(mesh: DeviceMesh) -> tuple[int, ...]:
    """The global ranks of a mesh in order. Cached: a plan on fake tensors, under which these cannot be read, asks before it makes any."""
    return tuple(mesh.mesh.flatten().tolist())


@lru_cache(maxsize=64)
def _plan(mesh: DeviceMesh, matrices: tuple[tuple[tuple[int, int], tuple[Placement, ...]], ...]) -> _Plan:
    ranks = mesh_ranks(mesh)
    coordinates = list(itertools.product(*(range(size) for size in mesh.shape)))
    assigned: list[list[int]] = [[] for _ in ranks]
    # Round-robin over the matrices sorted by shape: of each shape, ranks get equally many, up to one.
    for turn, k in enumerate(sorted(range(len(matrices)), key=lambda k: matrices[k][0])):
        assigned[turn % len(ranks)].append(k)
    senders: list[list[int]] = [[] for _ in matrices]
    for own, ks in zip(coordinates, assigned, strict=True):
        for k in ks:
            replicated = [axis for axis, placement in enumerate(matrices[k][1]) if placement.is_replicate()]
            senders[k] = [i for i, other in enumerate(coordinates) if all(other[axis] == own[axis] for axis in replicated)]
    regions = [[_region(shape, placements, tuple(mesh.shape), c) for c in coordinates] for shape, placements in matrices]
    return _Plan(ranks, ranks.index(dist.get_rank()), assigned, senders, regions)


def _region(shape: tuple[int, int], placements: tuple[Placement, ...], sizes: tuple[int, ...], coordinate: tuple[int, ...]) -> Region:
    """Rows and columns of the shard at a mesh coordinate: torch.chunk along one axis after the other, FSDP's last.

    FSDP shards what tensor parallelism has already sharded although its mesh axis is the outer one; torch calls that placement `_StridedShard`.
    """
    start, stop = [0, 0], list(shape)
    sharded = [axis for axis, placement in enumerate(placements) if not placement.is_replicate()]
    for axis in sorted(sharded, key=lambda axis: hasattr(placements[axis], "split_factor")):
        dim = placements[axis].dim % 2  # pyright: ignore[reportAttributeAccessIssue]
        length = math.ceil((stop[dim] - start[dim]) / sizes[axis])
        start[dim] = min(start[dim] + coordinate[axis] * length, stop[dim])
        stop[dim] = min(start[dim] + length, stop[dim])
    return slice(start[0], stop[0]), slice(start[1], stop[1])


def _shape(region: Region) -> tuple[int, int]:
    return region[0].stop - region[0].start, region[1].stop - region[1].start
