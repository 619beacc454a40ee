"""FSDP2, `fully_shard`: units that hold their weights whole only while they run."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Shard

from gen_dist.parallel.gathering import Gathering
from gen_dist.parallel.kind import Kind
from gen_dist.parallel.pieces import PendingGather, Piece
from gen_dist.parallel.placement import DTensor, local
from gen_dist.torch_private import end_fsdp2_forward, fsdp2_compute_dtype, is_fsdp2_unit

__all__ = ["FSDP2"]


class FSDP2(Kind):
    """Units of `fully_shard`. Their shards are held by `DTensors`; this kind knows when weights are whole."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.units: list[Any] = [m for m in model.modules() if is_fsdp2_unit(m)]
        self._plans: dict[nn.Module, _Plan] = {}  # kept from update to update

    @property
    def forward_communicates(self) -> bool:
        return bool(self.units)

    def compute_dtypes(self) -> list[torch.dtype | None]:
        return [fsdp2_compute_dtype(unit) for unit in self.units]

    def reshard(self) -> None:
        for unit in self.units:
            end_fsdp2_forward(unit)
            unit.reshard()

    def gatherings(self, velocities: Mapping[Tensor, Tensor]) -> list[Gathering]:
        if not self.units:
            return []
        weights: defaultdict[nn.Module, list[_Weight]] = defaultdict(list)
        for unit, module in _modules_with_unit(self.model):
            for name, parameter in module.named_parameters(recurse=False):
                if unit is not None and isinstance(parameter, DTensor) and parameter in velocities:
                    weights[unit].append(_Weight(module, name, parameter))
        units = {unit: _Gathering(unit, of_unit, velocities, self._plans) for unit, of_unit in weights.items()}
        in_order = [units[module] for module in self._plans if module in units]
        for of_unit, following in itertools.pairwise(in_order):
            of_unit.following = following
        return list(units.values())


class _Weight(NamedTuple):
    """Where a weight of a unit is while the unit runs, and its shard."""

    module: nn.Module
    name: str
    sharded: DTensor


class _Whole(NamedTuple):
    """What a weight of a unit is while the unit runs."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    cut: tuple[int, int] | None  # the dimensions of the mesh and of the weight that FSDP2 cuts along


_Plan: TypeAlias = dict[DTensor, _Whole]
"""What all weights of a unit are while it runs, by their shards."""


class _Gathering(Gathering):
    """A unit that gathers, once it runs, the velocities of the unit that runs next, which travel while it computes.

    Which one that is, and what its weights are when whole, is known from an earlier run: `plans`, in the order in which
    units ran first.
    """

    def __init__(
        self,
        module: nn.Module,
        weights: Sequence[_Weight],
        velocities: Mapping[Tensor, Tensor],
        plans: dict[nn.Module, _Plan],
    ) -> None:
        super().__init__(module, [weight.sharded for weight in weights], velocities)
        self.weights = weights
        self.plans = plans
        self.coming: list[tuple[list[DTensor], PendingGather]] = []
        self.following: _Gathering | None = None

    def whole(self) -> Iterator[tuple[Tensor, Tensor]]:
        held: dict[DTensor, Tensor] = {sharded: getattr(module, name) for module, name, sharded in self.weights}
        if not self.is_planned():
            self.plans[self.module] = {sharded: _whole(weight, sharded) for sharded, weight in held.items()}
        if not self.coming:
            self.begin()
        for shards, pieces in self.coming:
            yield from zip((held[sharded] for sharded in shards), pieces.whole(), strict=True)
        self.coming = []
        for sharded, how in self.plans[self.module].items():
            if how.cut is None:
                yield held[sharded], self._velocity(sharded, how)
        following = self.following
        if following is not None and not following.coming and following.is_planned():
            following.begin()

    def is_planned(self) -> bool:
        return self.plans.get(self.module, {}).keys() == set(self.parameters)

    def begin(self) -> None:
        """Begin to gather the velocities: one gather for each group and dtype, which is one. Collective."""
        together: defaultdict[tuple[dist.ProcessGroup, torch.dtype], dict[DTensor, Piece]] = defaultdict(dict)
        for sharded, how in self.plans[self.module].items():
            if how.cut is not None:
                of_mesh, dimension = how.cut
                group = sharded.device_mesh.get_group(of_mesh)
                together[group, how.dtype][sharded] = Piece(self._velocity(sharded, how), how.shape, dimension)
        self.coming = [
            (list(pieces), PendingGather(list(pieces.values()), group)) for (group, _), pieces in together.items()
        ]

    def _velocity(self, sharded: DTensor, how: _Whole) -> Tensor:
        return self.velocities[sharded].to(how.device, how.dtype)  # shards may be offloaded


def _whole(weight: Tensor, sharded: DTensor) -> _Whole:
    # a weight that is still a DTensor is one of tensor parallelism, on the last dimensions of the mesh
    kept = weight.device_mesh.ndim if isinstance(weight, DTensor) else 0
    own = sharded.placements[: len(sharded.placements) - kept]
    cuts = [(of_mesh, cast(Shard, p).dim) for of_mesh, p in enumerate(own) if not p.is_replicate()]
    assert len(cuts) <= 1, "FSDP2 shards over one dimension of its mesh"
    return _Whole(local(weight).shape, weight.dtype, weight.device, cuts[0] if cuts else None)


def _modules_with_unit(model: nn.Module) -> Iterator[tuple[nn.Module | None, nn.Module]]:
    """Every module with the unit, the nearest ancestor or itself, that gathers its weights."""
    seen: set[nn.Module] = set()

    def walk(module: nn.Module, unit: nn.Module | None) -> Iterator[tuple[nn.Module | None, nn.Module]]:
        if module in seen:
            return
        seen.add(module)
        unit = module if is_fsdp2_unit(module) else unit
        yield unit, module
        for child in module.children():
            yield from walk(child, unit)

    return walk(model, None)
