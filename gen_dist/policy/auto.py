"""`Auto`, the rule behind `AutoGen`: a rate that needs no tuning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from gen_dist.parabola import Parabola
from gen_dist.policy.rule import ACCEPTED, CLAMPED, FLAT, NOT_FINITE, WENT_TOO_FAR, Clamp, why_no_minimum
from gen_dist.policy.state import State

__all__ = ["Auto", "AutoMemory"]

# Growth slows between these shares of the limits.
QUICK_BELOW = 0.01
SLOW_FROM = 0.1


class AutoMemory(NamedTuple):
    """What `Auto` remembers between updates.

    Attributes:
        numerator, denominator, loss: averages of `g.d`, `d'Hd` and the loss, all with the same weights.
        started: whether the rate has started from the size of the weights; until then every step is an update.
        age: the number of steps up to the last update.
        growth: what the rate is multiplied by at each step.
        settled: whether the first growth has ended.
        budget: the rate times the loss, beyond which a settled rate does not grow.
        ceiling: a rate that the rate stays below, since a multiple of it went too far.
        snapshots: the rates at which the run was saved as it grew, to go back to.
        from_zero: whether the weights were zero at the start, and so have no size to measure steps by.
    """

    numerator: float = 0.0
    denominator: float = 0.0
    loss: float = 0.0
    started: bool = False
    age: int = 0
    growth: float = 1.0
    settled: bool = False
    budget: float = math.inf
    ceiling: float = math.inf
    snapshots: tuple[float, ...] = ()
    from_zero: bool = False

    @property
    def minimum(self) -> float:
        """The ratio of the averages, GeN's rate; infinite where no curvature is seen."""
        if self.numerator <= 0:
            return 0.0
        return self.numerator / self.denominator if self.denominator > 0 else math.inf


@dataclass(frozen=True)
class Auto:
    """A rate that grows until it nears the minimum along the direction, or promises much of the loss.

    Two numbers tell how far the rate `r` is. Both are ratios of averages (`smoothing`):

    * `e = r d'Hd / g.d`, the step as a share of the step to the parabola's minimum (GeN);
    * `p = r g.d / L`, the fall that the slope predicts as a share of the loss (Polyak; for losses that can reach 0).

    The rate starts small relative to the weights: its first step moves the share `start` of `|theta|`. It grows by
    `quick` a step while both numbers are far below their limits, and by `growth` from there on, until `e` exceeds
    `edge` or `p` exceeds `share`. From then on it creeps, by `1 + creep / t` at step `t`, while both are below again
    and the rate times the loss stays below its value at the end of growth. It never falls, but for one case:

    where `e` jumps beyond `far`, growth has broken the model. The rule goes back to an earlier snapshot, at half the
    rate that it had, and stays below a quarter of the rate that failed.

    The initial rate of the optimizer plays no part. Raises `ValueError` for values that do not fit together.
    """

    smoothing: float = 0.8
    start: float = 5e-5
    quick: float = 1.25
    growth: float = 1.07
    edge: float = 1.5
    share: float = 0.3
    resume: float = 2 / 3
    creep: float = 2.0
    far: float = 4.0
    settled_stride: int = 2
    total_steps: int | None = None

    needs_norms = True

    def __post_init__(self) -> None:
        if not (0 <= self.smoothing < 1 and 1 <= self.growth <= self.quick):
            raise ValueError(f"need 0 <= smoothing < 1 and 1 <= growth <= quick, got {self}")
        if not (isinstance(self.settled_stride, int) and self.settled_stride >= 1):
            raise ValueError(f"settled_stride must be a whole number of updates, got {self.settled_stride!r}")
        if not (self.start > 0 and 0 < self.resume <= self.edge < self.far and self.share > 0):
            raise ValueError(f"need 0 < start, 0 < share, and 0 < resume <= edge < far, got {self}")

    def begin(self, rate: float) -> State:
        return State(rate, memory=AutoMemory())

    def decide(self, state: State, parabola: Parabola, steps: int, clamp: Clamp) -> State:
        memory: AutoMemory = state.memory
        reason = why_no_minimum(parabola)
        memory = memory._replace(from_zero=memory.from_zero or (not memory.started and parabola.weight_norm == 0))
        whole_step = self._whole_step(memory, parabola)
        if reason in (NOT_FINITE, FLAT) or whole_step is None:
            held = memory._replace(growth=1.0)
            return state._replace(rate=clamp.of(state.rate), reason=reason or NOT_FINITE, memory=held)

        rate = state.rate if memory.started else self.start * whole_step
        memory = self._averaged(memory, parabola)._replace(started=True, age=memory.age + steps)
        of_minimum = rate / memory.minimum if memory.minimum > 0 else 2 * self.edge  # e
        of_loss = rate * memory.numerator / memory.loss if memory.loss > 0 else 0.0  # p
        if of_minimum > self.far and memory.snapshots and memory.minimum > 0:
            return self._back(state, memory, rate, clamp)
        over = of_minimum > self.edge or of_loss > self.share
        if over and not memory.settled:
            memory = memory._replace(settled=True, budget=rate * memory.loss)
        memory = memory._replace(growth=self._growth(memory, rate, of_minimum, of_loss))
        if not memory.settled and (not memory.snapshots or rate >= 2 * memory.snapshots[-1]):
            memory = memory._replace(snapshots=(*memory.snapshots, rate))
        used = clamp.of(rate)
        return state._replace(rate=used, reason=reason or (ACCEPTED if used == rate else CLAMPED), memory=memory)

    def advance(self, state: State, clamp: Clamp) -> State:
        """The state at the next step: between updates the rate grows on."""
        memory: AutoMemory = state.memory
        if memory.started and memory.growth != 1:
            state = state._replace(rate=clamp.of(min(state.rate * memory.growth, memory.ceiling)))
        return state._replace(step=state.step + 1)

    def is_due(self, state: State, update_every: int) -> bool:
        memory: AutoMemory = state.memory
        stride = self.settled_stride if memory.settled else 1
        return not memory.started or state.step % (update_every * stride) == 0

    def factor(self, step: int) -> float:
        return 1.0

    def _growth(self, memory: AutoMemory, rate: float, of_minimum: float, of_loss: float) -> float:
        if not memory.settled:
            near = max(of_minimum / self.edge, of_loss / self.share, QUICK_BELOW)  # the limits are at 1
            slowed = min(math.log(near / QUICK_BELOW) / math.log(SLOW_FROM / QUICK_BELOW), 1.0)
            return self.quick + slowed * (self.growth - self.quick)
        free = of_minimum < self.resume and of_loss < self.share and rate * memory.loss <= memory.budget
        return 1 + self.creep / memory.age if free else 1.0

    def _back(self, state: State, memory: AutoMemory, rate: float, clamp: Clamp) -> State:
        """Growth went too far: to the snapshot before the last two, at half its rate."""
        snapshots = memory.snapshots[: max(1, len(memory.snapshots) - 2)]
        ceiling, rate = min(rate / 4, memory.ceiling), snapshots[-1] / 2
        memory = memory._replace(numerator=0.0, denominator=0.0, loss=0.0)
        memory = memory._replace(settled=True, budget=math.inf, ceiling=ceiling, growth=1.0, snapshots=snapshots)
        return state._replace(rate=clamp.of(rate), reason=WENT_TOO_FAR, memory=memory)

    def _whole_step(self, memory: AutoMemory, parabola: Parabola) -> float | None:
        """The rate of a step as large as the weights, `|theta| / |d|`; None where nothing tells.

        Weights that are all zero have no size. For them it is the minimum of the parabola, or, where the loss does not
        curve upwards, `loss / (g.d)`, the step that would take the loss to zero (Polyak).
        """
        sizes = [parabola.weight_norm / parabola.direction_norm if parabola.direction_norm > 0 else math.nan]
        if memory.from_zero:
            if memory.denominator > 0:
                sizes.append(memory.minimum)
            elif why_no_minimum(parabola) is None:
                sizes.append(parabola.minimum)
            elif parabola.numerator > 0:
                sizes.append(parabola.loss / parabola.numerator)
        largest = max(sizes)
        return largest if 0 < largest < math.inf else None

    def _averaged(self, memory: AutoMemory, parabola: Parabola) -> AutoMemory:
        old, new = self.smoothing, 1 - self.smoothing
        return memory._replace(
            numerator=old * memory.numerator + new * parabola.numerator,
            denominator=old * memory.denominator + new * parabola.denominator,
            loss=old * memory.loss + new * parabola.loss,
        )
