"""A rate for each parameter group: the ratios between groups from curvature, the common rate from the rule.

Along K groups' directions the loss is a quadratic in K rates, `L - b.eta + eta'A eta / 2` with `b_k = g.d_k` and
`A_ij = d_i'H d_j`, and has its minimum where `A eta = b` (Hi-DLR, arXiv 2501.06954, takes the diagonal of A). Only the
ratios of the solution are used; on the line that they give, the rule decides as it always does. So the ratio rule
takes the whole solution, and `Auto` keeps its start, cap and growth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gen_dist.direction.optimizer import Direction, GroupDirection
from gen_dist.line.data import Batch
from gen_dist.line.estimators import Quadratic
from gen_dist.line.line import Line
from gen_dist.line.measure import Measurement, Request, inner_products, reduce
from gen_dist.parallel import Layout, Ranks

__all__ = ["GroupHistory", "System", "decide_ratios", "measure_system", "solve"]

Matrix = list[list[float]]


class System(NamedTuple):
    """The quadratic over K groups, the same on all ranks. Off its diagonal `A` is 0 where that was not measured.

    A denominator within `noise` of 0 is rounding.
    """

    loss: float
    numerators: list[float]  # b
    denominators: Matrix  # A
    noise: float
    g_dot_d: list[float]
    weight_norms: list[float]
    direction_norms: list[float]
    gradients_finite: bool

    def along(self, ratios: Sequence[float]) -> Measurement:
        """The line on which the rates of the groups keep these ratios."""
        r = torch.tensor(ratios, dtype=torch.float64)
        b, a = _vector(self.numerators), _vector(self.denominators)
        g, d = _vector(self.g_dot_d), _vector(self.direction_norms)
        return Measurement(
            Quadratic(self.loss, -float(r @ b), float(r @ a @ r), self.noise * float(r @ r)),
            float(r @ g),
            self.gradients_finite,
            weight_norm=math.hypot(*self.weight_norms),
            direction_norm=float((r * d).norm()),
        )


class GroupHistory(NamedTuple):
    """What is remembered between updates: the ratios, the largest of them 1, and averages of `b` and `A`."""

    ratios: list[float]
    numerators: list[float]
    denominators: Matrix

    @classmethod
    def begin(cls, ratios: Sequence[float]) -> GroupHistory:
        zeros = [0.0] * len(ratios)
        return cls(list(ratios), zeros, [zeros] * len(ratios))


def measure_system(
    layout: Layout,
    direction: Direction,
    batches: Sequence[Batch],
    ranks: Ranks,
    request: Request,
    count: int,
    full: bool,
) -> System:
    """Measure the system of all `count` groups, by one all-reduce. Collective; raises as `measurement.reduce` does.

    Off the diagonal by polarisation, `2 d_i'H d_j = q(d_i + d_j) - q(d_i) - q(d_j)`: K (K + 1) / 2 lines, on which
    jets skip what rests. The diagonal alone takes K lines, which is 2 K + 1 forward passes.
    """
    moving = {group.group: group._replace(ratio=1.0) for group in direction}
    groups = [moving.get(k, GroupDirection(k, 1.0, [], [])) for k in range(count)]
    pairs = [(i, j) for j in range(count) for i in range(j)] if full else []
    parts = [[group] for group in groups] + [[groups[i], groups[j]] for i, j in pairs]
    lines = [Line(layout, Direction(part), batches) for part in parts]
    products = inner_products(layout, Direction(groups), ranks.size, request.norms)
    found = reduce(lines, ranks, request, products.flatten())

    dots, weights, directions = _vector(found.sums).view(-1, 3).T.tolist()
    along = dots + [dots[i] + dots[j] for i, j in pairs]
    parabolas = [
        request.estimator.parabola(means, request.distance, dot, found.noise)
        for means, dot in zip(found.means, along, strict=True)
    ]
    bends = [parabola.curvature for parabola in parabolas]
    denominators = [[bends[i] if i == j else 0.0 for j in range(count)] for i in range(count)]
    for (i, j), both in zip(pairs, bends[count:], strict=True):
        denominators[i][j] = denominators[j][i] = (both - bends[i] - bends[j]) / 2
    return System(
        parabolas[0].loss,
        [-parabola.slope for parabola in parabolas[:count]],
        denominators,
        max(parabola.noise for parabola in parabolas[:count]),
        dots,
        [math.sqrt(square) for square in weights],
        [math.sqrt(square) for square in directions],
        found.gradients_finite,
    )


def decide_ratios(system: System, history: GroupHistory, smoothing: float) -> GroupHistory:
    """The ratios after an update, from averages of `b` and `A`; those before where there is no solution."""
    old, new = smoothing, 1 - smoothing
    b = old * _vector(history.numerators) + new * _vector(system.numerators)
    a = old * _vector(history.denominators) + new * _vector(system.denominators)
    if not (b.isfinite().all() and a.isfinite().all()):
        return history
    rates = solve(a, b)
    ratios = history.ratios if rates is None else (rates / rates.max()).tolist()
    return GroupHistory(ratios, b.tolist(), a.tolist())


def solve(a: Tensor, b: Tensor) -> Tensor | None:
    """Positive `eta` with `(A + mu |diag A|) eta = b`, at the smallest `mu` that makes it a minimum.

    `mu` is 0 where `A` is positive definite and all rates come out positive, and grows towards the diagonal's own
    answer, `b_k / |A_kk|`, otherwise. Groups that do not move, with `b_k = A_kk = 0`, keep out of it at the mean of
    the others. None where a direction does not descend or nothing bends.
    """
    bend = a.diagonal().abs()
    moving = (b != 0) | (bend != 0)
    a, b, bend = a[moving][:, moving], b[moving], bend[moving]
    if not len(b) or (b <= 0).any() or (bend <= 0).any():
        return None
    for mu in (0.0, *(4.0**power for power in range(-6, 12))):
        factor, failed = torch.linalg.cholesky_ex(a + mu * bend.diag())
        if not failed and (found := torch.cholesky_solve(b[:, None], factor)[:, 0]).gt(0).all():
            break
    else:
        found = b / bend
    if not found.isfinite().all():
        return None
    rates = torch.full(moving.shape, float(found.mean()), dtype=found.dtype)
    rates[moving] = found
    return rates


def _vector(values: list[float] | Matrix) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
