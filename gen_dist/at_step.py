"""For loops that call `optimizer.step()` themselves: the rate is set when that call arrives at the optimizer.

Loops unscale, clip and accumulate in different places, but all before that call. What they do not give is the batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from gen_dist.line import as_slice, batches_of
from gen_dist.replay import Passes, repeatable
from gen_dist.scheduler import GenScheduler

__all__ = ["RateAtStep"]

logger = logging.getLogger("gen_dist")

Loss = TypeVar("Loss", bound=Callable[..., Any])

IDLE = 3  # steps without a batch that are still nothing to speak of: some make an optimizer's state for a checkpoint


class RateAtStep:
    """Sets the rate when the optimizer is about to step, for trainers whose loop cannot be changed.

    It needs the batches whose gradients are summed. Either tell it each of them:

        rate = gen.RateAtStep(gen.AutoGen(optimizer, model, criterion))
        rate.collect(x, y)  # in the trainer's event for each batch, before or after the backward pass

    or, where only the criterion can be reached, let it see them, and give the trainer that criterion:

        criterion = rate.collect_from(criterion)

    A micro-batch counts if its gradient does: `optimizer.zero_grad()` takes it away, so a step that a `GradScaler`
    leaves out does no harm. A step without batches is left alone. Do not call `scheduler.step` yourself; save and load
    the scheduler, or this object, as you would any other. Evaluate `with rate.averaged():`.

    Most trainers save a scheduler on one rank (`saved_on_one_rank`). Of a sharded model it has only a part of the
    averaged weights: they are not saved then, and begin anew from the weights of the checkpoint.

    Args:
        scheduler: the scheduler that sets the rates. A trainer that wraps its model late may `attach` it later; a
            state loaded before then is kept for it.
    """

    saved_on_one_rank = True
    call = "rate.collect("  # how a call begins, for error messages

    def __init__(self, scheduler: GenScheduler | None = None) -> None:
        self.batches: list[Any] = []
        self._summed = 0  # how many of the first batches have their gradient in `p.grad`
        self._collects = False
        self._idle = 0  # steps in a row that found no batch
        self._state: dict[str, Any] = {}
        self._scheduler: GenScheduler | None = None
        self._passes: Passes | None = None
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

    def detach(self) -> None:
        """Stop setting rates."""
        if self._scheduler is not None:
            self._hook.remove()
            self._scheduler.optimizer.before_zero_grad = None
        if self._passes is not None:
            self._passes.sees = False

    # ------------------------------------------------------------------------------------------------ batches

    def collect(
        self,
        x: Any = None,
        y: Any = None,
        *,
        closure: Callable[[], Tensor] | None = None,
        batches: Sequence[Any] | None = None,
    ) -> None:
        """Add a micro-batch of the coming step: as in `GenScheduler.step`, before or after its backward pass.

        Raises `ValueError` or `TypeError` on a wrong call.
        """
        scheduler, given = self.scheduler, batches_of(x, y, closure, batches, call=self.call)
        as_slice(  # raises
            scheduler.model,
            scheduler.criterion,
            batches=[*self.batches, *given],
            call=self.call,
            compute_loss=scheduler.compute_loss,
        )
        self._watch_gradients()
        grew, waiting = scheduler.optimizer.gradients_grew(), len(self.batches) > self._summed
        if grew:  # by the backward pass of those that were waiting for it, or of this one
            self._summed = len(self.batches)
        self.batches += given
        if grew and not waiting:
            self._summed = len(self.batches)

    def collect_from(self, criterion: Loss) -> Loss:
        """Return a criterion that collects the batches it is called with: give it to the trainer in the other's place.

        A call counts once a backward pass goes through its loss, so validation does not. The criterion must get outputs
        of the scheduler's model, whole or in parts, as they left the model, and return the loss, which may then be
        scaled. It is called with them again, after a forward pass on the same input, under the same autocast. A module
        is returned itself, with a hook. The scheduler needs no criterion of its own.

        Raises `RuntimeError` before there is a scheduler. A call of the criterion with something that was computed from
        the model's output raises `ValueError`.
        """
        if self._passes is None:
            self._passes = Passes(self.scheduler.model)
        self._watch_gradients()
        return repeatable(criterion, self._passes, self._take)

    def _take(self, closure: Callable[[], Tensor]) -> None:
        """Take a micro-batch whose backward pass begins."""
        self.batches.append(closure)
        self._summed = len(self.batches)

    def _watch_gradients(self) -> None:
        self._collects = True
        self.scheduler.optimizer.before_zero_grad = self._before_zero_grad

    def _before_zero_grad(self) -> None:
        """Drop the batches whose gradients are cleared, and keep those that wait for a backward pass."""
        if self.scheduler.optimizer.gradients_grew():
            self._summed = len(self.batches)
        del self.batches[: self._summed]
        self._summed = 0

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is not None:  # it makes the gradients
            with torch.enable_grad():
                closure()
        batches, self.batches, self._summed = self.batches, [], 0
        self._idle = 0 if batches else self._idle + 1
        if self._idle == IDLE:
            logger.warning(
                "optimizer.step() was called %d times without a batch, so the learning rate stays: call "
                "rate.collect(x, y) for each batch, or give the trainer rate.collect_from(criterion) (said once)",
                IDLE,
            )
        if batches and self._passes is not None:
            with self._passes.unseen():
                self.scheduler.step(batches=batches)
        elif batches:
            self.scheduler.step(batches=batches)
        return (optimizer,), {}

    # ----------------------------------------------------------------------------------- the averaged weights

    def averaged(self, batches: Iterable[Any] = ()) -> AbstractContextManager[None]:
        """Put the averaged weights in the model for the block, as `GenScheduler.averaged` does."""
        return self.scheduler.averaged(batches)

    def averaged_state_dict(self, batches: Iterable[Any] = ()) -> dict[str, Tensor]:
        """Return the model's state dict with averaged weights, as `GenScheduler.averaged_state_dict` does."""
        return self.scheduler.averaged_state_dict(batches)

    # ---------------------------------------------------------------------- what a trainer asks of a scheduler

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

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in vars(self).items() if name != "_hook"}
        return {**kept, "_passes": None}  # a criterion goes on with the one that it was made for

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become a copy: PyTorch leaves hooks out of the copy of an optimizer."""
        self.__dict__.update(state)
        if self._scheduler is not None:
            self._hook = self._stepped.register_step_pre_hook(self._before_step)
            if self._collects:
                self._watch_gradients()
