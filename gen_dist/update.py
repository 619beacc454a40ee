"""What an update saw and did, as plain numbers: what `scheduler.last` holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from gen_dist.parabola import Parabola
from gen_dist.policy import ACCEPTED, CLAMPED, SHORTENED

__all__ = ["Update", "report"]


class Update(NamedTuple):
    """What an update saw and did, over all ranks together.

    With an optimizer that maximizes, numerator and denominator are those of the negative loss, which falls.

    Attributes:
        lr: the learning rate that was set (of the group with the largest).
        numerator: `g.d = -phi'(0)`.
        denominator: `d'Hd = phi''(0)`.
        loss: `phi(0)`.
        reason: why the rate is what it is.
        numerator_error, denominator_error: standard errors, from how the slices of ranks and micro-batches differ;
            None where there is one slice.
        signal: the share of the numerator that is not noise of this batch's gradient, with `GradientNoise`.
        change_ratio: the true change of the loss by the step over the predicted one, with `Verification`.
    """

    lr: float
    numerator: float
    denominator: float
    loss: float
    reason: str
    numerator_error: float | None = None
    denominator_error: float | None = None
    signal: float | None = None
    change_ratio: float | None = None

    @property
    def accepted(self) -> bool:
        """Whether the rate comes from this update's measurement."""
        return self.reason in (ACCEPTED, CLAMPED, SHORTENED)

    def numbers(self) -> dict[str, float]:
        """The known numbers by name, for a logger: all but the text; `accepted` is 1 or 0.

        >>> Update(0.5, 8.0, 16.0, 1.0, "accepted").numbers()
        {'lr': 0.5, 'numerator': 8.0, 'denominator': 16.0, 'loss': 1.0, 'accepted': 1.0}
        """
        known = {name: value for name, value in self._asdict().items() if isinstance(value, float)}
        return {**known, "accepted": float(self.accepted)}


def report(lr: float, reason: str, parabola: Parabola, found: Mapping[str, float]) -> Update:
    """The report of an update that set the rate `lr`; `found` are fields that companions fill."""
    errors = (parabola.numerator_error, parabola.denominator_error)
    known = (None if math.isnan(error) else error for error in errors)
    return Update(lr, parabola.numerator, parabola.denominator, parabola.loss, reason, *known, **found)
