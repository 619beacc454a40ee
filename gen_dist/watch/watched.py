"""What `Watch` saw of a step, as plain numbers."""

from __future__ import annotations

import math
from typing import NamedTuple

from gen_dist.parabola import Parabola

__all__ = ["Watched", "watched"]


class Watched(NamedTuple):
    """What was seen of one step, over all ranks together: plain numbers.

    The line is that of the whole step, so `d` is the step over `lr`. If the groups have different rates, all of them
    are scaled alike along it, and `minimum_over_lr` is the number to read.

    Attributes:
        step: the number of the step, counted from 1.
        lr: the learning rate that the step was made with (of the group with the largest).
        minimum: the rate at the parabola's minimum, `g.d / d'Hd`; None where there is none.
        edge: the edge of stability, `2 g.d / d'Hd`: at larger rates the loss rises along the step. `2 / edge` is the
            directional sharpness.
        numerator, denominator: `g.d` and `d'Hd`.
        loss: the loss before the step.
        reason: why there is no minimum; None where there is one.
        numerator_error, denominator_error: standard errors, from how the slices of ranks and micro-batches differ;
            None where there is one slice.
    """

    step: int
    lr: float
    minimum: float | None
    edge: float | None
    numerator: float
    denominator: float
    loss: float
    reason: str | None = None
    numerator_error: float | None = None
    denominator_error: float | None = None

    @property
    def minimum_over_lr(self) -> float | None:
        """The minimum as a multiple of the present rate: far above 1, the rate is low; below 1/2, the loss rises."""
        return None if self.minimum is None else self.minimum / self.lr

    def numbers(self) -> dict[str, float]:
        """The known numbers by name, for a logger: all but the step and the text.

        >>> Watched(50, 0.1, 0.5, 1.0, 8.0, 16.0, 1.0).numbers()
        {'lr': 0.1, 'minimum': 0.5, 'edge': 1.0, 'numerator': 8.0, 'denominator': 16.0, 'loss': 1.0, \
'minimum_over_lr': 5.0}
        """
        fields = {**self._asdict(), "minimum_over_lr": self.minimum_over_lr}
        return {name: value for name, value in fields.items() if isinstance(value, float)}

    def __str__(self) -> str:
        seen = f"step {self.step}: rate {self.lr:.3g}, "
        if self.minimum is None or self.edge is None:
            seen += f"no minimum along the step ({self.reason})"
        else:
            seen += f"minimum along the step {self.minimum:.3g} ({self.minimum_over_lr:.3g} x the rate), "
            seen += f"edge of stability {self.edge:.3g}"
        return f"{seen}, g.d {self.numerator:.3g}, d'Hd {self.denominator:.3g}, loss {self.loss:.5g}"


def watched(step: int, lr: float, along: Parabola, sign: float, reason: str | None) -> Watched:
    """From the parabola along the step itself, on which 1 is the step, to rates: `d` is the step over the rate."""
    unit = lr or 1.0  # something else than the optimizer may move weights at rate 0
    minimum = unit * along.minimum if reason is None else None
    errors = along.numerator_error / unit, along.denominator_error / unit**2
    return Watched(
        step,
        lr,
        minimum,
        None if minimum is None else 2 * minimum,
        along.numerator / unit,
        along.denominator / unit**2,
        sign * along.loss,
        reason,
        *(None if math.isnan(error) else error for error in errors),
    )
