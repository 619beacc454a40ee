"""What the integrations share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import nn
from torch.optim import Optimizer

from gen_dist.at_step import RateAtStep
from gen_dist.direction import GenOptimizer
from gen_dist.scheduler import GenScheduler

__all__ = ["RateAtStep", "SchedulerFactory", "unwrapped"]

SchedulerFactory: TypeAlias = Callable[[GenOptimizer, nn.Module], GenScheduler]
"""`gen_dist.ExactGen`, or `functools.partial(gen_dist.ExactGen, lr_max=0.1)`."""


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside a trainer's wrappers."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer
