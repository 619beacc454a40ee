"""Measure a case: does `exact` give slope and curvature as double backward does, and does `auto` go on where not?"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import reference
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.dropout import _DropoutNd

import gen_dist as gen
from gen_dist.direction import Direction, GroupDirection
from gen_dist.line import Line, MicroBatch, Slice, exact
from gen_dist.parallel import Layout
from zoo.case import Case, InFloat64, NotBuilt, TwiceDifferentiable

# Both sides round in float64, unit 1e-16. A network loses six to seven digits of it at most where it is sound: norms
# over few values, and sums in which terms cancel. A term that is missing costs the first or second digit, and seldom
# less than 1e-5. The floor holds where the curvature is zero up to rounding.
TOLERANCE = 1e-8
FLOOR = 1e-12
# Where a model loses more, the oracle does too, if rounding changes the weights: then a multiple of that is allowed,
# but no more than still tells a missing term.
ROUNDING = 30
WORST = 1e-5
# Differences of gradients, the oracle where PyTorch has no double backward, and of losses, which `auto` takes.
TOLERANCE_OF_DIFFERENCES = 1e-4
TOLERANCE_OF_AUTO = 0.05

VERDICTS = ("right", "refused", "wrong", "failed", "too slow", "not built")


@dataclass
class Outcome:
    """What came of a case.

    Attributes:
        verdict: one of `VERDICTS`. "failed" is an error that is no refusal.
        detail: the operation that is refused, the two sides where they differ, or the error.
        auto: of a case that is refused, what `curvature="auto"` did: "goes on", or what went wrong.
        oracle: "double backward", or "differences" of the gradient where PyTorch has no double backward.
    """

    verdict: str
    detail: str = ""
    auto: str = ""
    oracle: str = "double backward"


def measure(build: Callable[[], Case]) -> Outcome:
    """Build a case and measure it along a random direction, in float64, on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with InFloat64(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            case = build()
            value = case.loss().detach()
            parameters = [p for p in case.model.parameters() if p.requires_grad]
            if not parameters or not value.isfinite():
                raise NotBuilt("no parameters" if not parameters else "the loss is not finite")
        except Exception as error:
            return Outcome("not built", said(error))
        d = [0.1 * torch.randn_like(p) for p in parameters]
        return _compared(case, parameters, d)


def _compared(case: Case, parameters: list[Tensor], d: list[Tensor]) -> Outcome:
    refused = failed = None
    try:
        seen = by_jets(case, parameters, d)
    except gen.UnsupportedOperation as error:
        refused = error.reason
    except Exception as error:
        failed = said(error)
    try:
        expected, oracle, tolerance = _oracle(case, parameters, d)
    except Exception as error:
        return Outcome("not built", f"no oracle: {said(error)}")
    if not any(expected[1:]):
        return Outcome("not built", "the loss does not depend on the weights")
    if not all(map(math.isfinite, expected)):
        return Outcome("not built", f"the oracle is not finite: {expected}")
    if refused is not None:
        return Outcome("refused", refused, _auto(case, parameters), oracle)
    if failed is not None:
        return Outcome("failed", failed, _auto(case, parameters), oracle)
    if agree(seen, expected, tolerance):
        return Outcome("right", oracle=oracle)
    return _where_they_differ(case, parameters, d, seen, expected, tolerance)


def _where_they_differ(
    case: Case,
    parameters: list[Tensor],
    d: list[Tensor],
    seen: Sequence[float],
    expected: Sequence[float],
    tolerance: float,
) -> Outcome:
    """Whether masks of dropout or rounding are at fault, before a case is called wrong."""
    if not agree(seen[:1], expected[:1]) and _without_dropout(case.model):
        outcome = _compared(case, parameters, d)
        return replace(
            outcome, detail=f"{outcome.detail} without dropout; with it, masks differ by memory layout".strip()
        )
    with torch.no_grad():
        for p in parameters:
            p.mul_(1 + 1e-15 * torch.randn_like(p))
    moved = _oracle(case, parameters, d)[0]
    largest = max(abs(a - b) / max(abs(b), FLOOR) for a, b in zip(moved, expected, strict=True))
    if not agree(seen, expected, max(tolerance, ROUNDING * largest)):
        return Outcome("wrong", f"{seen} instead of {expected}, which rounding changes by {largest:.0e}")
    return Outcome("right" if largest <= WORST else "not built", f"rounding changes the oracle by {largest:.0e}")


def _without_dropout(model: nn.Module) -> bool:
    """Turn dropout off; returns whether any was on. A mask depends on the strides of what it is applied to."""
    found = [m for m in model.modules() if isinstance(m, _DropoutNd) and m.p > 0]
    for module in found:
        module.p = 0.0
    return bool(found)


def by_jets(case: Case, parameters: list[Tensor], d: list[Tensor]) -> tuple[float, ...]:
    """`(L, g.d, d'Hd)` by jets."""
    direction = Direction([GroupDirection(0, 1.0, parameters, d)])
    line = Line(Layout(case.model), direction, Slice([MicroBatch(case.model, closure=case.loss)]))
    return tuple(exact(line).numbers[0].tolist())


def agree(seen: Sequence[float], expected: Sequence[float], tolerance: float = TOLERANCE) -> bool:
    """Whether the numbers agree, to a relative tolerance, or up to rounding of the largest of them."""
    floor = FLOOR * max(1.0, *map(abs, expected))
    return all(math.isclose(a, b, rel_tol=tolerance, abs_tol=floor) for a, b in zip(seen, expected, strict=True))


def _oracle(case: Case, parameters: list[Tensor], d: list[Tensor]) -> tuple[tuple[float, ...], str, float]:
    """`(L, g.d, d'Hd)`, where they come from, and how exact they are."""
    try:
        with TwiceDifferentiable():
            expected = reference.derivatives(case.loss, parameters, d)
        if all(map(math.isfinite, expected)):
            return expected, "double backward", TOLERANCE
    except (RuntimeError, NotImplementedError):
        pass
    expected = _by_differences(case.loss, parameters, d)
    return expected, "differences", TOLERANCE_OF_DIFFERENCES


def _by_differences(loss: Callable[[], Tensor], parameters: list[Tensor], d: list[Tensor]) -> tuple[float, ...]:
    """`(L, g.d, d'Hd)`, the curvature by central differences of the gradient, over the step where they settle."""
    start = [p.detach().clone() for p in parameters]

    def at(a: float) -> tuple[float, float]:
        with torch.no_grad():
            for p, s, v in zip(parameters, start, d, strict=True):
                p.copy_(s - a * v)
        with sdpa_kernel(SDPBackend.MATH):
            value = loss()
            gradient = torch.autograd.grad(value, parameters, materialize_grads=True)
        return value.item(), sum((g * v).sum() for g, v in zip(gradient, d, strict=True)).item()  # type: ignore[union-attr]

    found = [(at(-h)[1] - at(h)[1]) / (2 * h) for h in (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)]
    _, curvature = min((abs(a - b), b) for a, b in itertools.pairwise(found))
    return *at(0.0), curvature


def _auto(case: Case, parameters: list[Tensor]) -> str:
    """Take a step of `curvature="auto"` along the gradient, and compare it with the oracle."""
    try:
        loss = case.loss()
        gradient = torch.autograd.grad(loss, parameters, materialize_grads=True)
        for p, g in zip(parameters, gradient, strict=True):
            p.grad = g
        sizes = [torch.stack([x.norm() for x in each]).norm().item() for each in (parameters, gradient)]
        rate = 1e-4 * sizes[0] / sizes[1] if min(sizes) > 0 else 1e-4  # a small step: the loss bends little within it
        optimizer = gen.make_gen_optimizer(torch.optim.SGD, parameters, lr=rate)
        scheduler = gen.GenScheduler(optimizer, case.model, curvature="auto")
        scheduler.step(closure=case.loss)
        seen = scheduler.last.numerator, scheduler.last.denominator  # type: ignore[union-attr]
        _, *expected = _oracle(case, parameters, list(gradient))[0]
        # a custom function may have another gradient than that of its values, which these differences follow too
        by_values = reference.finite_differences(case.loss, parameters, list(gradient), rate / 2, 2)
    except Exception as error:
        return said(error)
    near = any(agree(seen, each, TOLERANCE_OF_AUTO) for each in (expected, by_values))
    return "goes on" if near else f"far off: {seen} instead of {tuple(expected)}"


def said(error: BaseException) -> str:
    """The last line that tells something of an error, in short."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0].strip()[:300]}"
