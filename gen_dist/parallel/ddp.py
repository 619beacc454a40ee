"""`DistributedDataParallel`: replicas whose wrapper averages the gradients during the backward pass."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gen_dist.parallel.kind import Kind
from gen_dist.torch_private import ddp_is_joining, tree_map_only

__all__ = ["DDP", "wrapper_of"]


class DDP(Kind):
    """Parameters inside `DistributedDataParallel`, which every rank holds whole."""

    averages_gradients = True

    def __init__(self, model: nn.Module) -> None:
        self.wrappers = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
        # DDP leaves out what is frozen when it wraps a model: what is unfrozen later, it never averages
        self.parameters = {id(p) for wrapper in self.wrappers for p in wrapper.parameters() if p.requires_grad}

    def holds(self, tensor: Tensor) -> bool:
        return id(tensor) in self.parameters

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        return self.wrappers[0].process_group if self.wrappers else None

    @property
    def backward_communicates(self) -> bool:
        return bool(self.wrappers)

    def compute_dtypes(self) -> list[torch.dtype | None]:
        policies = [wrapper.mixed_precision for wrapper in self.wrappers]
        return [policy.param_dtype for policy in policies if policy is not None]

    def check_step(self) -> None:
        if any(ddp_is_joining(wrapper) for wrapper in self.wrappers):
            raise ValueError(
                "scheduler.step inside DDP's join(), whose shadow reductions would meet those of the scheduler: leave "
                "join() out. A rank that has run out of data makes a backward pass of zero, (model(x) * 0).sum()."
                "backward() on any x, and calls scheduler.step(weight=0); or give all ranks as many batches"
            )

    def inner_forwards(self) -> dict[nn.Module, Callable[..., Any]]:
        """The modules inside, without broadcasts of buffers or preparations for a backward pass."""
        # with mixed precision it is the wrapper's forward that casts the weights
        return {wrapper: _inner_forward(wrapper) for wrapper in self.wrappers if not wrapper.mixed_precision}


def wrapper_of(model: nn.Module) -> nn.Module | None:
    """The `DistributedDataParallel` around a model, if there is one in this process: the model itself does not know."""
    wrappers = [each for each in gc.get_objects() if issubclass(type(each), DistributedDataParallel)]
    return next((wrapper for wrapper in wrappers if wrapper.module is model), None)


def _inner_forward(wrapper: DistributedDataParallel) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if wrapper.device_ids:  # DDP moves its inputs
            device = torch.device(wrapper.device_type, wrapper.device_ids[0])
            args, kwargs = tree_map_only(Tensor, lambda x: x.to(device), (args, kwargs))
        return wrapper.module(*args, **kwargs)

    return forward
