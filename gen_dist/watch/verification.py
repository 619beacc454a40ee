"""Verification: try the step on its own batch, and shorten it while the loss rises."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gen_dist.line import walk_over_ranks
from gen_dist.policy import SHORTENED, State
from gen_dist.watch.companion import Companion, Seen

__all__ = ["Verification"]

RISE = 1e-3  # of the loss, relative, that a verified step may cause
SHORTENINGS = 4  # of one step at most


class Verification(Companion):
    """Tries the step at every so many updates, two forward passes each, and shortens it while the loss rises.

    Reports `change_ratio`, the true change of the loss over the predicted one at the rate that the rule chose. A
    shortened rate stays until the next update, which starts from it.

    Args:
        every: the number of updates from one verification to the next. Raises `ValueError` unless it is 1 or more.
    """

    def __init__(self, every: int = 1) -> None:
        if not (isinstance(every, int) and every >= 1):
            raise ValueError(f"every must be a whole number of updates, 1 or more, got {every!r}")
        self.every = every
        self.updates = 0

    def look(self, seen: Seen, state: State) -> tuple[State, Mapping[str, float]]:
        report: Mapping[str, float] = {}
        if self.updates % self.every == 0:
            state, report = _tried(seen, state)
        self.updates += 1
        return state, report

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.updates = int(state_dict["updates"])

    def __repr__(self) -> str:
        return f"Verification(every={self.every})"


def _tried(seen: Seen, state: State) -> tuple[State, Mapping[str, float]]:
    """Walk the step; the state with a rate at which the loss does not rise, and the ratio to report. Collective."""
    parabola = seen.measured.parabola
    chosen = rate = state.rate * seen.factor
    if not (chosen > 0 and math.isfinite(parabola.loss) and parabola.numerator > 0):
        return state, {}
    change_ratio = math.nan
    for attempt in range(SHORTENINGS + 1):
        here, there = walk_over_ranks(seen.line, [0.0, rate], seen.ranks).losses
        if attempt == 0:
            change_ratio = (there - here) / parabola.change(rate)
        if there - here <= RISE * abs(here):
            break
        # the minimum of the parabola with this slope through both points; at most half the rate
        fall = rate * parabola.numerator
        rate = rate * fall / (2 * (fall + there - here)) if math.isfinite(there) else rate / 10
    if rate != chosen:
        state = state._replace(rate=rate / seen.factor, reason=SHORTENED)
    return state, {"change_ratio": change_ratio}
