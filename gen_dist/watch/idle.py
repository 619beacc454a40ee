"""Notices a scheduler whose updates come to nothing, and says what to do."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from gen_dist.policy import (
    ACCEPTED,
    CLAMPED,
    CURVATURE_IN_ROUNDING,
    CURVATURE_NOT_POSITIVE,
    FLAT,
    NO_DESCENT,
    NOT_FINITE,
    SHORTENED,
    State,
)
from gen_dist.watch.companion import Companion, Seen

__all__ = ["Idle"]

logger = logging.getLogger("gen_dist")

PATIENCE = 5  # updates in a row that leave the rate where it was
REMEDY = {
    NOT_FINITE: "Look at scheduler.last: the loss, its curvature or the gradients overflow or are NaN. Check the data "
    "and the learning rate; in float16, unscale the gradients first, or train in bfloat16",
    FLAT: "Does the loss that you give to scheduler.step depend on the optimizer's parameters?",
    NO_DESCENT: "Is the loss that you give to scheduler.step the one that you call backward() on, on the same batch? "
    "Otherwise the gradients are mostly noise: larger batches help",
    CURVATURE_NOT_POSITIVE: "Try gen_dist.AutoGen, which grows the rate where the loss does not curve upwards, or "
    "curvature='gauss-newton'",
    CURVATURE_IN_ROUNDING: "Use curvature='exact', or compute the loss in float32",
}


class Idle(Companion):
    """Warns once after some updates in a row that left the rate where it was, with the reason and the remedy."""

    def __init__(self) -> None:
        self.in_a_row = 0
        self.rate: float | None = None
        self.warned = False

    def look(self, seen: Seen, state: State) -> tuple[State, Mapping[str, float]]:
        idle = state.reason not in (ACCEPTED, CLAMPED, SHORTENED) and state.rate == self.rate
        self.in_a_row = self.in_a_row + 1 if idle else 0
        self.rate = state.rate
        if self.in_a_row >= PATIENCE and not self.warned:
            self.warned = True
            remedy = REMEDY.get(state.reason, "See scheduler.last")
            logger.warning(
                "%d updates in a row left the learning rate at %.3g: %s. %s. (said once)",
                self.in_a_row,
                state.rate,
                state.reason,
                remedy,
            )
        return state, {}
