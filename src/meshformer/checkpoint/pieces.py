"""Which rectangle of a tensor this process holds, and planners that write and read torch's distributed checkpoints (DCP) by rectangles.

DCP's own planners compute the rectangle from a DTensor's placements, from left to right. Where FSDP shards a tensor unevenly that tensor
parallelism has sharded before, FSDP holds another rectangle. (7 rows over shard 3 × tensor 2: by its placements rank (2, 0) holds row 3; in
fact it holds none.) DCP would save rows under wrong numbers, without an error. So the rectangles are computed here and passed to DCP.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Piece:
    """`data` is the rectangle that begins at `offsets` in a tensor of size `shape`. It shares memory with the tensor it was taken from."""

    data: Tensor
    offsets: torch.Size
    shape: torch.Size

    @property
    def slices(self) -> tuple[slice, ...]:
        """The piece's place in the whole tensor: `whole[piece.slices]`."""
        return tuple(slice(start, start + size) for start, size in zip(self.offsets, self.data.shape, strict=True))

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(offsets=self.offsets, sizes=self.data.shape)

    def on_host(self) -> Piece:
        """A copy in host memory, independent of later changes to the tensor."""
        return Piece(self.data.to("cpu", copy=True), self.offsets, self.shape)


def piece_of(x: Tensor) -> Piece | None:
    """What this process holds of a plain tensor (all of it) or of a DTensor on any mesh; None where it holds nothing."""
    if not isinstance(x, DTensor):
        return Piece(x.detach(), torch.Size([0] * x.ndim), x.shape)
    rectangle = _rectangle(x)
    data = x.detach().to_local()
    if rectangle is None or (math.prod(data.shape) == 0 < math.prod(x.shape)):
        return None
    offsets, sizes = rectangle
    if data.shape != sizes:
        raise ValueError(f"a piece of shape {tuple(data.shape)} where {x.placements} of {tuple(x.shape)} gives {tuple(sizes)}")
    return Piece(data, offsets, x.shape)


def pieces_of(tensors: Mapping[str, Tensor]) -> dict[str, Piece]:
    found = {name: piece_of(x) for name, x in tensors.items()}
    return {name: piece for name, piece in found.items() if piece is not None}


def _rectangle(x: DTensor) -> tuple[torch.Size, torch.Size] | None:
    """(offsets, sizes), from torch.chunk along one mesh axis after the other, FSDP's axes last.

    FSDP shards what tensor parallelism has sharded before, although FSDP's axis is the outer one. torch marks that order by the placement
    `_StridedShard`, which has a `split_factor`.
    """
    coordinate = x.device_mesh.get_coordinate()
    if coordinate is None:  # this process is not in the mesh
        return None
    if any(placement.is_partial() for placement in x.placements):
        raise ValueError(f"a sum that is pending over {x.placements} cannot be saved or read")
    start, stop = [0] * x.ndim, list(x.shape)
    cuts: list[tuple[int, Any]] = [(axis, p) for axis, p in enumerate(x.placements) if not p.is_replicate()]
    for axis, placement in sorted(cuts, key=lambda cut: hasattr(cut[1], "split_factor")):
        dim = placement.dim % x.ndim
        length = math.ceil((stop[dim] - start[dim]) / x.device_mesh.size(axis))
        start[dim] = min(start[dim] + coordinate[axis] * length, stop[dim])
        stop[dim] = min(start[dim] + length, stop[dim])
    return torch.Size(start), torch.Size([end - begin for begin, end in zip(start, stop, strict=True)])


class SavePieces(DefaultSavePlanner):
    """Plans the writing of a dict of pieces. DCP's planner then chooses one rank to write what several ranks hold."""

    def create_local_plan(self) -> SavePlan:
        pieces: dict[str, Piece] = self.state_dict
        items = [
            WriteItem(
                index=MetadataIndex(name, piece.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(piece.chunk, TensorProperties.create_from_tensor(piece.data), piece.shape),
            )
            for name, piece in pieces.items()
        ]
        self.plan = SavePlan(items, planner_data=self.mappings)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.state_dict[write_item.index.fqn].data


class LoadPieces(LoadPlanner):
    """Plans the reading into a dict of pieces: of each saved chunk only the part that overlaps with a piece is read."""

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        self.pieces: dict[str, Piece] = state_dict
        self.metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        known = self.metadata.state_dict_metadata
        return LoadPlan(
            [item for name, piece in self.pieces.items() for item in create_read_items_for_chunk_list(name, known[name], [piece.chunk])]
        )

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        raise AssertionError("checkpoints hold tensors only")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = tuple(slice(start, start + size) for start, size in zip(read_item.dest_offsets, read_item.lengths, strict=True))
        return self.pieces[read_item.dest_index.fqn].data[part]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None: ...
