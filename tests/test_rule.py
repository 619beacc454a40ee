"""The rule: a table of parabolas and what follows from them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gen_dist.curvature import Quadratic
from gen_dist.rule import decide

NAN, INF = math.nan, math.inf

#       slope  curvature  noise  last  lr_min lr_max   rate   reason
TABLE = [
    (-2.0, 4.0, 0.0, 0.1, 0.0, 1.0, 0.5, "accepted"),
    (-2.0, 4.0, 0.0, 0.1, 0.0, 0.2, 0.2, "clamped"),
    (-2.0, 4.0, 0.0, 0.1, 0.7, 1.0, 0.7, "clamped"),
    (-2.0, -4.0, 0.0, 0.1, 0.0, 1.0, 0.1, "curvature not positive"),
    (-2.0, 0.0, 0.0, 0.1, 0.0, 1.0, 0.1, "curvature not positive"),
    (2.0, 4.0, 0.0, 0.1, 0.0, 1.0, 0.1, "the direction does not descend"),
    (0.0, 4.0, 0.0, 0.1, 0.0, 1.0, 0.1, "the direction does not descend"),
    (2.0, -4.0, 0.0, 0.1, 0.0, 1.0, 0.1, "the direction does not descend"),
    (-2.0, 4.0, 5.0, 0.1, 0.0, 1.0, 0.1, "curvature within rounding"),
    (-2.0, -4.0, 5.0, 0.1, 0.0, 1.0, 0.1, "curvature within rounding"),
    (2.0, 4.0, 5.0, 0.1, 0.0, 1.0, 0.1, "curvature within rounding"),
    (-2.0, 0.0, 0.0, 3.0, 0.0, 1.0, 1.0, "curvature not positive"),
    (-2.0, NAN, 0.0, 0.1, 0.0, 1.0, 0.1, "not finite"),
    (NAN, 4.0, 0.0, 0.1, 0.0, 1.0, 0.1, "not finite"),
    (-INF, 4.0, 0.0, 0.1, 0.0, 1.0, 0.1, "not finite"),
    (-1e300, 1e-300, 0.0, 0.1, 0.0, 1.0, 1.0, "clamped"),
]


@pytest.mark.parametrize(("slope", "curvature", "noise", "last", "lr_min", "lr_max", "rate", "reason"), TABLE)
def test_table(
    slope: float, curvature: float, noise: float, last: float, lr_min: float, lr_max: float, rate: float, reason: str
) -> None:
    assert decide(Quadratic(1.0, slope, curvature, noise), last, lr_min, lr_max) == (rate, reason)


numbers = st.floats(allow_nan=True, allow_infinity=True)
rates = st.floats(0, 1e6)


@given(numbers, numbers, numbers, st.floats(0, 1e6), rates, rates, rates)
def test_any_numbers_give_a_rate_inside_the_clamp(
    loss: float, slope: float, curvature: float, noise: float, last: float, a: float, b: float
) -> None:
    lr, _ = decide(Quadratic(loss, slope, curvature, noise), last, min(a, b), max(a, b))
    assert min(a, b) <= lr <= max(a, b)
