"""The policy: from a measured parabola to a learning rate, a pure function."""

from __future__ import annotations

import math
from typing import NamedTuple

from gen_dist.curvature import Quadratic

__all__ = ["ACCEPTED", "CLAMPED", "Decision", "decide"]

ACCEPTED = "accepted"
CLAMPED = "clamped"
NOT_FINITE = "not finite"
SLOPE_NOT_POSITIVE = "the direction does not descend"
CURVATURE_NOT_POSITIVE = "curvature not positive"
CURVATURE_IN_ROUNDING = "curvature within rounding"


class Decision(NamedTuple):
    """The rate to use and why: `accepted`, `clamped`, or the reason for keeping the last accepted one."""

    lr: float
    reason: str


def decide(parabola: Quadratic, last: float, lr_min: float, lr_max: float) -> Decision:
    """The rate at the parabola's minimum, `a* = (g.d) / (d'Hd)`, clamped to `[lr_min, lr_max]` (equation 2.4 of GeN).

    Taken when both are positive and finite; otherwise the last accepted rate is kept, inside the clamp.
    """
    kept = min(max(last, lr_min), lr_max)
    numerator, denominator = -parabola.slope, parabola.curvature
    if not all(map(math.isfinite, parabola)):
        return Decision(kept, NOT_FINITE)
    if abs(denominator) < parabola.noise:  # then the slope of the same probes means little too
        return Decision(kept, CURVATURE_IN_ROUNDING)
    if numerator <= 0:
        return Decision(kept, SLOPE_NOT_POSITIVE)
    if denominator <= 0:
        return Decision(kept, CURVATURE_NOT_POSITIVE)
    best = numerator / denominator  # inf at worst, which the clamp takes
    lr = min(max(best, lr_min), lr_max)
    return Decision(lr, ACCEPTED if lr == best else CLAMPED)
