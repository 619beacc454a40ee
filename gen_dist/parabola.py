"""What all ranks know about the loss along the direction after one reduction: plain numbers, no torch.

The letters are those of the paper (Bu & Xu, ICLR 2025, arXiv 2407.02772). For the update direction `d`,

    phi(a) = L(theta - a d)  ~  loss - numerator a + denominator a^2 / 2
    numerator = g.d = -phi'(0)        denominator = d'Hd = phi''(0)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["GroupParabola", "Parabola"]


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


class GroupParabola(NamedTuple):
    """The loss to second order in K rates, one for each parameter group: `L - b.eta + eta'A eta / 2`.

    Attributes:
        loss: `L`, the mean over the ranks.
        numerators: `b_k = g.d_k`.
        denominators: `A_ij = d_i'H d_j`; 0 off the diagonal where only the diagonal was measured.
        rounding: a denominator this close to zero is rounding.
        gradient_numerators: `b` again, from the gradients.
        weight_norms, direction_norms: of each group; 0 where not measured.
        gradients_finite: whether all gradients of all ranks are finite.
    """

    loss: float
    numerators: list[float]
    denominators: list[list[float]]
    rounding: float
    gradient_numerators: list[float]
    weight_norms: list[float]
    direction_norms: list[float]
    gradients_finite: bool

    def along(self, ratios: Sequence[float]) -> Parabola:
        """The parabola on which the groups' rates keep these ratios.

        >>> plane = GroupParabola(1.0, [2.0, 1.0], [[4.0, 1.0], [1.0, 2.0]], 0.0, [2.0, 1.0], [1, 1], [1, 1], True)
        >>> plane.along([1.0, 0.5])[:3]
        (1.0, 2.5, 5.5)
        """
        rows = [_dot(row, ratios) for row in self.denominators]
        steps = [ratio * norm for ratio, norm in zip(ratios, self.direction_norms, strict=True)]
        return Parabola(
            self.loss,
            _dot(self.numerators, ratios),
            _dot(rows, ratios),
            rounding=self.rounding * _dot(ratios, ratios),
            gradient_numerator=_dot(self.gradient_numerators, ratios),
            gradients_finite=self.gradients_finite,
            weight_norm=math.hypot(*self.weight_norms),
            direction_norm=math.hypot(*steps),
        )


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))
