"""Exact slope and curvature by 2-jets: one run of the model without a graph, at the cost of about five passes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gen_dist.jets import Jet, JetMode, derivatives, velocity_only
from gen_dist.line.estimate import Estimate
from gen_dist.line.line import Line
from gen_dist.restore import restoring
from gen_dist.torch_private import tree_map_only

__all__ = ["exact", "gauss_newton"]


def exact(line: Line, probe: float = 0.0, loss: Tensor | None = None) -> Estimate:
    """Loss, numerator and denominator, exact up to rounding; `probe` and `loss` are not needed."""
    with _carrying_jets(line):
        return Estimate(torch.stack([_numbers(each.loss()) for each in line.data.micro_batches]))


def gauss_newton(line: Line, probe: float = 0.0, loss: Tensor | None = None) -> Estimate:
    """As `exact`, with the model linearised: the denominator is `(J d)' H (J d)`, `H` the criterion's Hessian.

    It is never negative where the criterion is convex in the model's output. Closures are refused before: they do not
    tell model and criterion apart.
    """
    numbers = []
    with _carrying_jets(line):
        for each in line.data.micro_batches:
            with velocity_only():
                output = each.output()
            output = tree_map_only(Jet, lambda jet: Jet(jet.value, jet.velocity), output)
            numbers.append(_numbers(each.loss_of(output)))
    return Estimate(torch.stack(numbers))


def _numbers(loss: Tensor) -> Tensor:
    """Loss, numerator and denominator from the jet of a loss.

    Jets move along `theta + a d`, where `psi(a) = phi(-a)`: `psi' = g.d` is the numerator itself, and no negated copy
    of `d` is needed.
    """
    value, velocity, acceleration = derivatives(loss)
    zero = torch.zeros_like(value)
    return torch.stack([value, *(zero if each is None else each for each in (velocity, acceleration))]).double()


@contextlib.contextmanager
def _carrying_jets(line: Line) -> Iterator[None]:
    layout = line.layout
    velocities = {
        p: d if group.ratio == 1 else group.ratio * d
        for group in line.direction
        for p, d in zip(group.parameters, group.updates, strict=True)
    }
    with (
        torch.no_grad(),
        _uncompiled(),
        layout.without_wrappers(),
        line.state_kept(watching=True),
        layout.moving_weights(velocities, Jet) as table,
    ):
        # Buffers too: what the model writes into them may move, and come back into the loss.
        table.update((id(b), Jet(b)) for b in layout.model.buffers() if b.is_floating_point())
        mode = JetMode(table)
        try:
            with restoring(mode.leave), mode:
                yield
        finally:
            layout.reshard()


@contextlib.contextmanager
def _uncompiled() -> Iterator[Any]:
    """Run compiled modules as they are written: the compiler does not know jets."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and its import takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
