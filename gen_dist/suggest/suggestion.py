"""One call before training that answers "what rate?".

The model, the optimizer and a batch are those of the first training step. Along the direction `d` that the optimizer
would take, `suggest_lr` finds the parabola `phi(a) = L(theta - a d) ~ phi(0) - a g.d + a^2/2 d'Hd`, walks the true
line, and sees how well the two agree.

What the number means. It is the rate that lowers the loss most in *one* step. On the batch that made the gradient, that
is too much: the gradient's noise, too, is worth following there. Give `held_out`, other batches, and the answer is
that of data which the gradient has not seen. For a whole run, one that decays its rate, it is a place to start from.
On five small tasks, three initial weights each, with one batch held out, it was 0.7 to 1.6 times the best rate of a
grid in 11 of 15 cases, 0.2 to 0.3 times in 3, and once, where the gradient was mostly noise (`signal` 0.2), 0.04 times;
on its own batch up to 2.9 times (`tests/benchmarks/suggestions.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import SGD, Optimizer

from gen_dist.direction.optimizer import Direction, direction_without_trace
from gen_dist.line.data import Batch, Criterion, as_batches
from gen_dist.line.estimators import Forward, Quadratic, estimator
from gen_dist.line.line import Line, undisturbed
from gen_dist.line.measure import (
    Measurement,
    Request,
    check_alike,
    losses_together,
    measure,
    raise_together,
)
from gen_dist.parallel import Layout, Ranks
from gen_dist.policy.rule import ACCEPTED, CLAMPED, NOT_FINITE, SLOPE_NOT_POSITIVE, check_clamp, clamped, whats_wrong
from gen_dist.restore import gradients_kept, whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Curve", "Suggestion", "suggest_lr"]

CONFIDENT = 0.5  # from here on the parabola is believed, otherwise the true line
SMALLEST = 1e-5  # of the rates that are tried, where 1 is a step as large as the weights
POINTS_A_DECADE = 8
POINTS = 20  # of the line from 0 to REACH times the rate
REACH = 2.5
FIRST_PROBE = 5e-4  # of a step as large as the weights, for finite differences

DOES_NOT_FIT = "the parabola does not fit"
NO_DESCENT = "the loss does not fall along the direction"


class Curve(NamedTuple):
    """The true loss `phi` at some learning rates, over all ranks."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True, repr=False)
class Suggestion:
    """A learning rate for the first steps, and how far to trust it. The same on every rank.

    Attributes:
        rate: the learning rate (of the group with the largest), or None where there is none to be had.
        reason: `accepted`: the parabola's minimum. `clamped`: the same, inside `lr_min` and `lr_max`. Otherwise what
            was wrong with the parabola, and then the rate is where the true line is lowest.
        confidence: 1 where the parabola is the true line, 0 where it is off, at half or at twice the step, by all of
            the fall of the loss that it promises. From 0.5 on the parabola is believed. None without a parabola.
        misfit_at_half, misfit_at_twice: true loss minus parabola at half and at twice the clamped minimum, as a share
            of that fall.
        loss, slope, curvature: the parabola `loss + slope a + curvature a^2 / 2`.
        minimum: where the parabola is lowest, not clamped; None where it opens downwards or rises.
        lowest: where the true line is lowest, on a grid of 8 points a decade, inside the clamp.
        relative_step: `|lr d| / |theta|`: the share of the weights that a step at `rate` moves.
        signal: the slope on the held-out batches over that on the own batch: the share of it that is not noise. None
            without held-out batches.
        lr_min, lr_max: the clamp.
        scan: the true line over all rates that were tried, on a logarithmic grid.
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
        """All of it as plain numbers, text and lists, for JSON: a number that is not finite is None."""
        return {name: _plain(value) for name, value in vars(self).items()}

    def figure(self) -> Figure:
        """The true line, the parabola, its minimum and the clamp. Raises `ImportError` without matplotlib."""
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
            rows.append(("signal", f"{self.signal:.2g} of the slope is there on held-out data too"))
        return "\n".join(f"{name:<16}  {value}" for name, value in rows)

    def _misfits(self) -> str:
        return f"off by {_percent(self.misfit_at_half)} at half, {_percent(self.misfit_at_twice)} at twice the step"


@whole
def suggest_lr(
    model: nn.Module,
    optimizer: Optimizer,
    criterion: Criterion | None = None,
    x: Any = None,
    y: Any = None,
    *,
    closure: Callable[[], Tensor] | None = None,
    batches: Sequence[Any] | None = None,
    held_out: Any = None,
    weight: float = 1.0,
    lr_min: float = 0.0,
    lr_max: float = math.inf,
    curvature: str = "exact",
    process_group: ProcessGroup | None = None,
) -> Suggestion:
    """Suggest a learning rate for the optimizer, before training. Nothing is changed by it, bit for bit.

    Args:
        model: as you train it: plain, in DDP, or after `fully_shard`.
        optimizer: any whose step is the learning rate times a direction; `as_gen_optimizer` is not needed. For SGD
            with momentum, whose steps add up, the direction is that after many steps along this gradient.
        criterion, x, y: `criterion(model(x), y)` is the loss on this rank's slice.
        closure: instead, a function that returns this rank's loss and does not call `backward()`.
        batches: instead, a list of `(x, y)` or closures, whose losses are averaged.
        held_out: other data to measure the loss on, `(x, y)`, a closure, or a list of such. Worth it.
        weight: this rank's share, where slices are unequal.
        lr_min, lr_max: the clamp.
        curvature: `'exact'`, or `'forward'` for models with an operator that has no exact one.
        process_group: the ranks that train together; by default those of the DDP wrapper, or all.

    Costs one training step and 60 to 70 forward passes. Every rank calls it. Raises `ValueError` or `TypeError` on a
    wrong call, or where no parameter has a gradient.

    >>> import gen_dist as gen
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> weight, x = torch.nn.init.ones_(model.weight), torch.ones(1, 1)
    >>> optimizer = torch.optim.SGD(model.parameters())
    >>> gen.suggest_lr(model, optimizer, closure=lambda: (model(x) - 3.0).square().mean())
    Suggestion(rate=0.5, confidence=1, reason='accepted')
    """
    _check_arguments(optimizer, weight, lr_min, lr_max, curvature)
    call = "suggest_lr(model, optimizer, criterion, "
    slices = as_batches(model, criterion, x, y, closure, batches, call=call)
    several = held_out if isinstance(held_out, list) else [held_out]
    probed = slices if held_out is None else as_batches(model, criterion, batches=several, call=call)
    layout = Layout(model)
    ranks = layout.ranks(process_group)
    settings = f"{lr_min=}, {lr_max=}, {curvature=}, {len(slices)} batch(es), {len(probed)} probed"
    check_alike(settings, ranks)

    layout.reshard()  # the root of an FSDP model would show its gathered weights
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    with undisturbed(model), gradients_kept([*dict.fromkeys([*parameters, *model.parameters()])]):
        _make_gradients(layout, ranks, model, slices, weight, parameters)
        direction = _lasting(direction_without_trace(optimizer), optimizer)
        if not ranks.any(torch.tensor(bool(direction))).item():
            raise ValueError("no parameter of the optimizer has a gradient: is it this model's, and is it not frozen?")
        finite = layout.gradients_are_finite(parameters, ranks)
        how = Request(estimator(curvature), FIRST_PROBE, None, weight, finite, True, settings)
        line = Line(layout, direction, slices)
        own, seen = _measured(line, line if held_out is None else Line(layout, direction, probed), ranks, how, lr_max)
        return _suggestion(Line(layout, direction, probed), ranks, weight, own, seen, lr_min, lr_max)


def _make_gradients(
    layout: Layout, ranks: Ranks, model: nn.Module, slices: Sequence[Batch], weight: float, parameters: list[Tensor]
) -> None:
    """Those of the weighted mean over the ranks. Collective. DDP and FSDP average evenly, so losses are scaled."""
    for parameter in [*parameters, *model.parameters()]:
        parameter.grad = None
    share = weight * ranks.size / ranks.sum(torch.tensor(weight, dtype=torch.float64)).item() / len(slices)
    failure: Exception | None = None
    try:
        with torch.enable_grad():
            for batch in slices:
                (batch.loss() * share).backward()
    except Exception as error:
        if layout.backward_communicates:  # the others wait for this rank there
            raise
        failure = error
    raise_together(failure, ranks)
    layout.average_gradients(parameters, ranks)


def _lasting(direction: Direction, optimizer: Optimizer) -> Direction:
    """The direction if this gradient lasts: that of SGD grows with its momentum, which begins with one gradient."""
    if not isinstance(optimizer, SGD):
        return direction
    lasting = Direction()
    for group in direction:
        options = optimizer.param_groups[group.group]
        momentum, growth = options["momentum"], 1.0
        fresh = not any("momentum_buffer" in optimizer.state.get(p, {}) for p in group.parameters)
        if fresh and 0 < momentum < 1:
            growth = (1 - options["dampening"]) / (1 - momentum)
            growth /= 1 + momentum if options["nesterov"] else 1
        lasting.append(group._replace(ratio=group.ratio * growth))
    return lasting


def _measured(own: Line, probed: Line, ranks: Ranks, how: Request, lr_max: float) -> tuple[Measurement, Measurement]:
    """The parabolas on the own batch and on the probed one; by finite differences at a distance of the step to take."""
    first = measure(own, ranks, how)
    if isinstance(how.estimator, Forward):
        whole_step, most = _whole_step(first), lr_max or math.inf
        distance = min(FIRST_PROBE * (whole_step or 1.0), most)
        step = _minimum(measure(probed, ranks, how._replace(distance=distance)).parabola)
        how = how._replace(distance=distance if step is None else min(step, whole_step or step, most))
        first = measure(own, ranks, how)
    return first, first if probed is own else measure(probed, ranks, how)


def _whole_step(seen: Measurement) -> float:
    """The rate of a step as large as the weights; 0 where weights or direction are."""
    whole_step = seen.weight_norm / seen.direction_norm if seen.direction_norm > 0 else 0.0
    return whole_step if math.isfinite(whole_step) else 0.0


def _minimum(parabola: Quadratic) -> float | None:
    return None if whats_wrong(parabola) is not None else -parabola.slope / parabola.curvature


def _suggestion(
    line: Line, ranks: Ranks, weight: float, own: Measurement, seen: Measurement, lr_min: float, lr_max: float
) -> Suggestion:
    """Walk the true line and compare. Collective; all decide alike, from numbers over the ranks."""

    def losses(rates: Sequence[float]) -> tuple[float, ...]:
        return tuple(losses_together(line, rates, ranks, weight))

    parabola, wrong, minimum = seen.parabola, whats_wrong(seen.parabola), _minimum(seen.parabola)
    (here,) = losses([0.0])
    noise = line.noise * abs(here)
    half = twice = confidence = rate = lowest = None
    if minimum is not None:
        rate = clamped(minimum, lr_min, lr_max)
        half, twice = _misfits(parabola, rate, losses([rate / 2, 2 * rate]))
        confidence = max(0.0, 1.0 - max(abs(half), abs(twice)))

    whole_step = _whole_step(own)
    scan = Curve(*(((), ()) if wrong == NOT_FINITE else _scanned(whole_step, minimum, lr_min, lr_max, losses)))
    falls = [(loss, a) for a, loss in zip(*scan, strict=True) if loss < here - noise]
    if falls:
        lowest = min(falls)[1]
    reason = wrong or ""
    if rate is not None and confidence is not None and confidence >= CONFIDENT:
        reason = ACCEPTED if rate == minimum else CLAMPED
    elif wrong in (NOT_FINITE, SLOPE_NOT_POSITIVE):
        rate = None
        if wrong == SLOPE_NOT_POSITIVE and seen is not own:
            reason = f"{wrong} on the held-out data: its noise has the better of it, give larger batches"
    elif lowest is None:
        rate, reason = None, NO_DESCENT
    else:
        rate = lowest
        where = "the loss still falls at" if lowest == scan.rates[-1] else "the true line is lowest at"
        reason = f"{wrong or DOES_NOT_FIT}; {where} this rate"
    grid = [] if rate is None else [REACH * rate * i / POINTS for i in range(POINTS + 1)]
    return Suggestion(
        rate,
        reason,
        confidence,
        half,
        twice,
        parabola.loss,
        parabola.slope,
        parabola.curvature,
        minimum,
        lowest,
        rate / whole_step if rate is not None and whole_step > 0 else None,
        parabola.slope / own.parabola.slope if seen is not own and own.parabola.slope else None,
        lr_min,
        lr_max,
        scan,
        Curve(tuple(grid), losses(grid) if grid else ()),
    )


def _misfits(parabola: Quadratic, rate: float, true: Sequence[float]) -> list[float]:
    """True loss minus parabola at half and at twice the rate, as a share of its fall at the rate."""

    def at(a: float) -> float:
        return parabola.slope * a + parabola.curvature * a**2 / 2

    fall = -at(rate)
    if fall <= 0:  # a clamp beyond twice the minimum
        return [math.inf, math.inf]
    misfits = [(loss - parabola.loss - at(a)) / fall for loss, a in zip(true, (rate / 2, 2 * rate), strict=True)]
    return [misfit if math.isfinite(misfit) else math.inf for misfit in misfits]


def _scanned(
    whole_step: float,
    minimum: float | None,
    lr_min: float,
    lr_max: float,
    losses: Callable[[Sequence[float]], tuple[float, ...]],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The true line on a logarithmic grid up to a step as large as the weights, or as far as the parabola reaches."""
    highest = whole_step or (4 * minimum if minimum is not None else lr_max)
    lowest, highest = max(SMALLEST * highest, lr_min), min(highest, lr_max)
    if not 0 < lowest <= highest < math.inf:
        return (), ()
    count = 1 + max(1, math.ceil(POINTS_A_DECADE * math.log10(highest / lowest)))
    rates = tuple(lowest * (highest / lowest) ** (i / (count - 1)) for i in range(count))
    return rates, losses(rates)


def _check_arguments(optimizer: Any, weight: Any, lr_min: Any, lr_max: Any, curvature: str) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"suggest_lr(model, optimizer, ...) takes a torch.optim.Optimizer second, got {type(optimizer).__name__}"
        )
    check_clamp(lr_min, lr_max)
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"weight must be a positive number, this rank's share of the batch, got {weight!r}")
    if curvature not in ("exact", "forward"):
        raise ValueError(f"curvature must be 'exact' or 'forward', got {curvature!r}")


def _plain(value: Any) -> Any:
    if isinstance(value, Curve):
        return {name: [_plain(v) for v in values] for name, values in value._asdict().items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None) -> str:
    return "None" if value is None else f"{value:.3g}"


def _percent(share: float | None) -> str:
    return "?" if share is None or not math.isfinite(share) else f"{share:+.0%}"
