"""The general operator rule: an operator without a rule of its own is differentiated by autograd, alone.

For a curve `x(a) = x + a x' + a^2/2 x''` and a cotangent `u`, autograd records the one operator and gives

    v = d<u, f>/dx         y'  = d<v, x'>/du
    w = d<v, x'>/dx        y'' = d(<w, x'> + <v, x''>)/du

Backward formulas are linear in `u`, so its value does not matter, but for the few that take its logarithm or ask
whether it is zero. The result is what double backward of the whole
program would see. `verification` holds it to differences before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gen_dist.jets.jet import Jet, UnsupportedOperation, as_jet, wants_acceleration
from gen_dist.torch_private import plain_autograd

__all__ = ["by_autograd", "by_autograd_elementwise", "jets_in", "with_jets_replaced"]


def by_autograd(function: Callable[..., Any], cotangent: float, *args: Any, **kwargs: Any) -> Any:
    """Return what the function returns for jets, differentiated by autograd. All elements of `u` are `cotangent`.

    Results that autograd does not follow, such as indices, are plain tensors; numbers among them raise an error where
    they are used.

    Raises:
        UnsupportedOperation: the function has no derivative that can be differentiated again.
    """
    jets = list(jets_in((args, kwargs)))
    with plain_autograd():
        points, result = _recorded(function, jets, args, kwargs)
        if isinstance(result, Tensor) and result.numel() == 1 and not result.is_complex():
            return _at_once(function, result, points, jets, _inner)
        outputs = [x for x in _tensors(result) if x.requires_grad]
        if any(x.layout is not torch.strided for x in outputs):
            raise UnsupportedOperation(function, "makes a sparse tensor of values that move")
        try:
            moved = _derivatives(outputs, cotangent, points, jets)
        except RuntimeError as error:
            raise _not_twice(function, error) from error
    found = iter(zip(*moved, strict=True))

    def jet(x: Tensor) -> Tensor:
        if x.requires_grad:
            return as_jet(x.detach(), *next(found))
        follows = not outputs or not (x.is_floating_point() or x.is_complex())
        return x if follows else Jet.unknown(x, f"a result of {function} that has no derivative")

    return _mapped(result, jet)


def by_autograd_elementwise(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """As `by_autograd`, for a function that applies to each element, of real numbers.

    Its Jacobian is diagonal: with `u = 1`, `y' = v x'` and `y'' = w x' + v x''`. No derivative by `u` is needed, which
    is NaN where a formula multiplies it by infinity and then takes another branch.
    """
    jets = list(jets_in((args, kwargs)))
    shape = torch.broadcast_shapes(*(jet.shape for jet in jets))
    expanded = with_jets_replaced((args, kwargs), lambda jet: jet.expand(shape))
    jets = list(jets_in(expanded))
    with plain_autograd():
        points, y = _recorded(function, jets, *expanded)
        if not isinstance(y, Tensor) or y.shape != shape or y.is_complex():
            return by_autograd(function, 1.0, *args, **kwargs)
        return _at_once(function, y, points, jets, _sum_of_products)


def _recorded(function: Callable[..., Any], jets: list[Jet], args: Any, kwargs: Any) -> tuple[list[Tensor], Any]:
    """Return points that stand for the jets, and the result of the function for them."""
    points = [jet.value.detach().requires_grad_() for jet in jets]
    remaining = iter(points)
    args, kwargs = with_jets_replaced((args, kwargs), lambda _: next(remaining))
    return points, function(*args, **kwargs)


def _at_once(
    function: Callable[..., Any],
    y: Tensor,
    points: list[Tensor],
    jets: list[Jet],
    product: Callable[[Any, Any], Tensor | None],
) -> Tensor:
    """Return the jet of `y`, where the gradient of its sum has all of its derivatives."""
    if not y.requires_grad:
        return y
    x1, x2 = [jet.velocity for jet in jets], [jet.acceleration for jet in jets]
    try:
        v = _gradient(y.sum(), points, create_graph=True)
        slope, bend = product(v, x1), product(v, x2)
        if slope is not None and wants_acceleration():
            more = product(_gradient(slope.sum(), points), x1)
            bend = more if bend is None else bend if more is None else bend + more
    except RuntimeError as error:
        raise _not_twice(function, error) from error
    return as_jet(y.detach(), *_detached([slope, bend]))


def _sum_of_products(a: list[Any], b: list[Any]) -> Tensor | None:
    products = [x * y for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    return sum(products[1:], products[0]) if products else None


def _not_twice(function: Callable[..., Any], error: RuntimeError) -> UnsupportedOperation:
    """PyTorch has no formula, or a formula that has none."""
    why = f"has no derivative that autograd can differentiate again ({str(error).splitlines()[0]})"
    return UnsupportedOperation(function, why)


Parts = list["Tensor | None"]


def _derivatives(outputs: list[Tensor], cotangent: float, points: list[Tensor], jets: list[Jet]) -> tuple[Parts, Parts]:
    """Return the velocities and the accelerations of the outputs."""
    none: Parts = [None] * len(outputs)
    cotangents = [torch.full_like(y, cotangent).requires_grad_() for y in outputs]
    x1, x2 = [jet.velocity for jet in jets], [jet.acceleration for jet in jets]
    v = _gradient(_inner(cotangents, outputs), points, create_graph=True)
    slope = _inner(v, x1)
    velocity = none if slope is None else _gradient(slope, cotangents)
    if not wants_acceleration():
        return _detached(velocity), none
    w: Parts = [None] * len(points) if slope is None else _gradient(slope, points, create_graph=True)
    bend = _inner([*w, *v], [*x1, *x2])
    return _detached(velocity), _detached(none if bend is None else _gradient(bend, cotangents))


def _gradient(y: Tensor | None, x: list[Tensor], create_graph: bool = False) -> Parts:
    if y is None or not y.requires_grad:
        return [None] * len(x)
    return list(torch.autograd.grad(y, x, create_graph=create_graph, retain_graph=True, allow_unused=True))


def _inner(a: Any, b: Any) -> Tensor | None:
    """Return the sum of the inner products, that of complex numbers as of pairs of real ones."""
    total: Tensor | None = None
    for x, y in zip(a, b, strict=True):
        if x is not None and y is not None:
            product = (x.conj() * y).real if x.is_complex() else x * y
            total = product.sum() if total is None else total + product.sum()
    return total


def _detached(parts: Parts) -> Parts:
    return [None if part is None else part.detach() for part in parts]


def jets_in(arguments: Any) -> Iterator[Jet]:
    """Yield the jets among the arguments, inside lists, tuples and dicts too."""
    if isinstance(arguments, Jet):
        yield arguments
    elif isinstance(arguments, (list, tuple)):
        for x in arguments:
            yield from jets_in(x)
    elif isinstance(arguments, dict):
        yield from jets_in(list(arguments.values()))


def with_jets_replaced(arguments: Any, replaced: Callable[[Jet], Any]) -> Any:
    """Return the arguments with `replaced(jet)` in place of each jet, in the order of `jets_in`."""
    if isinstance(arguments, Jet):
        return replaced(arguments)
    if type(arguments) in (list, tuple):
        return type(arguments)([with_jets_replaced(x, replaced) for x in arguments])
    if type(arguments) is dict:
        return {key: with_jets_replaced(x, replaced) for key, x in arguments.items()}
    return arguments


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (list, tuple)):
        for x in result:
            yield from _tensors(x)


def _mapped(result: Any, f: Callable[[Tensor], Any]) -> Any:
    if isinstance(result, Tensor):
        return f(result)
    if isinstance(result, (list, tuple)):
        return tuple(_mapped(x, f) for x in result) if isinstance(result, tuple) else [_mapped(x, f) for x in result]
    return result
