"""What must be known of a kind of parallelism."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gen_dist.parallel.gathering import Gathering
from gen_dist.parallel.ranks import Ranks

__all__ = ["Kind"]


class Kind:
    """One kind of parallelism, as far as it is present in a model. A subclass answers the questions below for it.

    Those about one tensor go to the first kind that `holds` it. Those about the model go to every kind: one that is not
    present in the model answers as this class does, which is as plain replicas would.
    """

    def __init__(self, model: nn.Module) -> None:
        pass

    # -------------------------------------------------------------------------------------- about one tensor

    averages_gradients = False
    """Whether the kind itself averages the gradients of its parameters over the ranks, during `backward()`."""

    def holds(self, tensor: Tensor) -> bool:
        """Whether the questions about this tensor go to this kind."""
        return False

    def replicas(self, parameter: Tensor, ranks: int) -> int:
        """How many of `ranks` ranks hold the same part of the parameter as this rank does."""
        return ranks

    def holders(self, tensor: Tensor, ranks: Ranks) -> tuple[int, ...]:
        """Those ranks of the group, this one among them, in ascending order."""
        return tuple(range(ranks.size))

    def holders_counting_steps(self, parameter: Tensor, ranks: Ranks) -> tuple[int, ...]:
        """The ranks whose optimizers count the steps of the parameter alike."""
        return self.holders(parameter, ranks)

    # -------------------------------------------------------------------------------------- about the model

    @property
    def shards_have_placement(self) -> bool:
        """Whether a shard tells which part of the whole it is, as a `DTensor` does."""
        return True

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The group of the ranks that train together, if a wrapper of the model names it."""
        return None

    @property
    def forward_communicates(self) -> bool:
        """Whether ranks wait for each other in a forward pass."""
        return False

    @property
    def backward_communicates(self) -> bool:
        """Whether ranks wait for each other in a backward pass."""
        return self.forward_communicates

    def gradient_is_sharded(self, parameters: Sequence[Tensor]) -> bool:
        """Whether ranks hold different parts of the gradient of these parameters."""
        return False

    def compute_dtypes(self) -> list[torch.dtype | None]:
        """The dtypes that mixed precision policies cast weights to; None for a policy that does not."""
        return []

    def inner_forwards(self) -> dict[nn.Module, Callable[..., Any]]:
        """Wrappers, each with a forward pass that runs the module inside without synchronising anything."""
        return {}

    def check_step(self) -> None:
        """Raise `ValueError` where a step of the scheduler cannot work at present."""

    def reshard(self) -> None:
        """Let go of the whole weights that units still hold after a forward pass."""

    def gatherings(self, velocities: Mapping[Tensor, Tensor]) -> list[Gathering]:
        """The modules that hold weights whole only while they run, with the velocities of those weights."""
        return []
