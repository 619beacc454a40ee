"""What `suggest_lr` returns: a learning rate for the first steps, and how far to trust it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Curve", "Suggestion"]


class Curve(NamedTuple):
    """The true loss `phi` at some learning rates, over all ranks."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True, repr=False)
class Suggestion:
    """A learning rate for the first steps, and how far to trust it. The same on every rank.

    Attributes:
        rate: the learning rate (of the group with the largest), or None if there is none to suggest.
        reason: `accepted`: the parabola's minimum. `clamped`: the same, inside `lr_min` and `lr_max`. Otherwise what
            is wrong with the parabola; the rate is then where the true line is lowest.
        confidence: 1 if the parabola is the true line, 0 if it misses the true line, at half or at twice the step, by
            as much as the fall that it promises. From 0.5 on the parabola decides. None without a parabola.
        misfit_at_half, misfit_at_twice: true loss minus parabola at half and at twice the clamped minimum, as a share
            of that fall.
        loss, slope, curvature: the parabola `loss + slope a + curvature a^2 / 2`.
        minimum: where the parabola is lowest, not clamped; None where it opens downwards or rises.
        lowest: where the true line is lowest, on a grid of 8 points a decade, inside the clamp.
        relative_step: `|lr d| / |theta|`: the share of the weights that a step at `rate` moves.
        signal: the slope on the held-out batches over the slope on the own batch: the share that is not noise. None
            without held-out batches.
        lr_min, lr_max: the clamp.
        scan: the true line over all rates tried, on a logarithmic grid.
        line: the true line from 0 to 2.5 times `rate`.
    """

    rate: float | None
    reason: str
    confidence: float | None
    misfit_at_half: float | None
    misfit_at_twice: float | None
    loss: float
    slope: float
    curvature: float
    minimum: float | None
    lowest: float | None
    relative_step: float | None
    signal: float | None
    lr_min: float
    lr_max: float
    scan: Curve
    line: Curve

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as plain numbers, text and lists, for JSON: a number that is not finite becomes None."""
        return {name: _plain(value) for name, value in vars(self).items()}

    def figure(self) -> Figure:
        """Draw the true line, the parabola, its minimum and the clamp. Raises `ImportError` without matplotlib."""
        from gen_dist.plots import suggestion_figure

        return suggestion_figure(self)

    def __repr__(self) -> str:
        return f"Suggestion(rate={_number(self.rate)}, confidence={_number(self.confidence)}, reason={self.reason!r})"

    def __str__(self) -> str:
        rows = [
            ("learning rate", _number(self.rate)),
            ("reason", self.reason),
            ("confidence", "no parabola" if self.confidence is None else f"{self.confidence:.2f} ({self._misfits()})"),
            ("parabola", f"{self.loss:.5g} {self.slope:+.3g} a {self.curvature / 2:+.3g} a²"),
            ("its minimum", _number(self.minimum)),
            ("lowest true loss", f"at {_number(self.lowest)}"),
        ]
        if self.relative_step is not None:
            rows.append(("one step moves", f"{self.relative_step:.2g} of the weights, |lr d| / |theta|"))
        if self.signal is not None:
            rows.append(("signal", f"{self.signal:.2g} of the slope remains on held-out data"))
        return "\n".join(f"{name:<16}  {value}" for name, value in rows)

    def _misfits(self) -> str:
        return f"off by {_percent(self.misfit_at_half)} at half, {_percent(self.misfit_at_twice)} at twice the step"


def _plain(value: Any) -> Any:
    if isinstance(value, Curve):
        return {name: [_plain(v) for v in values] for name, values in value._asdict().items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None) -> str:
    return "None" if value is None else f"{value:.3g}"


def _percent(share: float | None) -> str:
    return "?" if share is None or not math.isfinite(share) else f"{share:+.0%}"
