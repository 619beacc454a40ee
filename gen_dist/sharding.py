"""What this rank holds of a model, and how to run it from there: all that differs between kinds of parallelism.

Plain replicas, DDP and FSDP2 (with its meshes) are told apart here and nowhere else. A new kind of parallelism is
added by answering, for it, the questions that the functions below ask.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

if dist.is_available():
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor, Shard

    WRAPPERS: tuple[type, ...] = (DistributedDataParallel, FullyShardedDataParallel)
else:  # a build of torch for one process
    FSDPModule = FullyShardedDataParallel = DTensor = type("Absent", (), {})  # type: ignore[misc, assignment]
    WRAPPERS = ()

__all__ = [
    "bare",
    "gradient_is_sharded",
    "local",
    "moving_weights",
    "needs_averaging",
    "placed_like",
    "process_group_of",
    "replicas",
    "reshard",
]

Substitute = Callable[[Tensor, Tensor], Tensor]
"""`(weight, velocity) -> what stands for the weight in the forward pass`."""


# ------------------------------------------------------------------------------------- what this rank holds


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


def replicas(parameter: Tensor, ranks: int) -> int:
    """How many of the ranks hold the same part of a parameter as this one."""
    if not isinstance(parameter, DTensor):
        return ranks
    shards = 1
    for size, placement in zip(parameter.device_mesh.shape, parameter.placements, strict=True):
        if isinstance(placement, Shard) or placement.is_shard():
            shards *= size
    return max(ranks // shards, 1)


def gradient_is_sharded(parameters: list[Tensor]) -> bool:
    """Whether ranks hold different parts of the gradient, so that none of them sees all of it."""
    return any(isinstance(p, DTensor) for p in parameters)


def needs_averaging(model: nn.Module, parameters: list[Tensor]) -> list[Tensor]:
    """The parameters whose gradients nobody averages over the ranks: plain replicas without a wrapper."""
    wrapped = {id(p) for module in model.modules() if isinstance(module, WRAPPERS) for p in module.parameters()}
    return [p for p in parameters if not isinstance(p, DTensor) and id(p) not in wrapped]


def process_group_of(model: nn.Module) -> dist.ProcessGroup | None:
    """The group that a wrapper of the model communicates in, if it says so."""
    for module in model.modules():
        if isinstance(module, WRAPPERS):
            return cast(dist.ProcessGroup, module.process_group)
    return None


# --------------------------------------------------------------------------------- how to run it from there


@contextlib.contextmanager
def bare(model: nn.Module) -> Iterator[None]:
    """Run DDP's inner module in place of DDP: a probe has nothing to synchronise and must not disturb it."""
    wrappers = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    wrappers = [wrapper for wrapper in wrappers if not wrapper.mixed_precision]
    for wrapper in wrappers:
        wrapper.forward = _inner_forward(wrapper)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for wrapper in wrappers:
            del wrapper.forward


def _inner_forward(wrapper: DistributedDataParallel) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if wrapper.device_ids:  # DDP moves its inputs
            device = torch.device(wrapper.device_type, wrapper.device_ids[0])
            args, kwargs = tree_map_only(Tensor, lambda x: x.to(device), (args, kwargs))
        return wrapper.module(*args, **kwargs)

    return forward


def reshard(model: nn.Module) -> None:
    """Let go of gathered weights: FSDP2 keeps its root's after a forward pass, and would use them again.

    Without it a change of the shards between two forward passes goes unseen, and silently.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def moving_weights(
    model: nn.Module, velocities: Mapping[Tensor, Tensor], substitute: Substitute
) -> Iterator[dict[int, Tensor]]:
    """Yield a table, by identity, of what stands for each weight in a forward pass of the model.

    `velocities` maps the optimizer's parameters to local parts. Plain weights are in the table throughout. Weights
    of an FSDP2 unit are there while the unit runs, that is while it holds them whole; their velocities are
    gathered then, and let go with them. Raises `ValueError` for a parameter that is not the model's.
    """
    table: dict[int, Tensor] = {}
    units: dict[nn.Module, list[tuple[nn.Module, str, Tensor]]] = {}
    found: set[int] = set()
    for unit, module in _modules_with_unit(model):
        for name, parameter in module._parameters.items():
            if parameter is None or parameter not in velocities:
                continue
            found.add(id(parameter))
            if isinstance(parameter, DTensor):
                if unit is None:
                    raise ValueError(
                        f"parameter '{name}' is a DTensor outside of fully_shard (tensor parallel), which "
                        "exact curvature does not handle: use curvature='forward'"
                    )
                units.setdefault(unit, []).append((module, name, parameter))
            else:
                table[id(parameter)] = substitute(parameter.detach(), velocities[parameter])
    _refuse_strangers(velocities, found)

    handles = []
    ran: set[nn.Module] = set()
    for unit, weights in units.items():
        gather, release = _unit_hooks(weights, velocities, substitute, table, ran)
        handles.append(unit.register_forward_pre_hook(gather))  # after FSDP's own: the weights are whole
        handles.append(unit.register_forward_hook(release, prepend=True))  # before FSDP lets them go
    try:
        yield table
    finally:
        for handle in handles:
            handle.remove()
    for unit in units.keys() - ran:
        raise ValueError(
            f"the weights of {type(unit).__name__} have a gradient, but its forward did not run (was it called by "
            "another method?), so exact curvature did not see them move: use curvature='forward'"
        )


def _unit_hooks(
    weights: list[tuple[nn.Module, str, Tensor]],
    velocities: Mapping[Tensor, Tensor],
    substitute: Substitute,
    table: dict[int, Tensor],
    ran: set[nn.Module],
) -> tuple[Callable[..., None], Callable[..., None]]:
    present: list[Tensor] = []  # keeps the gathered weights alive, so that their identities stay theirs

    def gather(unit: nn.Module, *_: Any) -> None:
        release()
        ran.add(unit)
        for module, name, sharded in weights:
            whole = module._parameters[name]
            assert whole is not None
            assert not isinstance(whole, DTensor), "FSDP gathers before its units run"
            if id(whole) not in table:  # tied weights are one
                velocity = placed_like(velocities[sharded], sharded).full_tensor()  # type: ignore[attr-defined]
                table[id(whole)] = substitute(whole.detach(), velocity.to(whole.dtype))
                present.append(whole)

    def release(*_: Any) -> None:
        for whole in present:
            table.pop(id(whole), None)
        present.clear()

    return gather, release


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
