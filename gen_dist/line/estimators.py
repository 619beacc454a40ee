"""How curvature is measured: a line in, a parabola `(loss, slope, curvature)` out.

An estimator works in two steps, with the reduction over ranks between them. `measure(line)` gives three numbers for
each of this rank's batches that may be averaged over batches and ranks; `parabola(measured, g_dot_d)` turns the
averages into a `Quadratic`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gen_dist.line.line import Line

__all__ = ["ESTIMATORS", "Estimator", "Exact", "Forward", "GaussNewton", "Quadratic"]


class Quadratic(NamedTuple):
    """`phi(a) ~ loss + slope a + curvature a^2 / 2` for the step `theta - a d`.

    In the paper's terms `slope = -g.d` and `curvature = d'Hd`. A curvature within `noise` of zero is rounding.
    """

    loss: float
    slope: float
    curvature: float
    noise: float = 0.0


class Estimator(Protocol):
    """What a scheduler needs of an estimator."""

    def measure(self, line: Line, distance: float, loss: Tensor | None) -> Tensor:
        """Three float64 numbers a batch, shape `(batches, 3)`; `distance` is a rate to probe at, `loss` holds known
        `phi(0)`, one a batch."""

    def slope_and_curvature(self, measured: Tensor, distance: float) -> Tensor:
        """`(phi', phi'')` of each batch, as far as it tells them: how they differ between batches is their error."""

    def parabola(self, measured: Sequence[float], distance: float, g_dot_d: float, noise: float) -> Quadratic:
        """The parabola, from the numbers averaged over ranks; `noise` is that of the line, relative to the loss."""


class Exact:
    """Slope and curvature by 2-jets: exact, one run of the model at the cost of about five."""

    def measure(self, line: Line, distance: float, loss: Tensor | None) -> Tensor:
        return line.jet()

    def slope_and_curvature(self, measured: Tensor, distance: float) -> Tensor:
        return measured[..., 1:]

    def parabola(self, measured: Sequence[float], distance: float, g_dot_d: float, noise: float) -> Quadratic:
        return Quadratic(*measured)


class GaussNewton(Exact):
    """The curvature without the model's own: never negative where the criterion is convex in the model's output."""

    def measure(self, line: Line, distance: float, loss: Tensor | None) -> Tensor:
        return line.gauss_newton()


class Forward:
    """Finite differences of the loss, by forward passes at a distance of the step actually used.

    Two probes, `phi(h)` and `phi(-h)`, give slope and curvature. One probe, `phi(h)`, gives the curvature with the
    slope `-g.d` of the gradient. Either needs `phi(0)`: the loss of the training step where it is given and the model
    draws no random numbers (dropout), else one more forward pass.
    """

    def __init__(self, probes: int = 2) -> None:
        if probes not in (1, 2):
            raise ValueError(f"probes must be 1 or 2, got {probes!r}")
        self.probes = probes

    def measure(self, line: Line, distance: float, loss: Tensor | None) -> Tensor:
        displaced = [distance, -distance][: self.probes]
        if loss is None or loss.numel() != len(line.batches):
            losses = line.losses([0.0, *displaced])
        else:
            losses = line.losses(displaced)
            here = loss.detach().double().reshape(-1, 1).to(losses.device)
            if line.draws_random_numbers:  # other masks than in the training step: another line
                here = line.losses([0.0])
            losses = torch.cat([here, losses], dim=1)
        return losses if self.probes == 2 else torch.cat([losses, losses[:, 1:]], dim=1)

    def slope_and_curvature(self, measured: Tensor, distance: float) -> Tensor:
        here, ahead, behind = measured.unbind(-1)
        if self.probes == 1:  # the chord to the probe, and nothing of the curvature without the gradient's slope
            return torch.stack([(ahead - here) / distance, torch.full_like(here, torch.nan)], dim=-1)
        slope, curvature = (ahead - behind) / (2 * distance), (ahead - 2 * here + behind) / distance**2
        return torch.stack([slope, curvature], dim=-1)

    def parabola(self, measured: Sequence[float], distance: float, g_dot_d: float, noise: float) -> Quadratic:
        here, ahead, behind = measured
        uncertain = noise * abs(here)
        if self.probes == 1:
            # the gradient's slope is rounded too, and multiplied by the distance
            uncertain = 2 * (uncertain + 4 * noise * distance * abs(g_dot_d))
            curvature = 2 * (ahead - here + distance * g_dot_d) / distance**2
            return Quadratic(here, -g_dot_d, curvature, uncertain / distance**2)
        slope, curvature = (ahead - behind) / (2 * distance), (ahead - 2 * here + behind) / distance**2
        return Quadratic(here, slope, curvature, uncertain / distance**2)


ESTIMATORS = ("exact", "gauss-newton", "forward")


def estimator(curvature: str, probes: int = 2) -> Estimator:
    """The estimator of this name. Raises `ValueError` for a name there is not."""
    if curvature == "exact":
        return Exact()
    if curvature == "gauss-newton":
        return GaussNewton()
    if curvature == "forward":
        return Forward(probes)
    raise ValueError(f"curvature must be one of {', '.join(map(repr, ESTIMATORS))}, got {curvature!r}")
