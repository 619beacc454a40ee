"""One measurement of the line by all ranks together: each looks at its own slice, and one reduction joins them."""

from __future__ import annotations

import math
import zlib
from typing import NamedTuple

import torch
from torch import Tensor

from gen_dist import sharding
from gen_dist.collectives import Ranks
from gen_dist.curvature import Estimator, Quadratic
from gen_dist.line import Line
from gen_dist.optimizer import Direction
from gen_dist.sharding import Layout

__all__ = ["Measurement", "gradients_are_finite", "measure"]


class Measurement(NamedTuple):
    """What all ranks know after the reduction, the same on each.

    `slope_error` and `curvature_error` are standard errors over the ranks' slices, NaN on a single rank.
    `weight_norm` is `|theta|` and `direction_norm` is `|d|`, over the parameters that move; 0 where not asked for.
    """

    parabola: Quadratic
    g_dot_d: float
    gradients_finite: bool
    slope_error: float
    curvature_error: float
    weight_norm: float
    direction_norm: float


def measure(
    line: Line,
    estimator: Estimator,
    ranks: Ranks,
    *,
    distance: float,
    loss: Tensor | None,
    weight: float,
    gradients_finite: bool,
    norms: bool,
    settings: str,
) -> Measurement:
    """Measure the line at `distance` and reduce over the ranks, by one all-reduce of 16 numbers. Collective.

    `weight` is this rank's share and `settings` what must be the same on all ranks. Raises on every rank what went
    wrong on any: the error itself there, `RuntimeError` elsewhere, and `ValueError` for settings that differ.
    """
    failure: Exception | None = None
    phi = torch.full((3,), math.nan, dtype=torch.float64)
    try:
        if gradients_finite and line.batches:
            phi = estimator.measure(line, distance, loss)
    except Exception as error:
        failure = error
    # An empty slice may well have a NaN for its mean; and a rank without data cannot know how many batches there are.
    bends = estimator.slope_and_curvature(phi, distance)
    shares = torch.cat([phi, bends.square()]) * weight if weight else torch.zeros(5, dtype=torch.float64)
    seen, mark = bool(line.batches), zlib.crc32(settings.encode()) % 2**20  # its square, summed, is exact in float64
    host = [weight, weight**2, failure is not None, not gradients_finite, seen, seen * mark, seen * mark**2]
    host.append(seen * line.noise)
    products = _inner_products(line.layout, line.direction, ranks.size, norms)
    packed = torch.cat(
        [torch.tensor(host, dtype=torch.float64, device=shares.device), shares, products.to(shares.device)]
    )

    total, squares, failed, not_finite, count, marks, marks2, noise, *rest = ranks.sum(packed).tolist()
    if failed:
        raise _failure(failure, ranks)
    if count * marks2 != marks**2:
        said = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(ranks.texts(settings)))
        raise ValueError(f"the ranks disagree on the scheduler's settings, which must be the same: {said}")
    *means, slope2, curvature2 = [value / total if total else math.nan for value in rest[:5]]
    g_dot_d, weight_square, direction_square = rest[5:]
    parabola = estimator.parabola(means, distance, g_dot_d, noise / max(count, 1))
    slope, curvature = estimator.slope_and_curvature(torch.tensor(means, dtype=torch.float64), distance).tolist()
    effective = total**2 / squares if squares else 0.0  # the number of slices, if they were of equal size
    return Measurement(
        parabola,
        g_dot_d,
        not not_finite,
        _standard_error(slope2 - slope**2, effective),
        _standard_error(curvature2 - curvature**2, effective),
        math.sqrt(weight_square),
        math.sqrt(direction_square),
    )


def gradients_are_finite(layout: Layout, ranks: Ranks, parameters: list[Tensor]) -> bool:
    """Whether the gradients may enter the optimizer's state: no NaN or infinity in any shard. Collective for shards."""
    gradients = [sharding.local(p.grad) for p in parameters if p.grad is not None]
    bad = torch.tensor(not _all_finite(gradients))
    return not (ranks.any(bad) if layout.gradient_is_sharded(parameters) else bad).item()


def _standard_error(variance: float, count: float) -> float:
    """Of a mean of `count` values of this variance, with the bias of a small sample taken out."""
    return math.sqrt(max(variance, 0.0) / (count - 1)) if count > 1.001 else math.nan


def _failure(here: Exception | None, ranks: Ranks) -> Exception:
    """What to raise when a rank failed: its own error there, and who it was elsewhere."""
    texts = ranks.texts(f"{type(here).__name__}: {here}" if here is not None else "")
    if here is not None:
        return here
    who = ", ".join(f"rank {rank} ({text})" for rank, text in enumerate(texts) if text)
    return RuntimeError(f"the loss could not be evaluated in scheduler.step on {who}")


def _all_finite(tensors: list[Tensor]) -> bool:
    dense = [t.coalesce().values() if t.is_sparse else t for t in tensors]
    if not dense:
        return True
    # The sum of finite numbers is finite but for overflow, and by far the cheapest look at all of them.
    sums = torch.stack([t.sum(dtype=torch.promote_types(t.dtype, torch.float32)).double() for t in dense])
    return bool(torch.isfinite(sums).all()) or all(bool(torch.isfinite(t).all()) for t in dense)


def _inner_products(layout: Layout, direction: Direction, ranks: int, norms: bool) -> Tensor:
    """This rank's part of `g.d`, `|theta|^2` and `|d|^2`, shape `(3,)`: sums over ranks count every parameter once."""
    rows = [torch.zeros(3, dtype=torch.float64)]
    for _, ratio, parameters, updates in direction:
        for parameter, update in zip(parameters, updates, strict=True):
            gradient, weight = sharding.local(parameter.grad), sharding.local(parameter.detach())  # type: ignore[arg-type]
            gradient = gradient.to_dense() if gradient.is_sparse else gradient
            g, w, d = gradient.flatten(), weight.flatten(), update.flatten()
            product = _dot(g, d) * ratio
            none = torch.zeros_like(product)
            sizes = [_dot(w, w), _dot(d, d) * ratio**2] if norms else [none, none]
            row = torch.stack([product, *sizes])
            rows.append(row.double() / layout.replicas(parameter, ranks))
    device = rows[-1].device
    return torch.stack([row.to(device) for row in rows]).sum(0)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    half = a.dtype in (torch.float16, torch.bfloat16)
    return torch.dot(a.float(), b.float()) if half else torch.dot(a, b)
