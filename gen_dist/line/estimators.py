"""The estimators of slope and curvature, by the names that users type."""

from __future__ import annotations

from dataclasses import dataclass

from gen_dist.line.by_jets import exact, gauss_newton
from gen_dist.line.by_probes import one_probe, two_probes
from gen_dist.line.estimate import EstimatorFunction

__all__ = ["CURVATURES", "Estimator", "NeedsForward", "estimator"]

CURVATURES = ("auto", "exact", "gauss-newton", "forward")


class NeedsForward(Exception):
    """Raised on all ranks alike where exact curvature cannot be had, and the estimator has a fallback."""


@dataclass(frozen=True)
class Estimator:
    """An estimator and what it can tell.

    Attributes:
        name: `'exact'`, `'gauss-newton'` or `'forward'`.
        measure: the function from a line to three numbers for each micro-batch.
        gives_slope: whether the numerator comes from the line; else it is `g.d` of the gradients.
        takes_closures: whether it works without telling model and criterion apart.
        differences: whether it takes finite differences: then the slope is a mean over the step.
        fallback: the estimator that goes on where this one fails; None where the failure is raised.
    """

    name: str
    measure: EstimatorFunction
    gives_slope: bool = True
    takes_closures: bool = True
    differences: bool = False
    fallback: Estimator | None = None


def estimator(curvature: str, probes: int = 2) -> Estimator:
    """Return the estimator of a name and a number of probes. Raises `ValueError` for other names and numbers."""
    if curvature == "exact":
        return Estimator("exact", exact)
    if curvature == "gauss-newton":
        return Estimator("gauss-newton", gauss_newton, takes_closures=False)
    if curvature == "auto":
        return Estimator("exact", exact, fallback=estimator("forward", probes))
    if curvature != "forward":
        raise ValueError(f"curvature must be one of {', '.join(map(repr, CURVATURES))}, got {curvature!r}")
    if probes not in (1, 2):
        raise ValueError(f"probes must be 1 or 2, got {probes!r}")
    if probes == 1:
        return Estimator("forward", one_probe, gives_slope=False, differences=True)
    return Estimator("forward", two_probes, differences=True)
