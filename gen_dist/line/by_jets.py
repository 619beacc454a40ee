"""Exact slope and curvature by 2-jets: one run of the model without a graph, at the cost of about five passes."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from gen_dist.jets import Jet, JetMode, NeedsGraph, UnsupportedOperation, derivatives, noting_casts, velocity_only
from gen_dist.line.estimate import Estimate
from gen_dist.line.line import Line
from gen_dist.parallel import local
from gen_dist.restore import restoring
from gen_dist.torch_private import is_scripted, scripted_attributes, tree_map_only

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


def _numbers(loss: Tensor) -> Tensor:
    """Loss, numerator and denominator from the jet of a loss.

    Jets move along `theta + a d`, where `psi(a) = phi(-a)`: `psi' = g.d` is the numerator itself, and no negated copy
    of `d` is needed.
    """
    value, velocity, acceleration = derivatives(loss if isinstance(loss, Jet) else loss.detach())
    zero = torch.zeros_like(value)
    return torch.stack([value, *(zero if each is None else each for each in (velocity, acceleration))]).double()


# Models whose loss takes gradients of its own, which autograd must follow: it is tried without first.
_needing_graph: WeakSet[nn.Module] = WeakSet()

# Models that compute in float16, whose largest number is 65504: this is noted when they run for the first time.
_in_half: WeakSet[nn.Module] = WeakSet()


def _estimate(line: Line, numbers: Callable[[], list[Tensor]]) -> Estimate:
    """Run the model on jets, which move along `theta + a s d`, where the unit `s` is 1 but in float16."""
    model = line.layout.model
    if torch.float16 in line.layout.compute_dtypes():
        _in_half.add(model)
    known = model in _in_half
    unit = _unit_for_half(line) if known else 1.0
    try:
        with noting_casts() as casts, _carrying_jets(line, unit, tracks=model in _needing_graph):
            measured = torch.stack(numbers())
    except NeedsGraph:
        _needing_graph.add(model)
        return _estimate(line, numbers)
    if torch.float16 in casts and not known:
        _in_half.add(model)
        return _estimate(line, numbers)
    return Estimate(measured / torch.tensor([1.0, unit, unit**2], dtype=torch.float64, device=measured.device))


# The share of the weights that is the unit of float16. Activations then move less than their own size, also where the
# parts of a direction add up over a layer, as those of Adam do; and what they move by is above the smallest numbers.
SHARE = 2.0**-6


def _unit_for_half(line: Line) -> float:
    """The power of two next to `SHARE |theta| / |d|`; 1 if that is no number. Collective under sharding."""
    squares = torch.zeros(2, dtype=torch.float64)
    for group in line.direction:
        for parameter, update in zip(group.parameters, group.updates, strict=True):
            pair = local(parameter.detach()), update if group.ratio == 1 else group.ratio * update
            sizes = [torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in pair]
            squares = squares.to(update.device) + torch.stack(sizes).double().square()
    if line.layout.forward_communicates:  # the ranks hold parts of a weight, which must move as one
        squares = line.layout.ranks().sum(squares)
    weights, direction = squares.sqrt().tolist()
    if not (0 < weights < math.inf and 0 < direction < math.inf):
        return 1.0
    return 2.0 ** round(math.log2(SHARE * weights / direction))


@contextlib.contextmanager
def _carrying_jets(line: Line, unit: float, tracks: bool) -> Iterator[None]:
    layout = line.layout
    velocities = {
        p: d if group.ratio * unit == 1 else group.ratio * unit * d
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
        mode = JetMode(table, tracks)
        try:
            with _in_scripts(line, table), restoring(mode.leave), mode:
                yield
        finally:
            layout.reshard()


@contextlib.contextmanager
def _in_scripts(line: Line, table: dict[int, Tensor]) -> Iterator[None]:
    """Put what stands for weights into the modules of TorchScript, which reads them where no function mode sees it."""
    scripted = [module for module in line.layout.model.modules() if is_scripted(module)]
    if scripted and line.layout.forward_communicates:  # weights may be gathered only while their module runs
        raise UnsupportedOperation("a module of TorchScript", "may hold weights that are sharded")
    kept = [each for module in scripted for each in scripted_attributes(module) if id(each[0]) in table]

    def restore() -> None:
        for tensor, put in kept:
            put(tensor)

    with restoring(restore):
        for tensor, put in kept:
            put(table[id(tensor)])
        yield


@contextlib.contextmanager
def _uncompiled() -> Iterator[Any]:
    """Run compiled modules as they are written: the compiler does not know jets."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and its import takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
