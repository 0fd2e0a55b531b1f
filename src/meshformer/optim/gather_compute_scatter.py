"""Work on whole matrices that are cut over a mesh: each is put together on one rank, its owner, which hands out the results in pieces.

Gathering every matrix on every rank (DTensor.full_tensor) would have all n ranks compute and receive everything, in a collective or two for
each matrix. This way it is an n-th of both, in one message between each two ranks and back.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

Region = tuple[slice, slice]


class _Plan(NamedTuple):
    """Who works on what, of matrices that are cut over one mesh. Ranks are counted by their position in the mesh."""

    ranks: list[int]  # global
    me: int
    owned: list[list[int]]  # [rank] -> the matrices that are its work
    senders: list[list[int]]  # [matrix] -> the ranks from which its owner gets it: those of the owner's own copy
    regions: list[list[Region]]  # [matrix][rank] -> what the rank holds


def gather_compute_scatter(function: Callable[[list[Tensor]], list[Tensor]], held: Sequence[Tensor], matrices: Sequence[DTensor]) -> list[Tensor]:
    """This rank's pieces of `function(whole matrices)`, which returns a matrix of the same shape and type for each.

    `held` are this rank's pieces of the matrices to work on, of one type, cut as the 2-D parameters `matrices` are; these lie on one mesh.
    A collective of the mesh: all its ranks must bring the same matrices.
    """
    plan = _plan(matrices[0].device_mesh, tuple((tuple(m.shape), m.placements) for m in matrices))
    like, everyone, me, mine = held[0], range(len(plan.ranks)), plan.me, plan.owned[plan.me]

    sent = [[held[k] for k in owned if me in plan.senders[k]] for owned in plan.owned]
    expected = [[k for k in mine if rank in plan.senders[k]] for rank in everyone]
    got = _swap(plan, sent, [[_shape(plan.regions[k][rank]) for k in expected[rank]] for rank in everyone], like)
    whole = {k: like.new_empty(matrices[k].shape) for k in mine}
    for rank in everyone:
        for k, piece in zip(expected[rank], got[rank], strict=True):
            whole[k][plan.regions[k][rank]] = piece

    results = dict(zip(mine, function(list(whole.values())) if mine else [], strict=True))
    sent = [[results[k][plan.regions[k][rank]] for k in mine] for rank in everyone]
    got = _swap(plan, sent, [[_shape(plan.regions[k][me]) for k in owned] for owned in plan.owned], like)
    found = {k: piece for owned, of_owner in zip(plan.owned, got, strict=True) for k, piece in zip(owned, of_owner, strict=True)}
    return [found[k] for k in range(len(matrices))]


def _swap(plan: _Plan, outgoing: list[list[Tensor]], incoming: list[list[tuple[int, int]]], like: Tensor) -> list[list[Tensor]]:
    """Sends `outgoing[rank]` to each rank and receives tensors of the shapes `incoming[rank]` from it, in one message each."""
    sent = [torch.cat([x.flatten() for x in tensors]) if tensors else like.new_empty(0) for tensors in outgoing]
    got = [like.new_empty(sum(map(math.prod, shapes))) for shapes in incoming]
    got[plan.me] = sent[plan.me]
    # Between two ranks of the world, whatever axes they differ in: no process groups beyond the mesh's own.
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


@lru_cache(maxsize=64)
def _plan(mesh: DeviceMesh, matrices: tuple[tuple[tuple[int, int], tuple[Placement, ...]], ...]) -> _Plan:
    ranks = mesh.mesh.flatten().tolist()
    coordinates = list(itertools.product(*(range(size) for size in mesh.shape)))
    owned: list[list[int]] = [[] for _ in ranks]
    # Round about, shape by shape: every rank gets as many of each shape, to one.
    for turn, k in enumerate(sorted(range(len(matrices)), key=lambda k: matrices[k][0])):
        owned[turn % len(ranks)].append(k)
    senders: list[list[int]] = [[] for _ in matrices]
    for owner, ks in zip(coordinates, owned, strict=True):
        for k in ks:
            copies = [axis for axis, placement in enumerate(matrices[k][1]) if placement.is_replicate()]
            senders[k] = [i for i, other in enumerate(coordinates) if all(other[axis] == owner[axis] for axis in copies)]
    regions = [[_region(shape, placements, tuple(mesh.shape), c) for c in coordinates] for shape, placements in matrices]
    return _Plan(ranks, ranks.index(dist.get_rank()), owned, senders, regions)


def _region(shape: tuple[int, int], placements: tuple[Placement, ...], sizes: tuple[int, ...], coordinate: tuple[int, ...]) -> Region:
    """Rows and columns at a coordinate of the mesh: torch.chunk along one axis after the other, FSDP's last.

    FSDP cuts what the tensor axis has cut before, though its axis is the outer one; torch then calls its placement `_StridedShard`.
    """
    start, stop = [0, 0], list(shape)
    cuts = [axis for axis, placement in enumerate(placements) if not placement.is_replicate()]
    for axis in sorted(cuts, key=lambda axis: hasattr(placements[axis], "split_factor")):
        dim = placements[axis].dim % 2  # pyright: ignore[reportAttributeAccessIssue]
        length = math.ceil((stop[dim] - start[dim]) / sizes[axis])
        start[dim] = min(start[dim] + coordinate[axis] * length, stop[dim])
        stop[dim] = min(start[dim] + length, stop[dim])
    return slice(start[0], stop[0]), slice(start[1], stop[1])


def _shape(region: Region) -> tuple[int, int]:
    return region[0].stop - region[0].start, region[1].stop - region[1].start
