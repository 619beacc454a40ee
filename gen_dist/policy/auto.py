"""`Auto`, the rule behind `AutoGen`: a rate that needs no tuning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from gen_dist.parabola import Parabola
from gen_dist.policy.rule import (
    ACCEPTED,
    CLAMPED,
    FLAT,
    NO_DESCENT,
    NOT_FINITE,
    PROMISE_BROKEN,
    Clamp,
    why_no_minimum,
)
from gen_dist.policy.state import State

__all__ = ["Auto", "AutoMemory"]


class AutoMemory(NamedTuple):
    """What `Auto` remembers between updates.

    Attributes:
        numerator, denominator: averages of `g.d` and `d'Hd`.
        settled: how many updates the ratio or the cap has limited the rate at.
        started: whether the rate has started from the size of the weights; until then every step is an update.
        age: the number of steps up to the last update.
        reach: the rate times the square root of the age when the rate settled; 0 before.
        first_loss: the loss at the start.
        promised: the fall of the loss that slopes and rates have promised since the start.
        promise: the fall that they promise for each step at the present rate.
        from_zero: whether the weights were zero at the start, and so have no size to measure steps by.
    """

    numerator: float = 0.0
    denominator: float = 0.0
    settled: int = 0
    started: bool = False
    age: int = 0
    reach: float = 0.0
    first_loss: float = 0.0
    promised: float = 0.0
    promise: float = 0.0
    from_zero: bool = False

    @property
    def minimum(self) -> float:
        """The ratio of the averages; infinite where the denominator is so small that its average underflows."""
        return self.numerator / self.denominator if self.denominator > 0 else math.inf


@dataclass(frozen=True)
class Auto:
    """A rate that grows until the ratio limits it, and from then on only falls.

    The raw ratio runs away in training: on the batch that made the gradient it is a multiple of the present rate,
    whatever that is. Therefore:

    * numerator and denominator are averaged (`smoothing`), and their averages divided;
    * the rate starts small relative to the weights: its first step moves the share `start` of `|theta|`;
    * it grows by at most `growth` a step, and a step never moves more than the share `cap` of `|theta|`;
    * once ratio or cap have limited it `settle_after` times, it grows no more, and one in `settled_stride` updates is
      enough;
    * it also stops growing where the loss has fallen by less than the share `trust` of what slopes and rates promised,
      as in a trust region. Without this a pretrained model can be spoiled;
    * an update at which the direction does not descend multiplies it by `shrink`. Where noise outweighs the slope, such
      updates become frequent (Pflug's test of stationarity, 1990), so long runs have a falling rate without a horizon.
      A settled rate falls no faster than one over the square root of the number of steps, since chance alone would
      otherwise take it to zero.

    Weights that are all zero have no size to start from. For them the rate of "a step as large as the weights" is the
    minimum of the parabola, or, where the loss does not curve upwards, `loss / (g.d)`, the step that would take the
    loss to zero (Polyak). The initial rate of the optimizer plays no part in either case.

    With `total_steps` the rate is also multiplied by a decay to zero (`decay`: `"linear"` or `"cosine"`), after
    `warmup_steps` of linear rise.

    Raises `ValueError` for values that do not fit together.
    """

    smoothing: float = 0.9
    growth: float = 1.09
    start: float = 5e-4
    cap: float = 0.1
    settle_after: int = 3
    shrink: float = 0.75
    settled_stride: int = 2
    trust: float = 0.1
    total_steps: int | None = None
    decay: str = "linear"
    warmup_steps: int = 0

    needs_norms = True

    def __post_init__(self) -> None:
        if not (0 <= self.smoothing < 1 and self.growth >= 1 and 0 < self.shrink <= 1):
            raise ValueError(f"need 0 <= smoothing < 1, growth >= 1 and 0 < shrink <= 1, got {self}")
        if not (isinstance(self.settled_stride, int) and self.settled_stride >= 1):
            raise ValueError(f"settled_stride must be a whole number of updates, got {self.settled_stride!r}")
        if not self.trust < 1:
            raise ValueError(f"need trust < 1, a share of the promised fall, got {self.trust!r}")
        if not 0 < self.start <= self.cap:
            raise ValueError(f"need 0 < start <= cap, got start={self.start}, cap={self.cap}")
        if self.decay not in ("linear", "cosine"):
            raise ValueError(f"decay must be 'linear' or 'cosine', got {self.decay!r}")
        if self.total_steps is not None and not self.total_steps > self.warmup_steps >= 0:
            raise ValueError(f"need total_steps > warmup_steps >= 0, got {self.total_steps} and {self.warmup_steps}")

    def begin(self, rate: float) -> State:
        return State(rate, memory=AutoMemory())

    def decide(self, state: State, parabola: Parabola, steps: int, clamp: Clamp) -> State:
        memory: AutoMemory = state.memory
        reason = why_no_minimum(parabola)
        memory = memory._replace(from_zero=memory.from_zero or (not memory.started and parabola.weight_norm == 0))
        whole_step = self._whole_step(memory, parabola)
        if reason in (NOT_FINITE, FLAT) or whole_step is None:
            return state._replace(rate=clamp.of(state.rate), reason=reason or NOT_FINITE)

        last = state.rate if memory.started else self.start * whole_step
        memory = self._aged(memory, parabola.loss, steps)
        cap = self.cap * whole_step
        limit = last * self.growth**steps if memory.settled < self.settle_after else last
        if self._overshot(memory, parabola.loss):
            memory = memory._replace(settled=self.settle_after)
            best, reason = last * self.shrink, PROMISE_BROKEN
        elif reason == NO_DESCENT:
            best = max(last * self.shrink, min(last, memory.reach / math.sqrt(memory.age)))
        else:  # where no curvature is seen the rate grows, within its limits
            best = cap
            if reason is None:
                memory = self._averaged(memory, parabola)
                best = min(memory.minimum, cap)
            if best < limit:
                memory = memory._replace(settled=memory.settled + 1)
            best = min(best, limit)
        rate = clamp.of(best)
        if memory.settled >= self.settle_after and not memory.reach:
            memory = memory._replace(reach=rate * math.sqrt(memory.age))
        memory = memory._replace(promise=max(parabola.numerator * rate / 2, 0.0))
        return state._replace(rate=rate, reason=reason or (ACCEPTED if rate == best else CLAMPED), memory=memory)

    def is_due(self, state: State, update_every: int) -> bool:
        memory: AutoMemory = state.memory
        stride = self.settled_stride if memory.settled >= self.settle_after else 1
        return not memory.started or state.step % (update_every * stride) == 0

    def factor(self, step: int) -> float:
        rise = min(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.total_steps is None:
            return rise
        done = min(max(step - self.warmup_steps, 0) / (self.total_steps - self.warmup_steps), 1.0)
        return rise * (1 - done if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done)))

    def _whole_step(self, memory: AutoMemory, parabola: Parabola) -> float | None:
        """The rate of a step as large as the weights, `|theta| / |d|`; None where nothing tells."""
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

    def _aged(self, memory: AutoMemory, loss: float, steps: int) -> AutoMemory:
        first_loss = memory.first_loss if memory.started else loss
        promised = memory.promised + steps * memory.promise
        return memory._replace(started=True, age=memory.age + steps, first_loss=first_loss, promised=promised)

    def _overshot(self, memory: AutoMemory, loss: float) -> bool:
        """Whether a growing rate has broken its promises, once they are a good part of the loss."""
        growing, matters = memory.settled < self.settle_after, memory.promised > 0.25 * abs(memory.first_loss)
        return growing and matters and memory.first_loss - loss < self.trust * memory.promised

    def _averaged(self, memory: AutoMemory, parabola: Parabola) -> AutoMemory:
        old, new = self.smoothing, 1 - self.smoothing
        return memory._replace(
            numerator=old * memory.numerator + new * parabola.numerator,
            denominator=old * memory.denominator + new * parabola.denominator,
        )
