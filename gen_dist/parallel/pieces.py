"""Tensors of which every rank holds a piece, on their way to all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gen_dist.parallel.ranks import all_gather

__all__ = ["PendingGather", "Piece"]


class Piece(NamedTuple):
    """This rank's part of a tensor that is cut along a dimension as `torch.chunk` does it."""

    part: Tensor
    shape: torch.Size  # of the whole
    dimension: int


class PendingGather:
    """One asynchronous gather of the pieces of several tensors of one dtype. Collective."""

    def __init__(self, pieces: Sequence[Piece], group: dist.ProcessGroup) -> None:
        self.pieces = pieces
        # the last ranks may have less than the first, or nothing: padded
        self.sizes = [
            -(-shape[dimension] // group.size()) * (shape.numel() // max(shape[dimension], 1))
            for _, shape, dimension in pieces
        ]
        self.own = pieces[0].part.new_zeros(sum(self.sizes))
        for place, (part, _, dimension) in zip(self.own.split(self.sizes), pieces, strict=True):
            moved = part.movedim(dimension, 0)
            place[: part.numel()].view(moved.shape).copy_(moved)
        self.gathered = self.own.new_empty(group.size(), len(self.own))
        self.work = all_gather(self.gathered.view(-1), self.own, group, asynchronously=True)

    def whole(self) -> list[Tensor]:
        """Wait, and return the tensors in the order of their pieces. To be called once."""
        self.work.wait()
        _free(self.own)
        whole = []
        for rows, (_, shape, dimension) in zip(self.gathered.split(self.sizes, dim=1), self.pieces, strict=True):
            moved = [shape[dimension], *shape[:dimension], *shape[dimension + 1 :]]
            flat = rows.clone(memory_format=torch.contiguous_format).view(-1)
            whole.append(flat[: shape.numel()].view(moved).movedim(0, dimension))
        _free(self.gathered)
        return whole


def _free(buffer: Tensor) -> None:
    """Give the memory back now: the backend's own thread may hold the tensor for a while."""
    buffer.untyped_storage().resize_(0)
