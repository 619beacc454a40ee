"""FSDP1, `FullyShardedDataParallel`: units that hold their weights in one flat parameter, cut over the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gen_dist import torch_private
from gen_dist.parallel.gathering import Gathering, Substitute
from gen_dist.parallel.kind import Kind
from gen_dist.parallel.ranks import Ranks, all_gather

__all__ = ["FSDP1"]


class FSDP1(Kind):
    """Units of `FullyShardedDataParallel`, with `use_orig_params` or without."""

    averages_gradients = True

    def __init__(self, model: nn.Module) -> None:
        wrappers = [m for m in model.modules() if torch_private.is_fsdp1_unit(m)]
        self.units = [_Unit(m) for m in wrappers if torch_private.fsdp1_handle(m) is not None]
        self._unit_of = {id(p): unit for unit in self.units for p in unit.parameters()}
        # with those that FSDP1 was told to ignore: their gradients are left to the user
        self._wrapped = {id(p) for unit in self.units for p in unit.wrapper.parameters()} | self._unit_of.keys()

    def holds(self, tensor: Tensor) -> bool:
        return id(tensor) in self._wrapped

    def replicas(self, parameter: Tensor, ranks: int) -> int:
        unit = self._unit_of.get(id(parameter))
        shards = unit.wrapper.process_group.size() if unit is not None and unit.is_sharded else 1
        return max(ranks // shards, 1)

    def holders(self, tensor: Tensor, ranks: Ranks) -> tuple[int, ...]:
        """The ranks with the same piece. Those without any of a parameter do not step it, nor count its steps."""
        unit = self._unit_of.get(id(tensor))
        if unit is None:
            return super().holders(tensor, ranks)
        if not unit.is_sharded:
            return ranks.among(dist.get_process_group_ranks(unit.wrapper.process_group))
        if not unit.is_hybrid:
            return (ranks.rank,)
        return ranks.among(dist.get_process_group_ranks(torch_private.fsdp1_replica_group(unit.wrapper)))

    @property
    def shards_have_placement(self) -> bool:
        """False: shards are plain tensors."""
        return not self.units

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """That of the first unit; a hybrid one has two, neither of which is all ranks."""
        return next((unit.wrapper.process_group for unit in self.units if not unit.is_hybrid), None)

    @property
    def forward_communicates(self) -> bool:
        return bool(self.units)

    def gradient_is_sharded(self, parameters: Sequence[Tensor]) -> bool:
        return bool(self.units)

    def compute_dtypes(self) -> list[torch.dtype | None]:
        return [unit.wrapper.mixed_precision.param_dtype for unit in self.units]

    def reshard(self) -> None:
        for unit in self.units:
            torch_private.fsdp1_reshard(unit.handle)

    def gatherings(self, velocities: Mapping[Tensor, Tensor]) -> list[Gathering]:
        return [_Gathering(unit, velocities) for unit in self.units]


class _Unit:
    """A wrapper that has parameters of its own."""

    def __init__(self, wrapper: Any) -> None:
        self.wrapper = wrapper
        self.is_hybrid = "HYBRID" in wrapper.sharding_strategy.name

    @property
    def handle(self) -> Any:
        return torch_private.fsdp1_handle(self.wrapper)

    @property
    def is_sharded(self) -> bool:
        return torch_private.fsdp1_is_sharded(self.handle)

    def parameters(self) -> list[Tensor]:
        return torch_private.fsdp1_parameters(self.handle)


class _Gathering(Gathering):
    """A unit that gathers the velocity of its flat parameter and shows it as those of the weights."""

    def __init__(self, unit: _Unit, velocities: Mapping[Tensor, Tensor]) -> None:
        super().__init__(torch_private.fsdp1_inner(unit.wrapper), unit.parameters(), velocities)
        self.unit = unit

    def whole(self) -> Iterator[tuple[Tensor, Tensor]]:
        handle, group = self.unit.handle, self.unit.wrapper.process_group
        velocity = torch_private.fsdp1_zeros(handle)
        for parameter, place in torch_private.fsdp1_pieces(handle, velocity):
            if parameter in self.velocities:
                place.copy_(self.velocities[parameter].reshape(place.shape))
        if self.unit.is_sharded:
            gathered = velocity.new_empty(velocity.numel() * group.size())
            all_gather(gathered, velocity, group)
            velocity = gathered
        return torch_private.fsdp1_weights(handle, velocity)

    def hook(self, table: dict[int, Tensor], substitute: Substitute) -> list[Any]:
        # With gradients enabled the wrapper would prepare for a backward pass that does not come, and fail in the next
        # one: they are enabled for the module inside alone.
        enable = torch_private.enable_gradients_unseen
        return [
            self.unit.wrapper.register_forward_pre_hook(lambda *_: enable(False)),
            self.module.register_forward_pre_hook(lambda *_: enable(True)),
            *super().hook(table, substitute),
            self.module.register_forward_hook(lambda *_: enable(False)),
            self.unit.wrapper.register_forward_hook(lambda *_: enable(True)),
        ]
