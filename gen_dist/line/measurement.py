"""One measurement by all ranks together: each looks along the line on its own slice, and one all-reduce joins them.

`L` is the mean of the ranks' losses, weighted by their slices, so what is measured on slices (loss, numerator and
denominator) reduces to a weighted mean. Inner products of what the ranks hold (`g.d` and norms) reduce to a sum over
shards, in which every parameter counts once. Every rank enters the reduction and decides after it, from the reduced
numbers alone.
"""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gen_dist.direction import Direction
from gen_dist.jets import UnsupportedOperation
from gen_dist.line.estimators import Estimator, NeedsForward
from gen_dist.line.line import Line
from gen_dist.parabola import Parabola
from gen_dist.parallel import Layout, Ranks, dense, local
from gen_dist.torch_private import foreach_norm

__all__ = [
    "JointWalk",
    "Measured",
    "Method",
    "check_alike",
    "inner_products",
    "measure",
    "raise_together",
    "walk_over_ranks",
]


class Method(NamedTuple):
    """How to measure, the same on all ranks.

    Attributes:
        estimator: what looks along the line.
        probe: the rate at which finite differences are taken.
        norms: whether `|theta|` and `|d|` are wanted.
        settings: the user's settings in words, which the ranks compare.
    """

    estimator: Estimator
    probe: float
    norms: bool
    settings: str


class Measured(NamedTuple):
    """The parabola, and what else the reduction told.

    Attributes:
        parabola: the loss along the line.
        means: the mean over the ranks of each of the companions' numbers.
        slices: the number of slices. Slices of unequal weight count as fewer: `(sum w)^2 / sum w^2`.
        repeated: whether several closures of this rank gave bitwise the same; it alone may differ between ranks.
    """

    parabola: Parabola
    means: Mapping[str, float]
    slices: float
    repeated: bool = False


def measure(line: Line, ranks: Ranks, method: Method, finite: bool, companions: Mapping[str, float]) -> Measured:
    """Measure the loss along a line. Collective: one all-reduce of 16 numbers, and one more for each companion's.

    `finite` tells whether this rank's gradients are finite. Where those of any rank are not, the parabola is NaN.
    Raises on every rank what went wrong on any: the error itself there, `RuntimeError` elsewhere, and `ValueError` for
    settings that differ; `NeedsForward` where the estimator has a fallback, which may fail in the same way, or not.
    """
    layout, data = line.layout, line.data
    count, weight = len(data.micro_batches), data.weight
    failure: Exception | None = None
    numbers, rounding = torch.full((1, 3), math.nan, dtype=torch.float64), 0.0
    try:
        if finite and count:
            numbers, rounding = method.estimator.measure(line, method.probe, data.loss)
    except Exception as error:
        # Ranks that gather shards run the same model, and so meet an operation that jets do not know together.
        known_to_all = method.estimator.fallback and isinstance(error, UnsupportedOperation)
        failure = error if known_to_all else _kept_for_the_reduction(error, layout)
    # A rank without data cannot know how many micro-batches the others have, and so has no mark to compare.
    has_data, mark = float(count > 0), zlib.crc32(method.settings.encode()) % 2**20  # its square is exact in float64
    here = {
        "weight": weight,
        "weight^2": weight**2 / max(count, 1),
        "failed": float(failure is not None),
        "not finite": float(not finite),
        "with data": has_data,
        "mark": has_data * mark,
        "mark^2": has_data * mark**2,
        "rounding": has_data * rounding,
        **{name: weight * number if weight else 0.0 for name, number in companions.items()},
    }
    # An empty slice may well have a NaN for its mean.
    counted = numbers if weight else torch.zeros_like(numbers)
    of_slices = {"means": counted.mean(0) * weight, "squares": counted[:, 1:].square().mean(0) * weight}
    products = {"products": inner_products(layout, line.direction, ranks.size, method.norms)}
    total, sums = ranks.sum_by_name(here, of_slices | products)
    if total["failed"] and method.estimator.fallback:
        raise NeedsForward(next(filter(None, ranks.texts(getattr(failure, "reason", _said_by(failure)))))) from failure
    if total["failed"]:
        raise _failure(failure, ranks)
    if total["with data"] * total["mark^2"] != total["mark"] ** 2:
        raise _disagreement(ranks.texts(method.settings))

    whole = total["weight"] or math.nan
    parabola = _parabola(
        [mean / whole for mean in sums["means"]],
        [square / whole for square in sums["squares"]],
        (data.sign * sums["products"][0], *sums["products"][1:]),
        slices := total["weight"] ** 2 / total["weight^2"] if total["weight"] else 0.0,
        total["rounding"] / max(total["with data"], 1.0),
        not total["not finite"],
        method,
    )
    repeated = data.has_closures and count > 1 and bool((numbers == numbers[:1]).all())
    return Measured(parabola, {name: total[name] / whole for name in companions}, slices, repeated)


def _parabola(
    means: Sequence[float],
    squares: Sequence[float],
    products: Sequence[float],
    slices: float,
    rounding: float,
    finite: bool,
    method: Method,
) -> Parabola:
    """The parabola, from means over all slices; one probe gets its curvature from the slope of the gradients."""
    loss, numerator, denominator = means
    g_dot_d, weight_square, direction_square = products
    numerator_error, denominator_error = (
        _standard_error(square, mean, slices) for square, mean in zip(squares, means[1:], strict=True)
    )
    of_curvature, h = 0.0, method.probe
    if method.estimator.differences:
        of_curvature = rounding * abs(loss) / (h * h)
    if not method.estimator.gives_slope:  # what is in the numerator's place is the chord
        of_curvature = 2 * of_curvature + 8 * rounding * abs(g_dot_d) / h  # gradients are rounded too
        numerator, denominator = g_dot_d, 2 * (g_dot_d - numerator) / h
    return Parabola(
        loss,
        numerator,
        denominator,
        of_curvature,
        g_dot_d,
        finite,
        numerator_error,
        denominator_error,
        math.sqrt(weight_square),
        math.sqrt(direction_square),
    )


class JointWalk(NamedTuple):
    """`phi` at some rates over all ranks, and by how much rounding may change it, relative to it."""

    losses: list[float]
    rounding: float


def walk_over_ranks(line: Line, rates: Sequence[float], ranks: Ranks) -> JointWalk:
    """Walk the line on all ranks together. Collective: one all-reduce; raises as `measure` does."""
    failure: Exception | None = None
    losses, rounding, weight = torch.zeros(len(rates), dtype=torch.float64), 0.0, line.data.weight
    try:
        if line.data.micro_batches and weight:
            walk = line.walk(rates)
            losses, rounding = walk.losses.mean(0) * weight, walk.rounding
    except Exception as error:
        failure = _kept_for_the_reduction(error, line.layout)
    here = {"weight": weight, "failed": float(failure is not None), "rounding": rounding * weight}
    total, sums = ranks.sum_by_name(here, {"losses": losses})
    if total["failed"]:
        raise _failure(failure, ranks)
    if not total["weight"]:
        return JointWalk([math.nan] * len(rates), 0.0)
    return JointWalk([loss / total["weight"] for loss in sums["losses"]], total["rounding"] / total["weight"])


def inner_products(layout: Layout, direction: Direction, ranks: int, norms: bool) -> Tensor:
    """This rank's part of `g.d`, `|theta|^2` and `|d|^2`, shape `(3,)`, float64.

    A parameter that several ranks hold is divided by their number, so that a sum over ranks counts it once.
    """
    alike: dict[tuple[float, int, torch.dtype, torch.device], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for _, ratio, parameters, updates in direction:
        for parameter, update in zip(parameters, updates, strict=True):
            key = ratio, layout.replicas(parameter, ranks), update.dtype, update.device
            alike[key].append((parameter, update))
    parts = [torch.zeros(3, dtype=torch.float64)]
    for (ratio, replicas, dtype, _), pairs in alike.items():
        products = [_dot(p.grad, update) for p, update in pairs]
        g_dot_d = torch.stack(products).double().sum() * ratio
        sizes = [torch.zeros_like(g_dot_d)] * 2
        if norms:
            wide = torch.promote_types(dtype, torch.float32)
            sides = [local(p.detach()) for p, _ in pairs], [update for _, update in pairs]
            of_weights, of_updates = (
                torch.stack(foreach_norm(side, dtype=wide)).double().square().sum() for side in sides
            )
            sizes = [of_weights, of_updates * ratio**2]
        parts.append(torch.stack([g_dot_d, *sizes]) / replicas)
    return torch.stack([part.to(parts[-1].device) for part in parts]).sum(0)


def _standard_error(square: float, mean: float, count: float) -> float:
    """That of a mean of `count` values, without the bias of a small sample; NaN for a single value."""
    return math.sqrt(max(square - mean * mean, 0.0) / (count - 1)) if count > 1.001 else math.nan


def _dot(gradient: Tensor | None, update: Tensor) -> Tensor:
    """Their product; NaN without a gradient, of a direction held from before."""
    if gradient is None:
        return torch.full((), math.nan, device=update.device)
    g, d = dense(local(gradient)).flatten(), update.flatten()
    return torch.dot(g.float(), d.float()) if g.dtype in (torch.float16, torch.bfloat16) else torch.dot(g, d)


# ------------------------------------------------------------------------------------------ one outcome for all


def raise_together(failure: Exception | None, ranks: Ranks) -> None:
    """Raise on every rank if there is a failure on any, as `measure` does. Collective."""
    if ranks.any(torch.tensor(failure is not None)).item():
        raise _failure(failure, ranks)


def check_alike(settings: str, ranks: Ranks) -> None:
    """Raise `ValueError` on every rank unless all pass the same settings. Collective."""
    texts = ranks.texts(settings)
    if len(set(texts)) > 1:
        raise _disagreement([f"{text:.200}" for text in texts])


def _disagreement(texts: Sequence[str]) -> ValueError:
    said = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts))
    return ValueError(f"the ranks disagree on settings, which must be the same: {said}")


def _kept_for_the_reduction(error: Exception, layout: Layout) -> Exception:
    """The error, which the reduction makes known; raised at once where the other ranks wait in a gather instead."""
    if _comes_from_backward(error):
        explained = ValueError(
            "the closure given to scheduler.step calls backward(), which it must not: it returns the loss alone. Call "
            "backward() before scheduler.step, as in loss = closure(); loss.backward(); scheduler.step(closure=closure)"
        )
        explained.__cause__ = error
        error = explained
    if layout.forward_communicates:
        raise error
    return error


def _failure(here: Exception | None, ranks: Ranks) -> Exception:
    """What to raise when a rank failed: its own error there, and which rank it was elsewhere."""
    texts = ranks.texts(_said_by(here))
    if here is not None:
        return here
    who = ", ".join(f"rank {rank} ({text})" for rank, text in enumerate(texts) if text)
    return RuntimeError(f"the loss could not be evaluated on {who}")


def _said_by(error: Exception | None) -> str:
    return f"{type(error).__name__}: {error}" if error is not None else ""


def _comes_from_backward(error: Exception) -> bool:
    """Whether the error arose in a call of `loss.backward()`."""
    traceback = error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if code is Tensor.backward.__code__:
            return True
        traceback = traceback.tb_next
    return False
