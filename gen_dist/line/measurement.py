"""One measurement by all ranks together: each looks along the line on its own slice, and one all-reduce joins them.

`L` is the mean of the ranks' losses, weighted by their slices, so what is measured on slices (loss, numerator and
denominator) reduces to a weighted mean. Inner products of what the ranks hold (`g.d` and norms) reduce to a sum over
shards, in which every parameter counts once. Every rank enters the reduction and decides after it, from the reduced
numbers alone.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gen_dist.direction import Direction, GroupDirection
from gen_dist.jets import UnsupportedOperation
from gen_dist.line.estimators import Estimator, NeedsForward
from gen_dist.line.line import Line
from gen_dist.parabola import GroupParabola, Parabola
from gen_dist.parallel import Layout, Ranks, dense, local

__all__ = [
    "JointWalk",
    "Measured",
    "Method",
    "check_alike",
    "inner_products",
    "measure",
    "measure_groups",
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


class MeasuredGroups(NamedTuple):
    """As `Measured`, of all groups."""

    parabola: GroupParabola
    means: Mapping[str, float]
    slices: float
    repeated: bool

    def along(self, ratios: Sequence[float]) -> Measured:
        """The line on which the groups' rates keep these ratios."""
        return Measured(self.parabola.along(ratios), self.means, self.slices, self.repeated)


def measure(line: Line, ranks: Ranks, method: Method, finite: bool, companions: Mapping[str, float]) -> Measured:
    """Measure the loss along a line. Collective: one all-reduce of 16 numbers, and one more for each companion's.

    `finite` tells whether this rank's gradients are finite. Where those of any rank are not, the parabola is NaN.
    Raises on every rank what went wrong on any: the error itself there, `RuntimeError` elsewhere, and `ValueError` for
    settings that differ; `NeedsForward` where the estimator has a fallback, which may fail in the same way, or not.
    """
    products = inner_products(line.layout, line.direction, ranks.size, method.norms).sum(0, keepdim=True)
    joint = _reduce([line], ranks, method, finite, products, companions)
    return Measured(joint.parabola(0, joint.products[0], method), joint.means, joint.slices, joint.repeated)


def measure_groups(
    line: Line, ranks: Ranks, method: Method, finite: bool, companions: Mapping[str, float], count: int, full: bool
) -> MeasuredGroups:
    """Measure the loss along the directions of all `count` groups. Collective, as `measure` is.

    Off the diagonal by polarisation, `2 d_i'H d_j = q(d_i + d_j) - q(d_i) - q(d_j)`: K (K + 1) / 2 lines, on which
    jets skip what does not move. The diagonal alone (`full=False`) takes K lines: 2 K + 1 forward passes.
    """
    moving = {group.group: group._replace(ratio=1.0) for group in line.direction}
    groups = [moving.get(k, GroupDirection(k, 1.0, [], [])) for k in range(count)]
    pairs = [(i, j) for j in range(count) for i in range(j)] if full else []
    parts = [[group] for group in groups] + [[groups[i], groups[j]] for i, j in pairs]
    lines = [Line(line.layout, Direction(part), line.data) for part in parts]
    products = inner_products(line.layout, Direction(groups), ranks.size, method.norms)
    joint = _reduce(lines, ranks, method, finite, products, companions)

    own = [joint.parabola(k, joint.products[k], method) for k in range(count)]
    denominators = [[each.denominator if i == j else 0.0 for j in range(count)] for i, each in enumerate(own)]
    for number, (i, j) in enumerate(pairs, start=count):
        both = joint.parabola(number, joint.products[i].plus(joint.products[j]), method)
        cross = (both.denominator - own[i].denominator - own[j].denominator) / 2
        denominators[i][j] = denominators[j][i] = cross
    parabola = GroupParabola(
        own[0].loss,
        [each.numerator for each in own],
        denominators,
        max(each.rounding for each in own),
        [each.gradient_numerator for each in own],
        [each.weight_norm for each in own],
        [each.direction_norm for each in own],
        own[0].gradients_finite,
    )
    return MeasuredGroups(parabola, joint.means, joint.slices, joint.repeated)


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


class _Products(NamedTuple):
    """Inner products over all ranks: `g.d`, `|theta|^2` and `|d|^2`."""

    g_dot_d: float
    weight_square: float
    direction_square: float

    def plus(self, other: _Products) -> _Products:
        """Those of both directions together, which move different weights."""
        return _Products(*(a + b for a, b in zip(self, other, strict=True)))


class _Joint(NamedTuple):
    """What all ranks know of some lines on the same batches: lists with a number for each line."""

    losses: list[float]
    numerators: list[float]
    denominators: list[float]
    numerator_errors: list[float]
    denominator_errors: list[float]
    products: list[_Products]  # one for each of the directions that were given
    means: Mapping[str, float]
    slices: float
    rounding: float
    gradients_finite: bool
    repeated: bool

    def parabola(self, line: int, products: _Products, method: Method) -> Parabola:
        """The parabola of a line; one probe gets its curvature from the slope of the gradients."""
        loss, numerator, denominator = self.losses[line], self.numerators[line], self.denominators[line]
        rounding, h = 0.0, method.probe
        if method.estimator.differences:
            rounding = self.rounding * abs(loss) / (h * h)
        if not method.estimator.gives_slope:  # what is in the numerator's place is the chord
            rounding = 2 * rounding + 8 * self.rounding * abs(products.g_dot_d) / h  # gradients are rounded too
            numerator, denominator = products.g_dot_d, 2 * (products.g_dot_d - numerator) / h
        return Parabola(
            loss,
            numerator,
            denominator,
            rounding,
            products.g_dot_d,
            self.gradients_finite,
            self.numerator_errors[line],
            self.denominator_errors[line],
            math.sqrt(products.weight_square),
            math.sqrt(products.direction_square),
        )


def _reduce(
    lines: Sequence[Line],
    ranks: Ranks,
    method: Method,
    finite: bool,
    products: Tensor,
    companions: Mapping[str, float],
) -> _Joint:
    """Measure lines on the same batches and reduce over the ranks, by one all-reduce. Collective."""
    layout, data = lines[0].layout, lines[0].data
    count, weight = len(data.micro_batches), data.weight
    failure: Exception | None = None
    numbers, rounding = torch.full((len(lines), 1, 3), math.nan, dtype=torch.float64), 0.0
    try:
        if finite and count:
            numbers, rounding = _estimate(lines, method, data.loss)
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
    if weight == 0:  # an empty slice may well have a NaN for its mean
        numbers = torch.zeros_like(numbers)
    loss, numerator, denominator = numbers.unbind(-1)
    g_dot_d, weight_square, direction_square = products.unbind(-1)
    g_dot_d = data.sign * g_dot_d
    of_lines = {
        "loss": loss.mean(1) * weight,
        "numerator": numerator.mean(1) * weight,
        "denominator": denominator.mean(1) * weight,
        "numerator^2": numerator.square().mean(1) * weight,
        "denominator^2": denominator.square().mean(1) * weight,
    }
    of_shards = {"g.d": g_dot_d, "|theta|^2": weight_square, "|d|^2": direction_square}
    total, sums = ranks.sum_by_name(here, of_lines | of_shards)
    if total["failed"] and method.estimator.fallback:
        raise NeedsForward(next(filter(None, ranks.texts(getattr(failure, "reason", _said_by(failure)))))) from failure
    if total["failed"]:
        raise _failure(failure, ranks)
    if total["with data"] * total["mark^2"] != total["mark"] ** 2:
        raise _disagreement(ranks.texts(method.settings))

    whole = total["weight"] or math.nan
    means = {name: [value / whole for value in sums[name]] for name in of_lines}
    slices = total["weight"] ** 2 / total["weight^2"] if total["weight"] else 0.0
    return _Joint(
        means["loss"],
        means["numerator"],
        means["denominator"],
        _standard_errors(means["numerator^2"], means["numerator"], slices),
        _standard_errors(means["denominator^2"], means["denominator"], slices),
        [_Products(*of_shard) for of_shard in zip(*(sums[name] for name in of_shards), strict=True)],
        {name: total[name] / whole for name in companions},
        slices,
        total["rounding"] / max(total["with data"], 1.0),
        not total["not finite"],
        data.has_closures and count > 1 and bool((numbers == numbers[:, :1]).all()),
    )


def _estimate(lines: Sequence[Line], method: Method, loss: Tensor | None) -> tuple[Tensor, float]:
    """The estimates of all lines, shape `(lines, micro-batches, 3)`, and the largest relative rounding."""
    estimates = []
    for line in lines:
        estimates.append(method.estimator.measure(line, method.probe, loss))
        loss = estimates[-1].numbers[:, 0]  # all lines start at the same point
    return torch.stack([each.numbers for each in estimates]), max(each.rounding for each in estimates)


def inner_products(layout: Layout, direction: Direction, ranks: int, norms: bool) -> Tensor:
    """This rank's part of `g.d`, `|theta|^2` and `|d|^2` of each group, shape `(groups, 3)`, at least one row.

    A parameter that several ranks hold is divided by their number, so that a sum over ranks counts it once.
    """
    rows = [torch.zeros(3, dtype=torch.float64)] if not direction else []
    for _, ratio, parameters, updates in direction:
        parts = [torch.zeros(3, dtype=torch.float64)]
        for parameter, update in zip(parameters, updates, strict=True):
            w, d = local(parameter.detach()).flatten(), update.flatten()
            if parameter.grad is None:  # of a direction held from before
                product = torch.full((), math.nan, dtype=d.dtype, device=d.device)
            else:
                product = _dot(dense(local(parameter.grad)).flatten(), d) * ratio
            none = torch.zeros_like(product)
            sizes = [_dot(w, w), _dot(d, d) * ratio**2] if norms else [none, none]
            parts.append(torch.stack([product, *sizes]).double() / layout.replicas(parameter, ranks))
        rows.append(torch.stack([part.to(parts[-1].device) for part in parts]).sum(0))
    return torch.stack([row.to(rows[-1].device) for row in rows])


def _standard_errors(squares: list[float], means: list[float], count: float) -> list[float]:
    """Those of means of `count` values, without the bias of a small sample; NaN for a single value."""
    if count <= 1.001:
        return [math.nan] * len(means)
    variances = (square - mean * mean for square, mean in zip(squares, means, strict=True))
    return [math.sqrt(max(variance, 0.0) / (count - 1)) for variance in variances]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    half = a.dtype in (torch.float16, torch.bfloat16)
    return torch.dot(a.float(), b.float()) if half else torch.dot(a, b)


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
