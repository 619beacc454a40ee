"""Sums, products and what is linear in several arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from gen_dist.jets.jet import Jet, as_jet, derivatives, wants_acceleration
from gen_dist.jets.registry import RULES, aten, name_of, rule
from gen_dist.jets.rules.terms import plus, scaled, second_order, total_of


@rule("add", "sub", "rsub")
def _add(operation: OpOverload, x: Any, y: Any, alpha: Any = 1) -> Any:
    if name_of(operation) == "rsub":
        x, y = y, x
    (x0, x1, x2), (y0, y1, y2) = derivatives(x), derivatives(y)
    sign = 1 if name_of(operation) == "add" else -1
    factor = sign * alpha
    value = torch.add(x0, y0, alpha=factor) if isinstance(x0, Tensor) else torch.mul(y0, factor) + x0
    return as_jet(value, plus(x1, scaled(y1, factor)), plus(x2, scaled(y2, factor)))


def _moved_product(operation: Callable[[Any, Any], Tensor], x: Any, w: Any) -> tuple[Tensor | None, Tensor | None]:
    """Velocity and acceleration of a bilinear operation, new tensors both."""

    def add_product(total: Tensor, a: Any, b: Any, factor: int) -> None:
        if operation is aten.mm.default:
            total.addmm_(a, b, alpha=factor)
        elif operation is aten.bmm.default:
            total.baddbmm_(a, b, alpha=factor)
        else:
            total.add_(operation(a, b), alpha=factor)

    velocity, acceleration = second_order(x, w)
    return total_of(operation, add_product, velocity), total_of(operation, add_product, acceleration)


@rule("mul")
def _mul(_: OpOverload, x: Any, w: Any) -> Any:
    velocity, acceleration = (total_of(torch.mul, _add_elementwise, terms) for terms in second_order(x, w))
    return as_jet(derivatives(x)[0] * derivatives(w)[0], velocity, acceleration)


def _add_elementwise(total: Tensor, a: Any, b: Any, factor: int) -> None:
    if a.dtype == b.dtype == total.dtype and a.dim() and b.dim():
        total.addcmul_(a, b, value=factor)
    else:
        total.add_(a * b, alpha=factor)


@rule("div")
def _div(operation: OpOverload, x: Any, y: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None:
        return operation(derivatives(x)[0], derivatives(y)[0], rounding_mode=rounding_mode)
    if not isinstance(y, Jet):
        return as_jet(*(None if part is None else part / y for part in derivatives(x)))  # type: ignore[arg-type]
    x0, x1, x2 = derivatives(x)
    y0, y1, y2 = derivatives(y)
    # q y = x, differentiated twice
    value = x0 / y0
    velocity = scaled(plus(x1, None if y1 is None else -(value * y1)), 1)
    velocity = None if velocity is None else velocity / y0
    acceleration = None
    if wants_acceleration():
        if y1 is not None and velocity is not None:
            x2 = plus(x2, -2 * velocity * y1)
        if y2 is not None:
            x2 = plus(x2, -(value * y2))
        acceleration = None if x2 is None else x2 / y0
    return as_jet(value, velocity, acceleration)


@rule("mm", "bmm", "dot", "mv", "vdot")
def matrix_product(operation: OpOverload, x: Any, w: Any) -> Any:
    """The product, its derivatives in memory of their own."""
    return as_jet(operation(derivatives(x)[0], derivatives(w)[0]), *_moved_product(operation, x, w))


@rule("addmm", "baddbmm", "addmv", "addr")
def _added_product(operation: OpOverload, bias: Any, x: Any, w: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    products = {"addmm": aten.mm, "baddbmm": aten.bmm, "addmv": aten.mv, "addr": aten.outer}
    moved = _moved_product(products[name_of(operation)].default, x, w)
    b0, b1, b2 = derivatives(bias)
    value = operation(b0, derivatives(x)[0], derivatives(w)[0], beta=beta, alpha=alpha)
    return as_jet(value, *(_plus_bias(m, b, alpha, beta) for m, b in zip(moved, (b1, b2), strict=True)))


def _plus_bias(product: Tensor | None, bias: Tensor | None, alpha: Any = 1, beta: Any = 1) -> Tensor | None:
    """`alpha * product + beta * bias`, in the memory of the product."""
    if product is None:
        return scaled(bias, beta)
    if alpha != 1:
        product.mul_(alpha)
    return product if bias is None else product.add_(bias, alpha=beta)


@rule("addcmul")
def _addcmul(_: OpOverload, x: Any, a: Any, b: Any, *, value: Any = 1) -> Any:
    return torch.add(x, a * b, alpha=value)


@rule("addcdiv")
def _addcdiv(_: OpOverload, x: Any, a: Any, b: Any, *, value: Any = 1) -> Any:
    return torch.add(x, a / b, alpha=value)


@rule("lerp")
def _lerp(_: OpOverload, start: Any, end: Any, weight: Any) -> Any:
    return start + weight * (end - start)


@rule("_trilinear")
def _trilinear(_: OpOverload, a: Any, b: Any, c: Any, *settings: Any) -> Any:
    *expanded, summed = settings[:4]
    for axis in expanded[0]:
        a = a.unsqueeze(axis)
    for axis in expanded[1]:
        b = b.unsqueeze(axis)
    for axis in expanded[2]:
        c = c.unsqueeze(axis)
    return (a * b * c).sum(summed)


@rule("convolution")
def _convolution(operation: OpOverload, x: Any, w: Any, bias: Any, *settings: Any) -> Any:
    (b0, b1, b2), x0, w0 = derivatives(bias), derivatives(x)[0], derivatives(w)[0]
    value = operation(x0, w0, b0, *settings)
    velocity, acceleration = _moved_product(lambda a, b: operation(a, b, None, *settings), x, w)
    for_channels = (1, -1) + (1,) * (value.dim() - 2)
    b1, b2 = (None if b is None else b.view(for_channels) for b in (b1, b2))
    return as_jet(value, _plus_bias(velocity, b1), _plus_bias(acceleration, b2))


@rule("where")
def _where(_: OpOverload, condition: Any, x: Any, y: Any) -> Any:
    condition = derivatives(condition)[0]
    (x0, x1, x2), (y0, y1, y2) = derivatives(x), derivatives(y)

    def choose(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return None if a is None and b is None else torch.where(condition, _or_zero(a), _or_zero(b))

    return as_jet(torch.where(condition, x0, y0), choose(x1, y1), choose(x2, y2))


def _or_zero(x: Any) -> Any:
    return 0.0 if x is None else x


@rule("masked_fill")
def _masked_fill(_: OpOverload, x: Any, mask: Tensor, fill: Any) -> Any:
    if isinstance(fill, Jet):
        return torch.where(mask, fill, x)
    x0, x1, x2 = derivatives(x)
    return as_jet(x0.masked_fill(mask, fill), *(d if d is None else d.masked_fill(mask, 0) for d in (x1, x2)))


@rule("copy", "fill")
def _copy(_: OpOverload, target: Any, source: Any, *args: Any) -> Any:
    value = derivatives(target)[0]
    s0, s1, s2 = derivatives(source)
    return as_jet(torch.empty_like(value).copy_(torch.as_tensor(s0)), s1, s2)


def _jointly_linear(*positions: int) -> Callable[..., Any]:
    """A rule for operators that are linear in several arguments together: `index_put`, `scatter`, ..."""

    def apply(operation: OpOverload, *args: Any, **kwargs: Any) -> Any:
        values = [derivatives(argument)[0] for argument in args]

        def at(k: int) -> Tensor | None:
            parts = list(values)
            if all(derivatives(args[i])[k] is None for i in positions if i < len(args)):
                return None
            for i in positions:
                part = derivatives(args[i])[k]
                if part is None:
                    part = torch.zeros_like(values[i]) if isinstance(values[i], Tensor) else 0
                parts[i] = part
            result: Tensor = operation(*parts, **kwargs)
            return result

        return as_jet(operation(*values, **kwargs), at(1), at(2))

    return apply


RULES.update(
    index_put=_jointly_linear(0, 2),
    _unsafe_index_put=_jointly_linear(0, 2),
    index_add=_jointly_linear(0, 3),
    index_copy=_jointly_linear(0, 3),
    scatter=_jointly_linear(0, 3),
    scatter_add=_jointly_linear(0, 3),
    slice_scatter=_jointly_linear(0, 1),
    select_scatter=_jointly_linear(0, 1),
    diagonal_scatter=_jointly_linear(0, 1),
    masked_scatter=_jointly_linear(0, 2),
)


@rule("native_dropout")
def _native_dropout(operation: OpOverload, x: Any, p: float, train: bool | None) -> Any:
    x0, x1, x2 = derivatives(x)
    value, mask = operation(x0, p, train)
    scale = (0.0 if p == 1 else 1 / (1 - p)) if train or train is None else 1.0
    return as_jet(value, *(None if d is None else d * mask * scale for d in (x1, x2))), mask
