"""One call before training that answers "what rate?".

The model, the optimizer and a batch are those of the first training step. Along the direction `d` that the optimizer
would take, `suggest_lr` finds the parabola `phi(a) = L(theta - a d) ~ phi(0) - a g.d + a^2/2 d'Hd`, walks the true
line, and compares the two.

What the number means. It is the rate that lowers the loss most in *one* step. On the batch that made the gradient that
rate is too large, since one step gains from the gradient's noise, too. With `held_out`, other batches, it is the rate
for data that the gradient has not seen. For a whole run with a decaying rate it is a place to start from. On five small
tasks, three initial weights each, with one batch held out, it was 0.7 to 1.6 times the best rate of a grid in 11 of 15
cases, 0.2 to 0.3 times in 3, and once, where the gradient was mostly noise (`signal` 0.2), 0.04 times; on its own batch
up to 2.9 times (`tests/benchmarks/suggestions.py`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import SGD, Optimizer

from gen_dist.direction import Direction, direction_without_trace
from gen_dist.forward_state import forward_state_kept
from gen_dist.line import (
    BatchLoss,
    Criterion,
    Line,
    Method,
    NeedsForward,
    Slice,
    as_slice,
    check_alike,
    estimator,
    measure,
    raise_together,
    walk_over_ranks,
)
from gen_dist.parabola import Parabola
from gen_dist.parallel import Layout, Ranks
from gen_dist.policy import ACCEPTED, CLAMPED, NO_DESCENT, NOT_FINITE, Clamp, why_no_minimum
from gen_dist.restore import gradients_kept, restored_on_exit
from gen_dist.suggest.suggestion import Curve, Suggestion

__all__ = ["suggest_lr"]

logger = logging.getLogger("gen_dist")

CONFIDENT = 0.5  # from here on the parabola is believed, otherwise the true line
SMALLEST = 1e-5  # of the rates that are tried, where 1 is a step as large as the weights
POINTS_A_DECADE = 8
POINTS = 20  # of the line from 0 to REACH times the rate
REACH = 2.5
FIRST_PROBE = 5e-4  # of a step as large as the weights, for finite differences

DOES_NOT_FIT = "the parabola does not fit"
NO_FALL = "the loss does not fall along the direction"


@restored_on_exit
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
    curvature: str = "auto",
    process_group: ProcessGroup | None = None,
    compute_loss: BatchLoss | None = None,
) -> Suggestion:
    """Suggest a learning rate for the optimizer, before training. Nothing is changed by it, bit for bit.

    Args:
        model: as you train it: plain, in DDP, or after `fully_shard`.
        optimizer: any whose step is the learning rate times a direction; `as_gen_optimizer` is not needed. For SGD
            with momentum, whose steps add up, the direction is that after many steps along this gradient.
        criterion, x, y: `criterion(model(x), y)` is the loss on this rank's slice; of a dict `x` and no criterion it is
            `model(**x).loss`.
        closure: instead, a function that returns this rank's loss and does not call `backward()`.
        batches: instead, a list of batches or closures, whose losses are averaged.
        held_out: other data to measure the loss on: a batch, a closure, or a list of such. Worth it.
        weight: this rank's share, where slices are unequal.
        lr_min, lr_max: the clamp.
        curvature: `'exact'`, `'forward'`, or `'auto'`: exact where the model's operators allow it, else forward.
        process_group: the ranks that train together; by default those of the DDP wrapper, or all.
        compute_loss: in the place of the criterion: `compute_loss(model, batch)` is the loss of a batch of any kind.

    Costs one training step and 60 to 70 forward passes. Every rank calls it. Raises `ValueError` or `TypeError` on a
    wrong call, or where no parameter has a gradient.

    >>> import gen_dist as gen
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> weight, x = torch.nn.init.ones_(model.weight), torch.ones(1, 1)
    >>> optimizer = torch.optim.SGD(model.parameters())
    >>> gen.suggest_lr(model, optimizer, closure=lambda: (model(x) - 3.0).square().mean())
    Suggestion(rate=0.5, confidence=1, reason='accepted')
    """
    clamp = Clamp(lr_min, lr_max)
    _check_arguments(optimizer, weight, clamp, curvature)
    call = "suggest_lr(model, optimizer, criterion, "
    slice_of = partial(as_slice, model, criterion, weight=weight, call=call, compute_loss=compute_loss)
    own = slice_of(x, y, closure, batches)
    is_batch = not isinstance(held_out, list) or any(
        isinstance(each, Tensor) for each in held_out
    )  # [x, y], as loaders
    several = [held_out] if is_batch else held_out
    probed = own if held_out is None else slice_of(batches=several)
    layout = Layout(model)
    ranks = layout.ranks(process_group)
    settings = f"{lr_min=}, {lr_max=}, {curvature=}, {len(own.micro_batches)} batch(es), "
    settings += f"{len(probed.micro_batches)} probed"
    check_alike(settings, ranks)

    layout.reshard()  # the root of an FSDP model would show its gathered weights
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    programs = [*own.programs, *probed.programs]
    with (
        forward_state_kept(model, *programs, moving=parameters),
        gradients_kept([*dict.fromkeys([*parameters, *model.parameters()])]),
    ):
        _make_gradients(layout, ranks, own, parameters)
        direction = _lasting(direction_without_trace(optimizer), optimizer)
        if not ranks.any(torch.tensor(bool(direction))).item():
            raise ValueError("no parameter of the optimizer has a gradient: is it this model's, and is it not frozen?")
        finite = layout.gradients_are_finite(parameters, ranks)
        line = Line(layout, direction, own)
        held_out_line = line if held_out is None else replace(line, data=probed)
        method = Method(estimator(curvature), FIRST_PROBE, True, settings)
        seen, seen_held_out = _measured(line, held_out_line, ranks, method, finite, clamp)
        return _suggestion(held_out_line, ranks, seen, seen_held_out, clamp)


def _make_gradients(layout: Layout, ranks: Ranks, data: Slice, parameters: list[Tensor]) -> None:
    """Make those of the weighted mean over the ranks. Collective. Wrappers average evenly, so losses are scaled."""
    for parameter in [*parameters, *layout.model.parameters()]:
        parameter.grad = None
    total = ranks.sum(torch.tensor(data.weight, dtype=torch.float64)).item()
    share = data.weight * ranks.size / total / len(data.micro_batches)
    failure: Exception | None = None
    try:
        with torch.enable_grad():
            for each in data.micro_batches:
                (each.loss() * share).backward()
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


def _measured(
    own: Line, probed: Line, ranks: Ranks, method: Method, finite: bool, clamp: Clamp
) -> tuple[Parabola, Parabola]:
    """The parabolas on the own data and on the probed; by finite differences at a distance of the step to take."""

    def seen(line: Line, method: Method) -> Parabola:
        return measure(line, ranks, method, finite, companions={}).parabola

    try:
        first = seen(own, method)
    except NeedsForward as reason:
        logger.info("curvature='auto' goes on by forward passes, since %s", reason)
        assert method.estimator.fallback is not None
        method = method._replace(estimator=method.estimator.fallback)
        first = seen(own, method)
    if method.estimator.differences:
        whole_step, most = _whole_step(first), clamp.lr_max or math.inf
        probe = min(FIRST_PROBE * (whole_step or 1.0), most)
        step = _minimum(seen(probed, method._replace(probe=probe)))
        method = method._replace(probe=probe if step is None else min(step, whole_step or step, most))
        first = seen(own, method)
    return first, first if probed is own else seen(probed, method)


def _whole_step(seen: Parabola) -> float:
    """The rate of a step as large as the weights; 0 where weights or direction are."""
    whole_step = seen.weight_norm / seen.direction_norm if seen.direction_norm > 0 else 0.0
    return whole_step if math.isfinite(whole_step) else 0.0


def _minimum(parabola: Parabola) -> float | None:
    return None if why_no_minimum(parabola) is not None else parabola.minimum


def _suggestion(line: Line, ranks: Ranks, own: Parabola, seen: Parabola, clamp: Clamp) -> Suggestion:
    """Walk the true line and compare. Collective; all decide alike, from numbers over the ranks."""

    def losses(rates: Sequence[float]) -> tuple[float, ...]:
        return tuple(walk_over_ranks(line, rates, ranks).losses)

    wrong, minimum = why_no_minimum(seen), _minimum(seen)
    (here,), rounding = walk_over_ranks(line, [0.0], ranks)
    half = twice = confidence = rate = lowest = None
    if minimum is not None:
        rate = clamp.of(minimum)
        half, twice = _misfits(seen, rate, losses([rate / 2, 2 * rate]))
        confidence = max(0.0, 1.0 - max(abs(half), abs(twice)))

    whole_step = _whole_step(own)
    scan = Curve(*(((), ()) if wrong == NOT_FINITE else _scanned(whole_step, minimum, clamp, losses)))
    falls = [(loss, a) for a, loss in zip(*scan, strict=True) if loss < here - rounding * abs(here)]
    if falls:
        lowest = min(falls)[1]
    reason = wrong or ""
    if rate is not None and confidence is not None and confidence >= CONFIDENT:
        reason = ACCEPTED if rate == minimum else CLAMPED
    elif wrong in (NOT_FINITE, NO_DESCENT):
        rate = None
        if wrong == NO_DESCENT and seen is not own:
            reason = f"{wrong} on the held-out data: noise outweighs the slope, give larger batches"
    elif lowest is None:
        rate, reason = None, NO_FALL
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
        seen.loss,
        -seen.numerator,
        seen.denominator,
        minimum,
        lowest,
        rate / whole_step if rate is not None and whole_step > 0 else None,
        seen.numerator / own.numerator if seen is not own and own.numerator else None,
        *clamp,
        scan,
        Curve(tuple(grid), losses(grid) if grid else ()),
    )


def _misfits(parabola: Parabola, rate: float, true: Sequence[float]) -> list[float]:
    """True loss minus parabola at half and at twice the rate, as a share of its fall at the rate."""
    fall = -parabola.change(rate)
    if fall <= 0:  # a clamp beyond twice the minimum
        return [math.inf, math.inf]
    steps = zip(true, (rate / 2, 2 * rate), strict=True)
    misfits = [(loss - parabola.loss - parabola.change(a)) / fall for loss, a in steps]
    return [misfit if math.isfinite(misfit) else math.inf for misfit in misfits]


def _scanned(
    whole_step: float,
    minimum: float | None,
    clamp: Clamp,
    losses: Callable[[Sequence[float]], tuple[float, ...]],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The true line on a logarithmic grid up to a step as large as the weights, or as far as the parabola reaches."""
    lr_min, lr_max = clamp
    highest = whole_step or (4 * minimum if minimum is not None else lr_max)
    lowest, highest = max(SMALLEST * highest, lr_min), min(highest, lr_max)
    if not 0 < lowest <= highest < math.inf:
        return (), ()
    count = 1 + max(1, math.ceil(POINTS_A_DECADE * math.log10(highest / lowest)))
    rates = tuple(lowest * (highest / lowest) ** (i / (count - 1)) for i in range(count))
    return rates, losses(rates)


def _check_arguments(optimizer: Any, weight: Any, clamp: Clamp, curvature: str) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"suggest_lr(model, optimizer, ...) takes a torch.optim.Optimizer second, got {type(optimizer).__name__}"
        )
    clamp.check()
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"weight must be a positive number, this rank's share of the batch, got {weight!r}")
    if curvature not in ("auto", "exact", "forward"):
        raise ValueError(f"curvature must be 'auto', 'exact' or 'forward', got {curvature!r}")
