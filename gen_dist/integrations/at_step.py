"""What trainers share: when their call of `optimizer.step()` arrives, gradients are summed, unscaled and clipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer

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


class RateAtStep:
    """Collects the batches whose gradients are summed, and sets the rate for them when the optimizer is about to step.

    Trainers unscale, clip and accumulate in different places, but all before the call of `optimizer.step()` arrives at
    the optimizer itself. A step without batches, such as one that creates an optimizer's state for a checkpoint, is
    left alone.

    Trainers wrap the model late, so `attach` may add the scheduler later. A state loaded before then is kept for it.

    Most trainers save a scheduler on one rank (`saved_on_one_rank`). Of a sharded model it has only a part of the
    averaged weights: they are not saved then, and begin anew from the weights of the checkpoint.
    """

    saved_on_one_rank = True

    def __init__(self, scheduler: GenScheduler | None = None) -> None:
        self.batches: list[Any] = []
        self._state: dict[str, Any] = {}
        self._scheduler: GenScheduler | None = None
        if scheduler is not None:
            self.attach(scheduler)

    @property
    def scheduler(self) -> GenScheduler:
        """The scheduler that sets the rates. Raises `RuntimeError` while there is none."""
        if self._scheduler is None:
            raise RuntimeError("there is no scheduler yet: the trainer makes it when training starts")
        return self._scheduler

    @property
    def attached(self) -> bool:
        return self._scheduler is not None

    def attach(self, scheduler: GenScheduler, stepped: Optimizer | None = None) -> None:
        """Let this scheduler set the rates from now on, in the `step` of its optimizer, or of a container of it."""
        self._scheduler = scheduler
        self._stepped = stepped or scheduler.optimizer
        self._hook = self._stepped.register_step_pre_hook(self._before_step)
        if self._state:
            scheduler.load_state_dict(self._state)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_hook"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become a copy: PyTorch leaves hooks out of the copy of an optimizer."""
        self.__dict__.update(state)
        if self._scheduler is not None:
            self._hook = self._stepped.register_step_pre_hook(self._before_step)

    def detach(self) -> None:
        """Stop setting rates."""
        if self._scheduler is not None:
            self._hook.remove()

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is not None:  # it makes the gradients
            with torch.enable_grad():
                closure()
        batches, self.batches = self.batches, []
        if batches:
            self.scheduler.step(batches=batches)
        return (optimizer,), {}

    # ------------------------------------------------------------------------- what a trainer asks of a scheduler

    def get_last_lr(self) -> list[float]:
        """The learning rate of each parameter group."""
        return self.scheduler.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        """Return the scheduler's state, or the state loaded for a scheduler to come."""
        if self._scheduler is None:
            return self._state
        scheduler = self._scheduler
        weights = [p for group in scheduler.optimizer.param_groups for p in group["params"]]
        part = self.saved_on_one_rank and scheduler.layout.gradient_is_sharded(weights)
        return scheduler.state_dict() | ({"average": None} if part else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` returned."""
        self._state = state_dict
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state_dict)
