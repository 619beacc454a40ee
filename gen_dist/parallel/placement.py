"""From a tensor to the part that this rank holds, and back."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from gen_dist.torch_private import local_part as local
from gen_dist.torch_private import with_local_part

if dist.is_available():
    from torch.distributed.tensor import DTensor
else:  # a build of torch for one process
    DTensor = type("DTensor", (), {})  # type: ignore[misc, assignment]

__all__ = ["DTensor", "is_shard", "local", "placed_like", "with_local"]


def placed_like(part: Tensor, parameter: Tensor) -> Tensor:
    """The tensor of which this rank holds `part`, with the shape and placement of `parameter`."""
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


def is_shard(tensor: Tensor) -> bool:
    """Whether the tensor tells by its placement that ranks hold different parts of it."""
    return isinstance(tensor, DTensor) and not all(placement.is_replicate() for placement in tensor.placements)


def with_local(weight: Tensor, part: Tensor) -> Tensor:
    """As `placed_like(part, weight)`, without any operator on the part, which may be a tensor subclass."""
    return with_local_part(weight, part) if isinstance(weight, DTensor) else part
