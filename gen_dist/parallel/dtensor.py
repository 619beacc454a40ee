"""`DTensor` on any mesh: tensor parallelism, and the shards of FSDP2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from gen_dist.parallel.kind import Kind
from gen_dist.parallel.placement import DTensor
from gen_dist.parallel.ranks import Ranks

__all__ = ["DTensors"]


class DTensors(Kind):
    """Parameters and optimizer state that are `DTensor`, whose placement tells which ranks hold what."""

    averages_gradients = True

    def __init__(self, model: nn.Module) -> None:
        self._present = any(isinstance(p, DTensor) for p in model.parameters())
        self._known: dict[tuple[Ranks, DeviceMesh, tuple[bool, ...]], tuple[int, ...]] = {}

    def holds(self, tensor: Tensor) -> bool:
        return isinstance(tensor, DTensor)

    @property
    def forward_communicates(self) -> bool:
        return self._present

    def gradient_is_sharded(self, parameters: Sequence[Tensor]) -> bool:
        return any(isinstance(p, DTensor) for p in parameters)

    def replicas(self, parameter: Tensor, ranks: int) -> int:
        sizes = zip(cast(DTensor, parameter).device_mesh.shape, _replicated(parameter), strict=True)
        shards = math.prod(size for size, replicated in sizes if not replicated)
        return max(ranks // shards, 1)

    def holders(self, tensor: Tensor, ranks: Ranks) -> tuple[int, ...]:
        return self._along(tensor, _replicated(tensor), ranks)

    def holders_counting_steps(self, parameter: Tensor, ranks: Ranks) -> tuple[int, ...]:
        """All ranks of the mesh: each steps its shard whenever the others step theirs, even an empty one."""
        return self._along(parameter, (True,) * cast(DTensor, parameter).device_mesh.ndim, ranks)

    def _along(self, tensor: Tensor, dimensions: tuple[bool, ...], ranks: Ranks) -> tuple[int, ...]:
        """The ranks that differ from this one in the given dimensions of the mesh only; found once for each mesh."""
        mesh = cast(DTensor, tensor).device_mesh
        key = ranks, mesh, dimensions
        if key not in self._known:
            self._known[key] = _in_mesh(mesh, dimensions, ranks)
        return self._known[key]


def _replicated(tensor: Tensor) -> tuple[bool, ...]:
    """For each dimension of the mesh, whether the ranks along it hold the same."""
    return tuple(placement.is_replicate() for placement in cast(DTensor, tensor).placements)


def _in_mesh(mesh: DeviceMesh, dimensions: tuple[bool, ...], ranks: Ranks) -> tuple[int, ...]:
    here = mesh.get_coordinate()
    if here is None:  # this rank is outside of the mesh
        return (ranks.rank,)
    index = tuple(slice(None) if whole else at for whole, at in zip(dimensions, here, strict=True))
    return ranks.among(mesh.mesh[index].flatten().tolist())
