"""What this rank holds of a model, and how to run it from there: all that differs between kinds of parallelism.

Everything else asks `Layout`. A new kind of parallelism is added by answering, for it, the questions that its methods
ask.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from gen_dist.parallel.ranks import Ranks
from gen_dist.restore import restoring as put_back

if dist.is_available():
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    # from torch 2.13 on the old name warns
    _all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
else:  # a build of torch for one process
    FSDPModule = FullyShardedDataParallel = DTensor = type("Absent", (), {})  # type: ignore[misc, assignment]

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard

__all__ = ["Holders", "Layout", "local", "placed_like"]

Substitute = Callable[[Tensor, Tensor], Tensor]
"""`(weight, velocity) -> what stands for the weight in the forward pass`."""


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def placed_like(part: Tensor, parameter: Tensor) -> Tensor:
    """A tensor with this local part, of the parameter's shape and placement."""
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


class Layout:
    """How a model is laid out over the ranks, found once: wrap and shard it before.

    Plain replicas, DDP, FSDP2 and DTensors on any mesh, and FSDP1 differ in these methods, and nowhere else.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        modules = list(model.modules())
        self.ddp = [m for m in modules if isinstance(m, DistributedDataParallel)]
        self.fsdp1: list[Any] = [
            m for m in modules if isinstance(m, FullyShardedDataParallel) and m._handle is not None
        ]
        self.fsdp2 = [m for m in modules if isinstance(m, FSDPModule)]
        self.flat = {id(p): unit for unit in self.fsdp1 for p in _fsdp1_parameters(unit)}
        self.wrapped = {id(p) for m in (*self.ddp, *self.fsdp1) for p in m.parameters()} | self.flat.keys()
        self._plans: dict[nn.Module, dict[DTensor, _Whole]] = {}  # of FSDP2 units, kept from update to update

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The group that a wrapper of the model communicates in, if it says so; None for all ranks."""
        groups = [m.process_group for m in self.ddp]
        groups += [m.process_group for m in self.fsdp1 if "HYBRID" not in m.sharding_strategy.name]
        return groups[0] if groups else None

    def ranks(self, process_group: dist.ProcessGroup | None = None) -> Ranks:
        """The ranks that train together: of the group that the user names, or else of the wrapper's."""
        return Ranks(process_group if process_group is not None else self.process_group)

    # --------------------------------------------------------------------------------------- gradients

    def needs_averaging(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The parameters whose gradients nobody averages over the ranks: plain replicas without a wrapper."""
        return [p for p in parameters if not isinstance(p, DTensor) and id(p) not in self.wrapped]

    def average_gradients(self, parameters, ranks, weight=1.0):
        ranks.average_gradients(self.needs_averaging(parameters), weight)

    def gradients_are_finite(self, parameters, ranks):
        layout = self
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        gradients = [g.coalesce().values() if g.is_sparse else g for g in gradients]
        if not gradients and not layout.gradient_is_sharded(parameters):
            return True

        def finite_everywhere(values):
            bad = ~torch.stack([v.isfinite().all() for v in values]).all() if values else torch.tensor(False)
            return not (ranks.any(bad) if layout.gradient_is_sharded(parameters) else bad).item()

        dtype = functools.reduce(torch.promote_types, {g.dtype for g in gradients}, torch.float32)
        norms = list(torch._foreach_norm(gradients, dtype=dtype)) if gradients else []
        return finite_everywhere([torch.stack(norms)] if norms else []) or finite_everywhere(gradients)

    @property
    def shards_have_placement(self):
        return not self.fsdp1

    @property
    def backward_communicates(self):
        return bool(self.ddp) or self.forward_communicates

    def holders(self, tensor, ranks):
        return Holders(self, ranks).of(tensor)

    def holders_counting_steps(self, tensor, ranks):
        return Holders(self, ranks).counting(tensor)

    def gradient_is_sharded(self, parameters: Sequence[Tensor]) -> bool:
        """Whether ranks hold different parts of the gradient, so that none of them sees all of it."""
        return bool(self.fsdp1) or any(isinstance(p, DTensor) for p in parameters)

    @property
    def forward_communicates(self) -> bool:
        """Whether ranks meet in the forward pass, so that one that fails in it cannot meet the others elsewhere."""
        sharded = any(isinstance(p, DTensor) for p in self.model.parameters())
        return bool(self.fsdp1 or self.fsdp2) or sharded

    def replicas(self, parameter: Tensor, ranks: int) -> int:
        """How many of the ranks hold the same part of a parameter as this one."""
        shards = 1
        if isinstance(parameter, DTensor):
            for size, placement in zip(parameter.device_mesh.shape, parameter.placements, strict=True):
                shards *= 1 if placement.is_replicate() else size
        elif id(parameter) in self.flat:
            unit = self.flat[id(parameter)]
            shards = unit.process_group.size() if unit._handle.uses_sharded_strategy else 1
        return max(ranks // shards, 1)

    # ------------------------------------------------------------------------------ running the model

    def compute_dtypes(self) -> set[torch.dtype]:
        """The dtypes that the weights take part in a forward pass in, by themselves or by a policy."""
        policies: list[Any] = [m.mixed_precision for m in (*self.ddp, *self.fsdp1)]
        policies += [m._get_fsdp_state()._mp_policy for m in self.fsdp2]
        dtypes = {p.dtype for p in self.model.parameters()} | {p.param_dtype for p in policies if p is not None}
        return {dtype for dtype in dtypes if dtype is not None and dtype.is_floating_point}

    @contextlib.contextmanager
    def without_wrappers(self) -> Iterator[None]:
        """Run DDP's inner module in place of DDP: a probe has nothing to synchronise and must not disturb it."""
        wrappers = [wrapper for wrapper in self.ddp if not wrapper.mixed_precision]

        def rewrap() -> None:
            for wrapper in wrappers:
                wrapper.__dict__.pop("forward", None)

        with put_back(rewrap):
            for wrapper in wrappers:
                wrapper.forward = _inner_forward(wrapper)  # type: ignore[method-assign]
            yield

    def reshard(self) -> None:
        """Let go of gathered weights: FSDP keeps its root's after a forward pass, and would use them again.

        Without it a change of the shards between two forward passes goes unseen, and silently.
        """
        for module in self.fsdp2:
            module.reshard()
        for unit in self.fsdp1:
            # before the first forward pass nothing has been gathered, and the handle knows no shard yet
            if unit._handle.uses_sharded_strategy and hasattr(unit._handle.flat_param, "_local_shard"):
                unit._handle.reshard(free_unsharded_flat_param=True)

    @contextlib.contextmanager
    def moving_weights(
        self, velocities: Mapping[Tensor, Tensor], substitute: Substitute
    ) -> Iterator[dict[int, Tensor]]:
        """Yield a table, by identity, of what stands for each weight in a forward pass of the model.

        `velocities` maps the optimizer's parameters to local parts. Weights that this rank holds as it uses them are in
        the table throughout. Those of an FSDP unit are there while the unit runs, that is while it holds them whole;
        their velocities are gathered then, and let go with them. Raises `ValueError` for a parameter that is not the
        model's.
        """
        table: dict[int, Tensor] = {}
        units, found = self._units(velocities)
        for parameter in self.model.parameters():
            if parameter in velocities and id(parameter) not in found:
                found.add(id(parameter))
                table[id(parameter)] = _stand_in(parameter.detach(), velocities[parameter], substitute)
        _refuse_strangers(velocities, found)
        handles: list[Any] = []
        with put_back(lambda: [handle.remove() for handle in handles]):
            for unit in units:
                handles += unit.hook(table, substitute)
            yield table
        for unit in units:
            unit.check_that_it_ran()

    def _units(self, velocities: Mapping[Tensor, Tensor]) -> tuple[list[_Unit], set[int]]:
        """The modules that gather moving weights when they run, and the identities of those weights' parameters."""
        units: list[_Unit] = [_Fsdp1Unit(unit, velocities) for unit in self.fsdp1]
        found = set(self.flat)
        if not self.fsdp2:
            return units, found
        fsdp2: dict[nn.Module, _Fsdp2Unit] = {}
        for unit, module in _modules_with_unit(self.model):
            own: dict[str, Any] = dict(module._parameters)
            for name, parameter in own.items():
                if unit is not None and isinstance(parameter, DTensor) and parameter in velocities:
                    found.add(id(parameter))
                    of_unit = fsdp2.setdefault(unit, _Fsdp2Unit(unit, velocities, self._plans))
                    of_unit.weights.append((module, name, parameter))
        in_order = [fsdp2[module] for module in self._plans if module in fsdp2]
        for of_unit, following in itertools.pairwise(in_order):
            of_unit.following = following
        return [*units, *fsdp2.values()], found


class Holders:
    """Which ranks of the group, this one among them, hold the same part of a tensor as this one does."""

    def __init__(self, layout: Layout, ranks: Ranks) -> None:
        self.layout = layout
        self.here, self.everyone = (ranks.rank,), tuple(range(ranks.size))
        self.numbers = {rank: number for number, rank in enumerate(dist.get_process_group_ranks(ranks.group))}
        self.of_mesh = functools.cache(self._of_mesh)

    def of(self, tensor: Tensor) -> tuple[int, ...]:
        if isinstance(tensor, DTensor):
            return self.of_mesh(tensor.device_mesh, tuple(p.is_replicate() for p in tensor.placements))
        if id(tensor) not in self.layout.flat:
            return self.everyone
        unit = self.layout.flat[id(tensor)]  # of FSDP1
        if not unit._handle.uses_sharded_strategy:
            return self._in_group(dist.get_process_group_ranks(unit.process_group))
        if "HYBRID" not in unit.sharding_strategy.name:
            return self.here
        return self._in_group(dist.get_process_group_ranks(unit._inter_node_pg))

    def counting(self, parameter: Tensor) -> tuple[int, ...]:
        """The ranks that count the steps of a parameter alike: of FSDP1 those alone that have a piece of it."""
        if isinstance(parameter, DTensor):
            return self.of_mesh(parameter.device_mesh, (True,) * parameter.device_mesh.ndim)
        return self.of(parameter)

    def _of_mesh(self, mesh: DeviceMesh, replicated: tuple[bool, ...]) -> tuple[int, ...]:
        place = mesh.get_coordinate()
        if place is None:
            return self.here
        index = tuple(slice(None) if same else at for same, at in zip(replicated, place, strict=True))
        return self._in_group(mesh.mesh[index].flatten().tolist())

    def _in_group(self, world: list[int]) -> tuple[int, ...]:
        return tuple(sorted(self.numbers[rank] for rank in world if rank in self.numbers))


def _fsdp1_parameters(unit: Any) -> list[Tensor]:
    """What an optimizer sees of a unit: the original parameters, or the flat one."""
    flat = unit._handle.flat_param
    return list(flat._params) if unit._handle._use_orig_params else [flat]


def _inner_forward(wrapper: DistributedDataParallel) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if wrapper.device_ids:  # DDP moves its inputs
            device = torch.device(wrapper.device_type, wrapper.device_ids[0])
            args, kwargs = tree_map_only(Tensor, lambda x: x.to(device), (args, kwargs))
        return wrapper.module(*args, **kwargs)

    return forward


def _stand_in(weight: Tensor, velocity: Tensor, substitute: Substitute) -> Tensor:
    """What stands for a weight; inside a DTensor its local part is replaced."""
    if not isinstance(weight, DTensor):
        return substitute(weight, velocity.to(weight.dtype))
    part = substitute(weight._local_tensor, velocity.to(weight.dtype))
    return cast(Tensor, DTensor(part, weight._spec, requires_grad=False))


class _Unit:
    """A module that holds weights whole only while it runs: gathers their velocities for that time."""

    def __init__(self, module: nn.Module, velocities: Mapping[Tensor, Tensor]) -> None:
        self.module = module  # hooks go here: inside of FSDP's own
        self.velocities = velocities
        self.has_run = False

    def whole(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The unit's weights as it uses them, each with its velocity, gathered. Collective."""
        raise NotImplementedError

    def moves(self) -> bool:
        raise NotImplementedError

    def hook(self, table: dict[int, Tensor], substitute: Substitute) -> list[Any]:
        present: list[Tensor] = []  # keeps the gathered weights alive, so that their identities stay theirs

        def gather(*_: Any) -> None:
            release()
            self.has_run = True
            for weight, velocity in self.whole():
                table[id(weight)] = _stand_in(weight.detach(), velocity, substitute)
                present.append(weight)

        def release(*_: Any) -> None:
            for weight in present:
                table.pop(id(weight), None)
            present.clear()

        # after FSDP has gathered the weights, and before it lets them go
        before = self.module.register_forward_pre_hook(gather)
        return [before, self.module.register_forward_hook(release, prepend=True)]

    def check_that_it_ran(self) -> None:
        if self.moves() and not self.has_run:
            raise ValueError(
                f"the weights of {type(self.module).__name__} have a gradient, but its forward did not run (was it "
                "called by another method?), so exact curvature did not see them move: use curvature='forward'"
            )


class _Whole(NamedTuple):
    """What a unit's weight is while the unit runs."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    cut: tuple[int, int] | None  # the dimensions of the mesh and of the weight that FSDP2 cuts along


class _Fsdp2Unit(_Unit):
    """Of the velocities, those of the unit that runs next are on their way while this one computes.

    Which one that is, and what its weights are when whole, is known from an earlier run: `plans`, in the order in which
    units ran first.
    """

    def __init__(
        self, module: nn.Module, velocities: Mapping[Tensor, Tensor], plans: dict[nn.Module, dict[DTensor, _Whole]]
    ) -> None:
        super().__init__(module, velocities)
        self.weights: list[tuple[nn.Module, str, DTensor]] = []
        self.plans = plans
        self.gathers: list[_Gather] = []
        self.following: _Fsdp2Unit | None = None

    def moves(self) -> bool:
        return bool(self.weights)

    def whole(self) -> Iterator[tuple[Tensor, Tensor]]:
        held = {sharded: cast(Tensor, module._parameters[name]) for module, name, sharded in self.weights}
        if not self.is_planned():
            self.plans[self.module] = {sharded: _whole(weight, sharded) for sharded, weight in held.items()}
        if not self.gathers:
            self.begin()
        for gather in self.gathers:
            yield from zip((held[sharded] for sharded in gather.sharded), gather.whole(), strict=True)
        self.gathers = []
        for sharded, how in self.plans[self.module].items():
            if how.cut is None:
                yield held[sharded], self._velocity(sharded, how)
        following = self.following
        if following is not None and not following.gathers and following.is_planned():
            following.begin()

    def is_planned(self) -> bool:
        return self.plans.get(self.module, {}).keys() == {sharded for _, _, sharded in self.weights}

    def begin(self) -> None:
        """Begin to gather: one gather for each dtype and group, that is one. Collective."""
        together: dict[tuple[dist.ProcessGroup, torch.dtype], dict[DTensor, _Piece]] = {}
        for sharded, how in self.plans[self.module].items():
            if how.cut is not None:
                of_mesh, dimension = how.cut
                group = sharded.device_mesh.get_group(of_mesh)
                piece = _Piece(self._velocity(sharded, how), how.shape, dimension)
                together.setdefault((group, how.dtype), {})[sharded] = piece
        self.gathers = [_Gather(pieces, group) for (group, _), pieces in together.items()]

    def _velocity(self, sharded: DTensor, how: _Whole) -> Tensor:
        return self.velocities[sharded].to(how.device, how.dtype)  # shards may be offloaded


def _whole(weight: Tensor, sharded: DTensor) -> _Whole:
    # a weight that is still a DTensor is one of tensor parallelism, on the last dimensions of the mesh
    kept = weight.device_mesh.ndim if isinstance(weight, DTensor) else 0
    own = sharded.placements[: len(sharded.placements) - kept]
    cuts = [(of_mesh, cast("Shard", p).dim) for of_mesh, p in enumerate(own) if not p.is_replicate()]
    assert len(cuts) <= 1, "FSDP2 shards over one dimension of its mesh"
    return _Whole(local(weight).shape, weight.dtype, weight.device, cuts[0] if cuts else None)


class _Piece(NamedTuple):
    """A rank's part of a tensor that is cut along a dimension as `torch.chunk` does it."""

    part: Tensor
    shape: torch.Size  # of the whole
    dimension: int


class _Gather:
    """The pieces of tensors of one dtype, on their way to all ranks in one gather. Collective."""

    def __init__(self, pieces: Mapping[DTensor, _Piece], group: dist.ProcessGroup) -> None:
        self.sharded, self.pieces = list(pieces), list(pieces.values())
        self.sizes = []  # the last ranks may have less than the first, or nothing: padded
        for _, shape, dimension in self.pieces:
            self.sizes.append(-(-shape[dimension] // group.size()) * (shape.numel() // max(shape[dimension], 1)))
        self.flat = self.pieces[0].part.new_zeros(sum(self.sizes))
        for place, (part, _, dimension) in zip(self.flat.split(self.sizes), self.pieces, strict=True):
            place[: part.numel()].view(part.movedim(dimension, 0).shape).copy_(part.movedim(dimension, 0))
        self.gathered = self.flat.new_empty(group.size(), len(self.flat))
        self.work = _all_gather(self.gathered.view(-1), self.flat, group=group, async_op=True)

    def whole(self) -> list[Tensor]:
        """The tensors, once they are here."""
        self.work.wait()
        _free(self.flat)
        whole = []
        for rows, (_, shape, dimension) in zip(self.gathered.split(self.sizes, dim=1), self.pieces, strict=True):
            moved = [shape[dimension], *shape[:dimension], *shape[dimension + 1 :]]
            own = rows.clone(memory_format=torch.contiguous_format).view(-1)
            whole.append(own[: shape.numel()].view(moved).movedim(0, dimension))
        _free(self.gathered)
        return whole


def _free(buffer: Tensor) -> None:
    """Give its memory back now: the backend's own thread may hold the tensor for a while."""
    buffer.untyped_storage().resize_(0)


class _Fsdp1Unit(_Unit):
    """FSDP1 keeps a unit's weights in one flat parameter, of which each rank has a piece."""

    def __init__(self, wrapper: Any, velocities: Mapping[Tensor, Tensor]) -> None:
        super().__init__(wrapper._fsdp_wrapped_module, velocities)
        self.wrapper = wrapper
        self.handle, self.group = wrapper._handle, wrapper.process_group
        self.parameters = _fsdp1_parameters(wrapper)

    def moves(self) -> bool:
        return any(p in self.velocities for p in self.parameters)

    def whole(self) -> Iterator[tuple[Tensor, Tensor]]:
        flat = self.handle.flat_param
        velocity = self._flat_velocity()
        if self.handle.uses_sharded_strategy:
            gathered = velocity.new_empty(velocity.numel() * self.group.size())
            _all_gather(gathered, velocity, group=self.group)
            velocity = gathered
        velocities = self.handle._get_unflat_views(velocity[: flat._unpadded_unsharded_size.numel()])
        for (name, module, _), of_weight in zip(flat._param_infos, velocities, strict=True):
            yield getattr(module, name), of_weight

    def hook(self, table: dict[int, Tensor], substitute: Substitute) -> list[Any]:
        # With gradients enabled the wrapper would prepare for a backward pass that does not come, and fail in the next
        # one: they are enabled for the module inside alone.
        return [
            self.wrapper.register_forward_pre_hook(lambda *_: _enable_gradients(False)),
            self.module.register_forward_pre_hook(lambda *_: _enable_gradients(True)),
            *super().hook(table, substitute),
            self.module.register_forward_hook(lambda *_: _enable_gradients(False)),
            self.wrapper.register_forward_hook(lambda *_: _enable_gradients(True)),
        ]

    def _flat_velocity(self) -> Tensor:
        """This rank's piece of the flat velocity: put together from those of the original parameters, or as it is."""
        flat = self.handle.flat_param
        velocity = torch.zeros_like(flat._local_shard if self.handle.uses_sharded_strategy else flat)
        if not self.handle._use_orig_params:
            return self.velocities.get(flat, velocity)
        for parameter, info in zip(self.parameters, flat._shard_param_infos, strict=True):
            if info.in_shard and parameter in self.velocities:
                piece = velocity[info.offset_in_shard : info.offset_in_shard + info.numel_in_shard]
                piece.copy_(self.velocities[parameter].flatten())
        return velocity


def _enable_gradients(enabled: bool) -> None:
    with torch._C.DisableTorchFunction():  # not the program's own doing, which a mode may follow
        torch._C._set_grad_enabled(enabled)


def _modules_with_unit(model: nn.Module) -> Iterator[tuple[nn.Module | None, nn.Module]]:
    """Every module with the FSDP2 unit, the nearest ancestor or itself, that gathers its weights."""

    def walk(module: nn.Module, unit: nn.Module | None, seen: set[nn.Module]) -> Iterator[Any]:
        if module in seen:
            return
        seen.add(module)
        unit = module if isinstance(module, FSDPModule) else unit
        yield unit, module
        for child in module.children():
            yield from walk(child, unit, seen)

    return walk(model, None, set())


def _refuse_strangers(velocities: Mapping[Tensor, Tensor], found: set[int]) -> None:
    strangers = [tuple(p.shape) for p in velocities if id(p) not in found]
    if strangers:
        raise ValueError(
            f"{len(strangers)} of the optimizer's parameters are not in the model (the first has shape "
            f"{strangers[0]}): pass the model that they belong to, or use curvature='forward'"
        )
