"""The cross-check: does the slope of the line agree with the slope that the gradients give?"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from gen_dist.policy import State
from gen_dist.watch.companion import Companion, Seen

__all__ = ["CrossCheck"]

logger = logging.getLogger("gen_dist")


class CrossCheck(Companion):
    """Warns once when the two disagree: then the step and the measurement are of different losses.

    Every scheduler whose estimator gives the slope at the start of the line carries it. A slope by finite differences
    is a mean over the step, which may well differ.
    """

    def __init__(self) -> None:
        self.warned = False

    def look(self, seen: Seen, state: State) -> tuple[State, Mapping[str, float]]:
        parabola = seen.measured.parabola
        along, of_gradients = parabola.numerator, parabola.gradient_numerator
        apart = abs(along - of_gradients) > 0.5 * max(abs(along), abs(of_gradients))
        if apart and not self.warned:
            self.warned = True
            logger.warning(
                "the loss falls along the direction at rate %.3g, but the gradients say %.3g (said once). This is "
                "expected if they were clipped, or if the model draws random numbers. Otherwise the gradients are "
                "still scaled (call scaler.unscale_(optimizer) first), or scheduler.step got another batch or another "
                "loss than backward().",
                along,
                of_gradients,
            )
        return state, {}
