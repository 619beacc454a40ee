"""Watches a training whose rate something else sets: is it too low, or too high?

The line is that of a step which the script's own optimizer has made, `phi(t) = L(theta - t u)`: `t = 1` is the step.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from gen_dist.direction import Direction, GenOptimizer, GroupDirection, loss_sign
from gen_dist.line import (
    BatchLoss,
    Criterion,
    Estimator,
    Line,
    Method,
    NeedsForward,
    Slice,
    as_slice,
    check_losses,
    estimator,
    measure,
)
from gen_dist.parabola import Parabola
from gen_dist.parallel import Layout
from gen_dist.policy import State, why_no_minimum
from gen_dist.restore import restored_on_exit
from gen_dist.watch.companion import Seen
from gen_dist.watch.made_step import WeightsBefore, any_not_zero
from gen_dist.watch.self_check import SelfCheck
from gen_dist.watch.watched import Watched, watched

__all__ = ["Watch"]

logger = logging.getLogger("gen_dist")

# Finite differences look as far as the step, and farther while rounding may be more than this share of the curvature:
# a step at a rate that is far too low hardly changes the loss.
ROUNDING = 0.1
FARTHER, TIMES = 8, 4
PATIENCE = 100  # steps in a row that move nothing


class Watch:
    """Tells at every so many steps where the minimum along the step is, and where the loss begins to rise.

    Your optimizer and your schedule stay in charge: training is bitwise what it is without. The optimizer may be any,
    also one that `as_gen_optimizer` refuses, and model and ranks any that `GenScheduler` knows.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> weight, x, y = torch.nn.init.ones_(model.weight), torch.ones(1, 1), torch.full((1, 1), 3.0)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> watch = Watch(optimizer, model, torch.nn.functional.mse_loss)
    >>> torch.nn.functional.mse_loss(model(x), y).backward()
    >>> with watch.step(x, y):
    ...     optimizer.step()
    >>> print(watch.last)
    step 1: rate 0.1, minimum along the step 0.5 (5 x the rate), edge of stability 1, g.d 16, d'Hd 32, loss 4

    How to read it: with a rate far below the minimum, training is slower than it need be; above the edge, twice the
    minimum, the loss rises along the step. On the batch that made the gradient, the minimum is farther away than on
    other data, as the step fits the noise of its batch too; another batch given to `step` tells how far it is there.

    `last` holds the last `Watched`, and `history` all of them. Each is logged to "gen_dist" on rank 0, at the level of
    information. `steps` counts the steps; set it where a run goes on.

    Args:
        optimizer: the one whose steps are watched, or several that make one step together.
        model: the model that you train, as you call it: plain, in DDP, or after `fully_shard`.
        criterion: `criterion(model(x), y)` is the loss; not needed for closures, and for batches that are dicts, whose
            loss the model returns: `model(**batch).loss`.
        compute_loss: instead, `compute_loss(model, batch)` is the loss of any batch that `step` gets.
        every: look at the first of every so many steps. A step that moves nothing, as at rate 0 where a warm-up
            begins, is passed over for the next.
        curvature: `'exact'`, `'gauss-newton'`, `'forward'`, or `'auto'`: exact where the model's operators allow it,
            else forward, at the distance of the step or farther.
        process_group: the ranks that train together; by default those of the DDP wrapper, or all.

    A look costs about five forward passes and two small all-reduces, the first one a training step more, and the
    memory of two copies of this rank's weights; by forward passes, three. Steps between looks cost nothing. Raises
    `TypeError` or `ValueError` for arguments that do not fit, and says which do.
    """

    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        model: nn.Module,
        criterion: Criterion | None = None,
        *,
        every: int = 50,
        curvature: str = "auto",
        process_group: ProcessGroup | None = None,
        compute_loss: BatchLoss | None = None,
    ) -> None:
        self.optimizers = [*optimizer] if isinstance(optimizer, list | tuple) else [cast(Optimizer, optimizer)]
        self.model, self.every, self.curvature = model, every, curvature
        self.criterion, self.compute_loss = criterion, compute_loss
        _check_arguments(self.optimizers, model, every)
        check_losses(criterion, compute_loss)
        self.layout = Layout(model)
        self.ranks = self.layout.ranks(process_group)
        self.steps = 0
        self.history: list[Watched] = []
        self._due = 1  # the number of the step to look at next
        self._idle = 0
        self._entered = True  # the block of the last call of `step`
        self._self_check = SelfCheck()
        self._measure_by(estimator(curvature))

    @property
    def last(self) -> Watched | None:
        """What was seen last; None before the first."""
        return self.history[-1] if self.history else None

    def step(
        self,
        x: Any = None,
        y: Any = None,
        *,
        closure: Callable[[], Tensor] | None = None,
        batches: Sequence[Any] | None = None,
        weight: float = 1.0,
    ) -> AbstractContextManager[None]:
        """Watch the step that the block makes: `with watch.step(x, y): optimizer.step()`.

        Args:
            x, y: this rank's slice: `criterion(model(x), y)` is its loss. Or `step(batch)`: a pair, a dict, whose loss
                is `model(**batch).loss`, or whatever `compute_loss(model, batch)` takes. It may be other data than the
                step's own.
            closure: instead, a function that returns this rank's scalar loss, calling the model as it likes.
            batches: instead, a list of batches or closures, whose losses are averaged (gradient accumulation).
            weight: this rank's share where slices are unequal.

        The loss is measured in the precision that the model has outside of autocast; for that of autocast, give a
        closure that enters it. With a gradient scaler the block is `scaler.step(optimizer)`.

        Every rank calls it, at every step. Everything that moves the weights inside the block is part of the step, and
        nothing else belongs there. Raises `ValueError` or `TypeError` on a wrong call. An error in the model or the
        closure is raised on every rank, after the step; under FSDP, whose forward passes communicate, the rank with the
        error raises at once.
        """
        if not self._entered:
            raise ValueError("the last watch.step(...) had no block: type with watch.step(x, y): optimizer.step()")
        sign = loss_sign(self._groups())
        given, call = (x, y, closure, batches, weight), "watch.step("
        data = as_slice(self.model, self.criterion, *given, call=call, sign=sign, compute_loss=self.compute_loss)
        if data.has_closures and not self.estimator.takes_closures:
            raise ValueError(
                f"curvature={self.curvature!r} needs model and criterion apart: type watch.step(x, y), or use "
                "curvature='exact' with closures, dicts and compute_loss"
            )
        self._entered = False
        return self._around(data)

    @contextlib.contextmanager
    def _around(self, data: Slice) -> Iterator[None]:
        self._entered = True
        due = self.steps + 1 >= self._due
        before = WeightsBefore(self._groups()) if due else None
        yield
        self.steps += 1
        if before is not None:
            self._look(data, before)

    @restored_on_exit
    def _look(self, data: Slice, before: WeightsBefore) -> None:
        """Measure along the step that was made, if it moved anything. Collective; decides from numbers over ranks."""
        self.layout.reshard()  # the root of an FSDP model would show its gathered weights
        with before.in_place() as updates:
            line = Line(self.layout, Direction([GroupDirection(0, 1.0, [*updates], [*updates.values()])]), data)
            if not self.ranks.any(any_not_zero([*updates.values()])).item():
                self._note_idle()
                return
            parabola, reason = self._measured(line)
        self._idle, self._due = 0, self.steps + self.every
        self.history.append(watched(self.steps, before.lr, parabola, data.sign, reason))
        if self.ranks.rank == 0:
            logger.info("%s", self.history[-1])

    # ----------------------------------------------------------------------------------- the parts of a look

    def _measured(self, line: Line) -> tuple[Parabola, str | None]:
        """The parabola over all ranks, and why it has no minimum; by the fallback once it is needed. Collective."""
        try:
            return self._measured_once(line)
        except NeedsForward as error:
            failed, reason = self.estimator, error
        assert failed.fallback is not None
        self._measure_by(failed.fallback)
        try:
            found = self._measured_once(line)
        except BaseException:  # it is the model that fails
            self._measure_by(failed)
            raise
        logger.warning("curvature='auto' goes on by forward passes, on all ranks, since %s (said once)", reason)
        return found

    def _measured_once(self, line: Line) -> tuple[Parabola, str | None]:
        settings = f"every={self.every}, curvature={self.curvature!r}, measured_by={self.estimator.name!r}"
        probe = 1.0
        for _ in range(TIMES):
            measured = measure(line, self.ranks, Method(self.estimator, probe, False, settings), True, {})
            if not measured.parabola.rounding > ROUNDING * abs(measured.parabola.denominator):
                break
            probe *= FARTHER
        # The gradients may be those of another batch, or of other weights: they are not compared.
        measured = measured._replace(parabola=measured.parabola._replace(gradient_numerator=math.nan))
        before = State(probe)
        state, _ = self._self_check.look(Seen(line, self.ranks, measured, 1.0, before, probe), before)
        return measured.parabola, state.reason or why_no_minimum(measured.parabola)

    def _measure_by(self, estimator: Estimator) -> None:
        self.estimator = estimator
        optimizer = cast(GenOptimizer, self.optimizers[0])  # which the self-check does not look at
        self._self_check.check(optimizer, self.layout, estimator)

    def _note_idle(self) -> None:
        self._idle += 1
        if self._idle == PATIENCE:
            logger.warning(
                "%d steps in a row moved no weight: does the block of `with watch.step(...)` call optimizer.step()? "
                "(said once)",
                PATIENCE,
            )

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def __repr__(self) -> str:
        return f"Watch(every={self.every}, curvature={self.curvature!r}, steps={self.steps}, last={self.last!r})"


def _check_arguments(optimizers: list[Any], model: Any, every: Any) -> None:
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer or a list of them, got {optimizer!r:.80}")
        if any(p.is_complex() for group in optimizer.param_groups for p in group["params"]):
            raise TypeError("the optimizer has complex parameters, along which no curvature is defined: keep them real")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not (isinstance(every, int) and every >= 1):
        raise ValueError(f"every must be a whole number of steps, 1 or more, got {every!r}")
