"""The policy: from what was measured to a learning rate, by pure functions of plain numbers.

A rule is given a measurement and its own history, and returns a decision and the next history. `Raw` is the rule of the
paper; `Auto` is the recipe behind `AutoGen`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from gen_dist.line.estimators import Quadratic
from gen_dist.line.measure import Measurement

__all__ = ["ACCEPTED", "CLAMPED", "Auto", "Decision", "History", "Raw", "Rule"]

ACCEPTED = "accepted"
CLAMPED = "clamped"
SHORTENED = "shortened"
NOT_FINITE = "not finite"
SLOPE_NOT_POSITIVE = "the direction does not descend"
SLOPE_UNCERTAIN = "slope within its error"
CURVATURE_NOT_POSITIVE = "curvature not positive"
PROMISE_BROKEN = "the loss did not fall as promised"
CURVATURE_IN_ROUNDING = "curvature within rounding"


class Decision(NamedTuple):
    """The rate to use and why: `accepted`, `clamped`, or what was wrong with the measurement."""

    lr: float
    reason: str


class History(NamedTuple):
    """What a rule remembers: the last rate, averages of `g.d` and `d'Hd`, and how often the ratio set the rate.

    Until it has `started`, every step is an update. `age` is the number of steps up to the last update, and `reach`
    the rate times the square root of the age when the rate settled. `promise` is by how much the loss should fall in a
    step at this rate, `promised` the sum since the start, where the loss was `first_loss`.
    """

    rate: float
    numerator: float = 0.0
    denominator: float = 0.0
    settled: int = 0
    started: bool = False
    age: int = 0
    reach: float = 0.0
    first_loss: float = 0.0
    promised: float = 0.0
    promise: float = 0.0


class Rule(Protocol):
    """What a scheduler needs of a rule."""

    @property
    def needs_norms(self) -> bool:
        """Whether it looks at `|theta|` and `|d|`, which cost a pass over the weights."""

    @property
    def smoothing(self) -> float:
        """The weight of the past in averages of what was measured, 0 for none."""

    def begin(self, rate: float) -> History:
        """The history before the first update, at the rate that the optimizer was given."""

    def decide(
        self, seen: Measurement, history: History, steps: int, lr_min: float, lr_max: float
    ) -> tuple[Decision, History]:
        """The rate after an update, `steps` after the one before."""

    def stride(self, history: History) -> int:
        """Of the steps at which an update would be due, the share that it wants: every how many of them."""

    def factor(self, step: int) -> float:
        """What the rate is multiplied by at a step: a schedule over a known horizon, else 1."""


def whats_wrong(parabola: Quadratic) -> str | None:
    """Why a parabola has no minimum ahead that could be trusted; None if it has."""
    if not all(map(math.isfinite, parabola)):
        return NOT_FINITE
    if abs(parabola.curvature) < parabola.noise:  # then the slope of the same probes means little too
        return CURVATURE_IN_ROUNDING
    if parabola.slope >= 0:
        return SLOPE_NOT_POSITIVE
    return CURVATURE_NOT_POSITIVE if parabola.curvature <= 0 else None


def clamped(rate: float, lr_min: float, lr_max: float) -> float:
    return min(max(rate, lr_min), lr_max)


def check_clamp(lr_min: float, lr_max: float) -> None:
    """Raise `ValueError` for bounds that no rate lies between."""
    if not 0 <= lr_min <= lr_max:
        raise ValueError(f"need 0 <= lr_min <= lr_max, got lr_min={lr_min!r}, lr_max={lr_max!r}")


@dataclass(frozen=True)
class Raw:
    """The rate at the parabola's minimum, `a* = (g.d) / (d'Hd)`, clamped (equation 2.4 of GeN).

    Taken when both are positive and finite; otherwise the last accepted rate is kept, inside the clamp.
    """

    needs_norms = False
    smoothing = 0.0

    def begin(self, rate: float) -> History:
        return History(rate, started=True)

    def decide(
        self, seen: Measurement, history: History, steps: int, lr_min: float, lr_max: float
    ) -> tuple[Decision, History]:
        reason = whats_wrong(seen.parabola)
        if reason is not None:
            kept = clamped(history.rate, lr_min, lr_max)
            return Decision(kept, reason), history._replace(rate=kept)
        best = -seen.parabola.slope / seen.parabola.curvature  # inf at worst, which the clamp takes
        lr = clamped(best, lr_min, lr_max)
        return Decision(lr, ACCEPTED if lr == best else CLAMPED), history._replace(rate=lr)

    def stride(self, history: History) -> int:
        return 1

    def factor(self, step: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Auto:
    """A rate that nobody has to tune: it grows until the ratio holds it, and from then on only falls.

    The raw ratio runs away in training: on the batch that made the gradient it is a multiple of the present rate,
    whatever that is. So the averages of numerator and denominator are divided (`smoothing`), growth is limited
    (`growth` a step), the rate starts and stays small beside the weights (`start` and `cap`, the shares of `|theta|`
    that `|lr d|` may have), and once the ratio or the cap has set it `settle_after` times it may grow no more.
    Averaged weights do the rest. Growth also ends where the loss has not fallen by a share `trust` of what slopes and
    rates promised, as in a trust region; that is when a pretrained model would be spoiled.

    An update at which the direction does not descend multiplies the rate by `shrink`. Where noise has the better of
    the slope, that is where this rate makes no more progress, such updates become frequent (Pflug's test of
    stationarity, 1990), and so long runs have a falling rate without a horizon. A rate that has settled does not fall
    by this faster than one over the square root of the number of steps, as chance alone would else take it to zero.
    From when it has settled, the rule wants one in `settled_stride` updates.

    With `total_steps`, the rate is also multiplied by a schedule down to zero (`decay`: `"linear"` or `"cosine"`),
    after `warmup_steps` up from it. With `weigh_errors`, a slope or curvature within its standard error over the ranks
    counts as unknown; the rates then depend on how many ranks there are.
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
    weigh_errors: bool = False

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

    needs_norms = True

    def begin(self, rate: float) -> History:
        return History(rate)  # it starts where the weights say, not there

    def decide(
        self, seen: Measurement, history: History, steps: int, lr_min: float, lr_max: float
    ) -> tuple[Decision, History]:
        parabola, reason = seen.parabola, self._reason(seen)
        whole_step = seen.weight_norm / seen.direction_norm if seen.direction_norm > 0 else math.nan  # |lr d| = |theta|
        if reason == NOT_FINITE or not 0 < whole_step < math.inf:
            kept = clamped(history.rate, lr_min, lr_max)
            return Decision(kept, NOT_FINITE), history
        last = history.rate if history.started else self.start * whole_step
        history = self._aged(history, parabola.loss, steps)
        cap = self.cap * whole_step
        grown = last * self.growth**steps if history.settled < self.settle_after else last
        if self._overshot(history, parabola.loss):
            history = history._replace(settled=self.settle_after)
            best, reason = last * self.shrink, PROMISE_BROKEN
        elif reason == SLOPE_NOT_POSITIVE:
            best = max(last * self.shrink, min(last, history.reach / math.sqrt(history.age)))
        elif reason == SLOPE_UNCERTAIN:
            best = last
        else:  # with no curvature to be seen go on, within the limits
            best = cap
            if reason is None:
                history = self._averaged(history, parabola)
                best = min(history.numerator / history.denominator, cap)
            if best < grown:
                history = history._replace(settled=history.settled + 1)
            best = min(best, grown)
        lr = clamped(best, lr_min, lr_max)
        if history.settled >= self.settle_after and not history.reach:
            history = history._replace(reach=lr * math.sqrt(history.age))
        reason = reason or (ACCEPTED if lr == best else CLAMPED)
        return Decision(lr, reason), history._replace(rate=lr, promise=max(-parabola.slope * lr / 2, 0.0))

    def stride(self, history: History) -> int:
        return self.settled_stride if history.settled >= self.settle_after else 1

    def factor(self, step: int) -> float:
        rise = min(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.total_steps is None:
            return rise
        done = min(max(step - self.warmup_steps, 0) / (self.total_steps - self.warmup_steps), 1.0)
        return rise * (1 - done if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done)))

    def _aged(self, history: History, loss: float, steps: int) -> History:
        first_loss = history.first_loss if history.started else loss
        promised = history.promised + steps * history.promise
        return history._replace(started=True, age=history.age + steps, first_loss=first_loss, promised=promised)

    def _overshot(self, history: History, loss: float) -> bool:
        """Whether a growing rate has broken its promises, once they are a good part of the loss."""
        growing, matters = history.settled < self.settle_after, history.promised > 0.25 * abs(history.first_loss)
        return growing and matters and history.first_loss - loss < self.trust * history.promised

    def _reason(self, seen: Measurement) -> str | None:
        parabola, reason = seen.parabola, whats_wrong(seen.parabola)
        if self.weigh_errors and reason is None:
            if abs(parabola.slope) <= seen.slope_error:  # a comparison with NaN, an unknown error, is False
                return SLOPE_UNCERTAIN
            if parabola.curvature <= seen.curvature_error:
                return CURVATURE_NOT_POSITIVE
        return reason

    def _averaged(self, history: History, parabola: Quadratic) -> History:
        old, new = self.smoothing, 1 - self.smoothing
        return history._replace(
            numerator=old * history.numerator - new * parabola.slope,
            denominator=old * history.denominator + new * parabola.curvature,
        )
