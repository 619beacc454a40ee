"""What all ranks know about the loss along the direction after one reduction: plain numbers, no torch.

The letters are those of the paper (Bu & Xu, ICLR 2025, arXiv 2407.02772). For the update direction `d`,

    phi(a) = L(theta - a d)  ~  loss - numerator a + denominator a^2 / 2
    numerator = g.d = -phi'(0)        denominator = d'Hd = phi''(0)
"""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = ["Parabola"]


class Parabola(NamedTuple):
    """The loss along the direction, to second order. Every rank holds the same numbers.

    Attributes:
        loss: `phi(0)`, the mean over the ranks.
        numerator: `g.d`, the slope with its sign turned: positive where the direction descends.
        denominator: `d'Hd`, the curvature.
        rounding: a denominator this close to zero is rounding.
        gradient_numerator: `g.d` again, from the gradients in `p.grad`, as a cross-check.
        gradients_finite: whether all gradients of all ranks are finite.
        numerator_error, denominator_error: standard errors over the slices; NaN where there is one slice.
        weight_norm, direction_norm: `|theta|` and `|d|` over the parameters that move; 0 where not measured.
    """

    loss: float
    numerator: float
    denominator: float
    rounding: float = 0.0
    gradient_numerator: float = math.nan
    gradients_finite: bool = True
    numerator_error: float = math.nan
    denominator_error: float = math.nan
    weight_norm: float = 0.0
    direction_norm: float = 0.0

    @property
    def minimum(self) -> float:
        """The rate at the vertex, `(g.d) / (d'Hd)`; meaningless unless the denominator is positive.

        >>> Parabola(loss=1.0, numerator=2.0, denominator=4.0).minimum
        0.5
        """
        return self.numerator / self.denominator

    def change(self, rate: float) -> float:
        """The change of the loss that a step at this rate makes: negative for a fall.

        >>> Parabola(loss=1.0, numerator=2.0, denominator=4.0).change(0.5)
        -0.5
        """
        return -self.numerator * rate + self.denominator * rate * rate / 2
