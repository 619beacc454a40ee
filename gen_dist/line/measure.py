"""One measurement by all ranks together: each looks at its own slice, and one reduction joins them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gen_dist import parallel as sharding
from gen_dist.direction.optimizer import Direction
from gen_dist.line.estimators import Estimator, Quadratic
from gen_dist.line.line import Line
from gen_dist.parallel import Layout, Ranks
from gen_dist.parallel.gradients import dense

__all__ = [
    "Measurement",
    "Request",
    "check_alike",
    "losses_together",
    "measure",
    "raise_together",
    "reduce",
]


class Request(NamedTuple):
    """How to measure. The same on all ranks but for `loss` and `weight`, those of this rank."""

    estimator: Estimator
    distance: float  # a rate to probe at
    loss: Tensor | None  # known phi(0), one a batch
    weight: float  # this rank's share
    gradients_finite: bool
    norms: bool  # whether |theta| and |d| are wanted
    settings: str  # of the user, in words


class Measurement(NamedTuple):
    """What all ranks know after the reduction, the same on each.

    The errors are standard errors over the slices, which are all batches of all ranks; NaN where there is one alone.
    `weight_norm` is `|theta|` and `direction_norm` is `|d|`, over the parameters that move; 0 where not asked for.
    `noise` is the part of `g.d` that is noise (see signal.py), NaN where not asked for.
    """

    parabola: Quadratic
    g_dot_d: float
    gradients_finite: bool
    slope_error: float = math.nan
    curvature_error: float = math.nan
    weight_norm: float = 0.0
    direction_norm: float = 0.0
    noise: float = math.nan


class Reduced(NamedTuple):
    """Lines after the reduction: `means` of what the estimator measured, `(lines, 3)`, and `squares`, the means of
    squared slopes and curvatures, `(lines, 2)`, over slices; `sums` over ranks; and how many `slices` there are, as if
    they were of equal size."""

    means: list[list[float]]
    squares: list[list[float]]
    sums: list[float]
    noise: float
    slices: float
    gradients_finite: bool


def measure(line: Line, ranks: Ranks, request: Request, gradient_noise: float | None = None) -> Measurement:
    """Measure the line, by one all-reduce of 16 numbers. Collective; raises as `reduce` does.

    `gradient_noise`, this rank's, takes a seventeenth.
    """
    products = inner_products(line.layout, line.direction, ranks.size, request.norms).sum(0)
    shares = [] if gradient_noise is None else [gradient_noise]
    found = reduce([line], ranks, request, products, shares)
    g_dot_d, weight_square, direction_square = found.sums[:3]
    means, (slope_square, curvature_square) = found.means[0], found.squares[0]
    bends = request.estimator.slope_and_curvature(torch.tensor(means, dtype=torch.float64), request.distance)
    slope, curvature = bends.tolist()
    return Measurement(
        request.estimator.parabola(means, request.distance, g_dot_d, found.noise),
        g_dot_d,
        found.gradients_finite,
        _standard_error(slope_square - slope**2, found.slices),
        _standard_error(curvature_square - curvature**2, found.slices),
        math.sqrt(weight_square),
        math.sqrt(direction_square),
        found.sums[3] / (found.slices - 1) if shares and found.slices > 1.001 else math.nan,
    )


def reduce(
    lines: Sequence[Line], ranks: Ranks, request: Request, products: Tensor, shares: Sequence[float] = ()
) -> Reduced:
    """Measure lines on the same batches and reduce over the ranks, by one all-reduce. Collective.

    With them go `products`, which are summed over the ranks, and `shares`, which are averaged by weight. Raises on
    every rank what went wrong on any: the error itself there, `RuntimeError` elsewhere, and `ValueError` for settings
    that differ.
    """
    failure: Exception | None = None
    phi = torch.full((len(lines), 1, 3), math.nan, dtype=torch.float64)
    batches, weight, loss = len(lines[0].batches), request.weight, request.loss
    try:
        if request.gradients_finite and batches:
            measured = []
            for line in lines:
                measured.append(request.estimator.measure(line, request.distance, loss))
                loss = measured[-1][:, 0]  # all start at the same point
            phi = torch.stack(measured)
    except Exception as error:
        failure = _told_in_the_reduction(error, lines[0].layout)
    bends = request.estimator.slope_and_curvature(phi, request.distance).square()
    extra = torch.tensor(shares, dtype=torch.float64, device=phi.device)
    own = torch.cat([phi.mean(1).flatten(), bends.mean(1).flatten(), extra])
    # An empty slice may well have a NaN for its mean; and a rank without data cannot know how many batches there are.
    own = own * weight if weight else torch.zeros(len(own), dtype=torch.float64)
    mark = zlib.crc32(request.settings.encode()) % 2**20  # its square, summed, is exact in float64
    seen, noise = batches > 0, max(line.noise for line in lines)
    host = [weight, weight**2 / max(batches, 1), failure is not None, not request.gradients_finite, seen]
    host += [seen * mark, seen * mark**2, seen * noise]
    packed = torch.cat([torch.tensor(host, dtype=torch.float64, device=own.device), own, products.to(own.device)])

    total, squares, failed, not_finite, count, marks, marks2, noise, *rest = ranks.sum(packed).tolist()
    if failed:
        raise _failure(failure, ranks)
    if count * marks2 != marks**2:
        raise _disagreement(ranks.texts(request.settings))
    averages = [value / total if total else math.nan for value in rest[: len(own)]]
    ends = [3 * len(lines), 5 * len(lines)]
    return Reduced(
        [averages[i : i + 3] for i in range(0, ends[0], 3)],
        [averages[i : i + 2] for i in range(ends[0], ends[1], 2)],
        rest[len(own) :] + averages[ends[1] :],
        noise / max(count, 1),
        total**2 / squares if squares else 0.0,
        not not_finite,
    )


def losses_together(line: Line, rates: Sequence[float], ranks: Ranks, weight: float) -> list[float]:
    """`phi` at each rate, over the ranks together, by one all-reduce. Collective; raises as `reduce` does."""
    failure: Exception | None = None
    values = torch.zeros(len(rates), dtype=torch.float64)
    try:
        if line.batches and weight:
            values = line.losses(rates).mean(0) * weight
    except Exception as error:
        failure = _told_in_the_reduction(error, line.layout)
    host = torch.tensor([weight, failure is not None], dtype=torch.float64, device=values.device)
    total, failed, *sums = ranks.sum(torch.cat([host, values])).tolist()
    if failed:
        raise _failure(failure, ranks)
    return [value / total if total else math.nan for value in sums]


def raise_together(failure: Exception | None, ranks: Ranks) -> None:
    """Raise on every rank if there is a failure on any, as `reduce` does. Collective."""
    if ranks.any(torch.tensor(failure is not None)).item():
        raise _failure(failure, ranks)


def check_alike(settings: str, ranks: Ranks) -> None:
    """Raise `ValueError` on every rank unless all say the same. Collective."""
    texts = ranks.texts(settings)
    if len(set(texts)) > 1:
        raise _disagreement([f"{text:.200}" for text in texts])


def inner_products(layout: Layout, direction: Direction, ranks: int, norms: bool) -> Tensor:
    """This rank's part of `g.d`, `|theta|^2` and `|d|^2` of each group, shape `(groups, 3)`, at least one row.

    Sums over ranks count every parameter once.
    """
    rows = [torch.zeros(3, dtype=torch.float64)] if not direction else []
    for _, ratio, parameters, updates in direction:
        parts = [torch.zeros(3, dtype=torch.float64)]
        for parameter, update in zip(parameters, updates, strict=True):
            gradient = dense(sharding.local(parameter.grad))  # type: ignore[arg-type]
            weight = sharding.local(parameter.detach())
            g, w, d = gradient.flatten(), weight.flatten(), update.flatten()
            product = _dot(g, d) * ratio
            none = torch.zeros_like(product)
            sizes = [_dot(w, w), _dot(d, d) * ratio**2] if norms else [none, none]
            parts.append(torch.stack([product, *sizes]).double() / layout.replicas(parameter, ranks))
        rows.append(torch.stack([part.to(parts[-1].device) for part in parts]).sum(0))
    return torch.stack([row.to(rows[-1].device) for row in rows])


def _standard_error(variance: float, count: float) -> float:
    """Of a mean of `count` values of this variance, with the bias of a small sample taken out."""
    return math.sqrt(max(variance, 0.0) / (count - 1)) if count > 1.001 else math.nan


def _disagreement(texts: Sequence[str]) -> ValueError:
    said = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts))
    return ValueError(f"the ranks disagree on settings, which must be the same: {said}")


def _told_in_the_reduction(error: Exception, layout: Layout) -> Exception:
    """The error, to go on with; raised where the others wait in a gather, and would take a reduction for it."""
    if layout.forward_communicates:
        raise error
    return error


def _failure(here: Exception | None, ranks: Ranks) -> Exception:
    """What to raise when a rank failed: its own error there, and who it was elsewhere."""
    texts = ranks.texts(f"{type(here).__name__}: {here}" if here is not None else "")
    if here is not None:
        return here
    who = ", ".join(f"rank {rank} ({text})" for rank, text in enumerate(texts) if text)
    return RuntimeError(f"the loss could not be evaluated on {who}")


def _dot(a: Tensor, b: Tensor) -> Tensor:
    half = a.dtype in (torch.float16, torch.bfloat16)
    return torch.dot(a.float(), b.float()) if half else torch.dot(a, b)
