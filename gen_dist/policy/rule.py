"""The rule: how a measured parabola becomes a rate; `Raw`, the rule of the paper.

A rule is a pure function `State, Parabola -> State`. `update` calls it and does what all rules have in common.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from gen_dist.parabola import Parabola
from gen_dist.policy.state import State

__all__ = ["Clamp", "Raw", "Rule", "update", "why_no_minimum"]

# Why a rate is what it is. The first three: it comes from the update's own measurement.
ACCEPTED = "accepted"
CLAMPED = "clamped"
SHORTENED = "shortened"
NOT_FINITE = "not finite"
NO_DESCENT = "the direction does not descend"
CURVATURE_NOT_POSITIVE = "curvature not positive"
CURVATURE_IN_ROUNDING = "curvature within rounding"
WENT_TOO_FAR = "the rate was beyond the minimum: halved"
OTHER_FUNCTION = "probes see another function than the one trained"
FLAT = "the loss does not change along the direction"


class Clamp(NamedTuple):
    """The interval that every rate lies in."""

    lr_min: float = 0.0
    lr_max: float = math.inf

    def of(self, rate: float) -> float:
        """The rate, or the nearer end of the interval."""
        return min(max(rate, self.lr_min), self.lr_max)

    def check(self) -> None:
        """Raise `ValueError` if no rate lies in the interval."""
        if not 0 <= self.lr_min <= self.lr_max:
            raise ValueError(f"need 0 <= lr_min <= lr_max, got lr_min={self.lr_min!r}, lr_max={self.lr_max!r}")


class Rule(Protocol):
    """What a scheduler asks of a rule."""

    @property
    def needs_norms(self) -> bool:
        """Whether it reads `|theta|` and `|d|`, which cost a pass over the weights."""

    def begin(self, rate: float) -> State:
        """The state before the first update, at the rate that the optimizer has."""

    def decide(self, state: State, parabola: Parabola, steps: int, clamp: Clamp) -> State:
        """The state after an update, `steps` after the one before: a new `rate`, its `reason`, a new `memory`."""

    def advance(self, state: State, clamp: Clamp) -> State:
        """The state at the next step, whose rate may differ where a rule lets it grow between updates."""

    def is_due(self, state: State, update_every: int) -> bool:
        """Whether the present step makes an update."""

    def factor(self, step: int) -> float:
        """What the rate is multiplied by at a step: 0 after a known horizon, else 1."""


def update(rule: Rule, state: State, parabola: Parabola, clamp: Clamp) -> State:
    """One update: the rule decides the rate, and finite differences follow it."""
    number = state.step + 1
    decided = rule.decide(state, parabola, number - state.updated, clamp)
    probe = state.probe
    if decided.reason == CURVATURE_IN_ROUNDING:  # look farther
        probe = min(10 * probe, max(probe, clamp.lr_max))
    elif decided.reason in (ACCEPTED, CLAMPED) and decided.rate > 0:
        probe = decided.rate
    return decided._replace(probe=probe, updated=number)


def why_no_minimum(parabola: Parabola) -> str | None:
    """Why a parabola has no minimum ahead that can be trusted; None if it has one."""
    loss, numerator, denominator, rounding, *_ = parabola
    if not all(map(math.isfinite, (loss, numerator, denominator, rounding))):
        return NOT_FINITE
    if abs(denominator) < rounding:  # then the slope that the same probes give means little too
        return CURVATURE_IN_ROUNDING
    if numerator == denominator == 0:
        return FLAT
    if numerator <= 0:
        return NO_DESCENT
    return CURVATURE_NOT_POSITIVE if denominator <= 0 else None


@dataclass(frozen=True)
class Raw:
    """The rate at the minimum of the parabola, `(g.d) / (d'Hd)`, clamped (equation 2.4 of GeN).

    Numerator and denominator must be finite and positive; otherwise the rate before stays, inside the clamp.
    """

    needs_norms = False

    def begin(self, rate: float) -> State:
        return State(rate)

    def decide(self, state: State, parabola: Parabola, steps: int, clamp: Clamp) -> State:
        reason = why_no_minimum(parabola)
        if reason is not None:
            return state._replace(rate=clamp.of(state.rate), reason=reason)
        best = parabola.minimum  # inf at worst, which the clamp handles
        rate = clamp.of(best)
        return state._replace(rate=rate, reason=ACCEPTED if rate == best else CLAMPED)

    def advance(self, state: State, clamp: Clamp) -> State:
        return state._replace(step=state.step + 1)

    def is_due(self, state: State, update_every: int) -> bool:
        return state.step % update_every == 0

    def factor(self, step: int) -> float:
        return 1.0
