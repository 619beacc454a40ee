"""`Auto`, the rule behind `AutoGen`: a rate that needs no tuning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from gen_dist.parabola import Parabola
from gen_dist.policy.rule import (
    ACCEPTED,
    CLAMPED,
    CURVATURE_IN_ROUNDING,
    CURVATURE_NOT_POSITIVE,
    FLAT,
    NOT_FINITE,
    WENT_TOO_FAR,
    Clamp,
    why_no_minimum,
)
from gen_dist.policy.state import State

__all__ = ["Auto", "AutoMemory"]

REMEMBERED = 3  # updates, of which the median counts: one strange batch decides nothing
FAR_BELOW = 0.01  # of the limits: up to here the rate grows as fast as it may
NEAR = 0.1  # of the limits: from here on it grows slowly, and below it a settled rate may grow again
CREEPING_SHARE = 2.0  # times `share`: the limit of `p` while the rate creeps
LEAST_FALL = 0.5  # of the loss: at least by so much it is taken to fall still
GROWING = 8  # the age over this is the number of steps between updates while the rate grows
SETTLED = 2  # and once it has settled
UNSETTLED_STRIDE = 6  # steps between updates at most, while the rate grows fast
LONGEST_STRIDE = 128
UNSEEN = 3  # steps of quick growth, as much as the rate may grow between two updates
JUMP = 2.0  # of a loss, against the median of those before
DONE = 0.1  # of the first loss: below it, small steps are those of a training that ends, not of a growth that was cut


class AutoMemory(NamedTuple):
    """What `Auto` remembers between updates.

    Attributes:
        curvatures: `d'Hd / g.d` of the last updates, one over GeN's rate; infinite where the direction did not descend.
        slopes: `g.d / F` of the last updates, with the fall `F` that is left (see `Auto`).
        losses: the last losses `L`.
        first_loss: the loss at the first update.
        started: whether the rate has started from the size of the weights; until then every step is an update.
        age: the number of steps up to the last update.
        growth: what the rate is multiplied by at each step.
        settled: whether the first growth has ended.
        budget: the rate times the loss when it ended.
        from_zero: whether the weights were zero at the start, and so have no size to measure steps by.
    """

    curvatures: tuple[float, ...] = ()
    slopes: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()
    first_loss: float = 0.0
    started: bool = False
    age: int = 0
    growth: float = 1.0
    settled: bool = False
    budget: float = math.inf
    from_zero: bool = False


@dataclass(frozen=True)
class Auto:
    """A rate that grows until it nears the minimum along the direction, or promises much of the loss.

    Two numbers tell how far the rate `r` is, each the median over three updates:

    * `e = r d'Hd / g.d`, the step as a share of the step to the parabola's minimum (GeN), with the limit `edge`;
    * `p = r g.d / F`, the fall that the slope promises as a share of the fall that is left (Polyak), with the limit
      `share`. Where the loss can end, nobody knows: it is taken to fall once more by as much as it has fallen since the
      first update, but at least by half of what it is, and at most to zero. Language models, whose losses have a high
      floor, keep `p` small, and there `e` decides.

    The rate starts small relative to the weights: its first step moves the share `start` of `|theta|`. It grows by the
    factor `quick` a step as long as both numbers are below a hundredth of their limits, by `slow` from a tenth on, and
    in between by what lies between. The first time that one of them passes its limit, this growth ends: the rate has
    settled. It goes back to where the limit was passed, as far as the two numbers grow with the rate, but not below
    the rate that the update before has seen. From then on it creeps, by `1 + creep / t` at step `t`, while `e` is below
    its limit, `p` below twice its limit, and the rate times the loss not larger than when it settled. Where both are
    below a tenth of their limits, as after a growth that a few strange batches have ended, it grows again, by at most
    `slow`, unless the loss has already fallen to a tenth of the first one: near its end, steps are small for another
    reason.

    The rate falls in one case: where steps go up the other side of the valley, it is halved. That is where `e` is
    beyond `far`, or where the last update alone is beyond the minimum and its loss is twice the median of those before.
    Then the next step is an update, too, and the rate does not grow before three updates.

    Updates are `update_every` steps apart at first, up to 6 as the rate grows on, and `t / 2` once it has settled
    (`t / 8` while it grows again), but not more than 128.

    With `total_steps` the rate is zero after them, and at the last of them the weights become their average, if one is
    kept. The initial rate of the optimizer plays no part.

    Raises `ValueError` for values that do not fit together.
    """

    start: float = 5e-5
    quick: float = 1.5
    slow: float = 1.07
    edge: float = 0.75
    share: float = 0.2
    creep: float = 0.5
    far: float = 4.0
    total_steps: int | None = None

    needs_norms = True

    def __post_init__(self) -> None:
        if not (self.start > 0 and 1 <= self.slow <= self.quick and self.creep >= 0):
            raise ValueError(f"need start > 0, 1 <= slow <= quick and creep >= 0, got {self}")
        if not (0 < self.edge < self.far and self.share > 0):
            raise ValueError(f"need 0 < edge < far and share > 0, got {self}")
        if self.total_steps is not None and not self.total_steps >= 1:
            raise ValueError(f"total_steps must be a number of steps, 1 or more, got {self.total_steps!r}")

    def begin(self, rate: float) -> State:
        return State(rate, memory=AutoMemory())

    def decide(self, state: State, parabola: Parabola, steps: int, clamp: Clamp) -> State:
        memory: AutoMemory = state.memory
        reason = why_no_minimum(parabola)
        memory = memory._replace(from_zero=memory.from_zero or (not memory.started and parabola.weight_norm == 0))
        whole_step = self._whole_step(memory, parabola)
        if reason in (NOT_FINITE, FLAT) or (whole_step is None and not memory.started):
            memory = memory._replace(growth=1.0)
            return state._replace(rate=clamp.of(state.rate), reason=reason or NOT_FINITE, memory=memory)

        rate = state.rate if memory.started or whole_step is None else self.start * whole_step
        if not memory.started:
            memory = memory._replace(started=True, first_loss=parabola.loss)
        jumped = bool(memory.losses) and parabola.loss > JUMP * median(memory.losses)
        memory = self._with(memory, parabola, reason)._replace(age=memory.age + steps)
        of_minimum = rate * median(memory.curvatures)  # e
        of_loss = rate * median(memory.slopes)  # p
        if self.far < of_minimum < math.inf or (jumped and 1 < rate * memory.curvatures[-1] < math.inf):
            memory = memory._replace(curvatures=(), slopes=(), losses=(), growth=1.0, settled=True)
            return state._replace(rate=clamp.of(rate / 2), reason=WENT_TOO_FAR, memory=memory)
        of_limits = max(of_minimum / self.edge, of_loss / self.share)
        loss = median(memory.losses)
        if of_limits > 1 and not memory.settled:
            rate = max(rate / of_limits, rate / state.memory.growth**steps)  # growth since the last update was a guess
            memory = memory._replace(settled=True, budget=rate * loss)
        free = of_minimum < self.edge and of_loss < CREEPING_SHARE * self.share and rate * loss <= memory.budget
        falls_on = loss > DONE * memory.first_loss
        memory = memory._replace(growth=self._growth(memory, of_limits, free, falls_on))
        unseen = max(steps, self._stride(memory), 1)
        memory = memory._replace(growth=min(memory.growth, self.quick ** (UNSEEN / unseen)))
        used = clamp.of(rate)
        if reason in (None, CURVATURE_NOT_POSITIVE):  # for this rule, no minimum ahead is an answer too
            reason = ACCEPTED if used == rate else CLAMPED
        return state._replace(rate=used, reason=reason, memory=memory)

    def _growth(self, memory: AutoMemory, of_limits: float, free: bool, falls_on: bool) -> float:
        """What the rate is multiplied by at each step, up to the next update."""
        if not memory.settled:
            slowed = math.log(max(of_limits, FAR_BELOW) / FAR_BELOW) / math.log(NEAR / FAR_BELOW)
            return self.quick + min(slowed, 1.0) * (self.slow - self.quick)
        if len(memory.curvatures) < REMEMBERED:  # as after a rate that was halved
            return 1.0
        if of_limits < NEAR and falls_on:
            return min(self.slow, 1 + 3 / memory.age)
        return 1 + self.creep / memory.age if free else 1.0

    def advance(self, state: State, clamp: Clamp) -> State:
        """The state at the next step: between updates the rate grows on."""
        if state.memory.started and state.memory.growth != 1:
            state = state._replace(rate=clamp.of(state.rate * state.memory.growth))
        return state._replace(step=state.step + 1)

    def is_due(self, state: State, update_every: int) -> bool:
        memory: AutoMemory = state.memory
        if not memory.started or state.reason == WENT_TOO_FAR:
            return True
        return state.step + 1 - state.updated >= max(self._stride(memory), update_every)

    def _stride(self, memory: AutoMemory) -> int:
        """The number of steps to the next update; the user's `update_every` may be larger."""
        if not memory.settled:
            return min(memory.age // GROWING, UNSETTLED_STRIDE)
        if len(memory.curvatures) < REMEMBERED:
            return 1
        grows_again = memory.growth > 1 + self.creep / memory.age
        return min(memory.age // (GROWING if grows_again else SETTLED), LONGEST_STRIDE)

    def factor(self, step: int) -> float:
        return 1.0 if self.total_steps is None or step < self.total_steps else 0.0

    def _whole_step(self, memory: AutoMemory, parabola: Parabola) -> float | None:
        """The rate of a step as large as the weights, `|theta| / |d|`; None where nothing tells.

        Weights that are all zero have no size. For them it is the minimum of the parabola, or, where the loss does not
        curve upwards, `loss / (g.d)`, the step that would take the loss to zero (Polyak).
        """
        size = parabola.weight_norm / parabola.direction_norm if parabola.direction_norm > 0 else math.nan
        if memory.from_zero and not memory.started:
            if why_no_minimum(parabola) is None:
                size = parabola.minimum
            elif parabola.numerator > 0:
                size = parabola.loss / parabola.numerator
        return size if 0 < size < math.inf else None

    def _with(self, memory: AutoMemory, parabola: Parabola, reason: str | None) -> AutoMemory:
        """Remember an update. Curvature within rounding is none that matters at this rate."""
        loss, numerator, denominator, *_ = parabola
        curvature = denominator / numerator if numerator > 0 else math.inf
        if reason == CURVATURE_IN_ROUNDING:
            curvature = 0.0
        fall = min(loss, max(memory.first_loss - loss, LEAST_FALL * loss))
        slope = numerator / fall if fall > 0 else 0.0
        return memory._replace(
            curvatures=(*memory.curvatures, curvature)[-REMEMBERED:],
            slopes=(*memory.slopes, slope)[-REMEMBERED:],
            losses=(*memory.losses, loss)[-REMEMBERED:],
        )
