"""Exact slope and curvature by 2-jets: one run of the model without a graph, at the cost of about five passes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from gen_dist.jets import Jet, JetMode, NeedsGraph, UnsupportedOperation, derivatives, velocity_only
from gen_dist.line.estimate import Estimate
from gen_dist.line.line import Line
from gen_dist.restore import forward_state_kept, restoring
from gen_dist.torch_private import is_scripted, tree_map_only

__all__ = ["exact", "gauss_newton"]


def exact(line: Line, probe: float = 0.0, loss: Tensor | None = None) -> Estimate:
    """Loss, numerator and denominator, exact up to rounding; `probe` and `loss` are not needed."""

    def numbers() -> list[Tensor]:
        return [_numbers(each.loss()) for each in line.data.micro_batches]

    return _estimate(line, numbers)


def gauss_newton(line: Line, probe: float = 0.0, loss: Tensor | None = None) -> Estimate:
    """As `exact`, with the model linearised: the denominator is `(J d)' H (J d)`, `H` the criterion's Hessian.

    It is never negative where the criterion is convex in the model's output. Closures are refused before: they do not
    tell model and criterion apart.
    """

    def numbers() -> Iterator[Tensor]:
        for each in line.data.micro_batches:
            with velocity_only():
                output = each.output()
            output = tree_map_only(Jet, lambda jet: Jet(jet.value, jet.velocity), output)
            yield _numbers(each.loss_of(output))

    return _estimate(line, lambda: list(numbers()))


# Models whose loss takes gradients of its own, which autograd must follow: it is tried without first.
_needing_graph: WeakSet[nn.Module] = WeakSet()


def _estimate(line: Line, numbers: Callable[[], list[Tensor]]) -> Estimate:
    """Run the model on jets."""
    model = line.layout.model
    try:
        with _carrying_jets(line, tracks=model in _needing_graph):
            return Estimate(torch.stack(numbers()))
    except NeedsGraph:
        _needing_graph.add(model)
    with _carrying_jets(line, tracks=True):
        return Estimate(torch.stack(numbers()))


def _numbers(loss: Tensor) -> Tensor:
    """Loss, numerator and denominator from the jet of a loss.

    Jets move along `theta + a d`, where `psi(a) = phi(-a)`: `psi' = g.d` is the numerator itself, and no negated copy
    of `d` is needed.
    """
    value, velocity, acceleration = derivatives(loss.detach() if not isinstance(loss, Jet) else loss)
    zero = torch.zeros_like(value)
    return torch.stack([value, *(zero if each is None else each for each in (velocity, acceleration))]).double()


@contextlib.contextmanager
def _carrying_jets(line: Line, tracks: bool) -> Iterator[None]:
    layout = line.layout
    _refuse_scripted(layout.model)
    velocities = {
        p: d if group.ratio == 1 else group.ratio * d
        for group in line.direction
        for p, d in zip(group.parameters, group.updates, strict=True)
    }
    with (
        torch.no_grad(),
        _uncompiled(),
        layout.without_wrappers(),
        forward_state_kept(layout.model),
        layout.moving_weights(velocities, Jet) as table,
    ):
        # Buffers too: what the model writes into them may move, and come back into the loss.
        table.update((id(b), Jet(b)) for b in layout.model.buffers() if b.is_floating_point())
        mode = JetMode(table, tracks)
        try:
            with restoring(mode.leave), mode:
                yield
        finally:
            layout.reshard()


def _refuse_scripted(model: nn.Module) -> None:
    for module in model.modules():
        if is_scripted(module):
            why = "is run by TorchScript, where its weights cannot be replaced"
            raise UnsupportedOperation("a module made by torch.jit.script or torch.jit.trace", why)


@contextlib.contextmanager
def _uncompiled() -> Iterator[Any]:
    """Run compiled modules as they are written: the compiler does not know jets."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and its import takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
