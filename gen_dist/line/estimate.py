"""What an estimator is: a function from a line to three numbers for each micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from torch import Tensor

from gen_dist.line.line import Line

__all__ = ["Estimate", "EstimatorFunction"]


class Estimate(NamedTuple):
    """What this rank measured of a line.

    Attributes:
        numbers: loss, numerator and denominator of each micro-batch, shape `(micro-batches, 3)`, float64.
        rounding: by how much rounding may change a loss that finite differences were taken of, relative to it.
    """

    numbers: Tensor
    rounding: float = 0.0


EstimatorFunction: TypeAlias = Callable[[Line, float, Tensor | None], Estimate]
"""`(line, probe, loss) -> Estimate`: a rate for finite differences, and losses already known, one a micro-batch."""
