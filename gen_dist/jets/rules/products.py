"""Sums, products, matrix products and convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gen_dist.jets.jet import Jet, as_jet, derivatives, wants_acceleration
from gen_dist.jets.registry import aten, rule
from gen_dist.jets.rules.terms import plus, scaled, second_order, total_of
from gen_dist.torch_private import Operator, name_of


@rule("add", "sub", "rsub")
def _add(operator: Operator, x: Any, y: Any, alpha: Any = 1) -> Any:
    if name_of(operator) == "rsub":
        x, y = y, x
    (x0, x1, x2), (y0, y1, y2) = derivatives(x), derivatives(y)
    sign = 1 if name_of(operator) == "add" else -1
    factor = sign * alpha
    value = torch.add(x0, y0, alpha=factor) if isinstance(x0, Tensor) else torch.mul(y0, factor) + x0
    return as_jet(value, plus(x1, scaled(y1, factor)), plus(x2, scaled(y2, factor)))


def moved_product(product: Callable[[Any, Any], Tensor], x: Any, w: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return velocity and acceleration of a bilinear function, both as new tensors."""

    def add_product(total: Tensor, a: Any, b: Any, factor: int) -> None:
        if product is aten.mm.default:
            total.addmm_(a, b, alpha=factor)
        elif product is aten.bmm.default:
            total.baddbmm_(a, b, alpha=factor)
        else:
            total.add_(product(a, b), alpha=factor)

    velocity, acceleration = second_order(x, w)
    return total_of(product, add_product, velocity), total_of(product, add_product, acceleration)


@rule("mul")
def _mul(_: Operator, x: Any, w: Any) -> Any:
    velocity, acceleration = (total_of(torch.mul, _add_elementwise, terms) for terms in second_order(x, w))
    return as_jet(derivatives(x)[0] * derivatives(w)[0], velocity, acceleration)


def _add_elementwise(total: Tensor, a: Any, b: Any, factor: int) -> None:
    if a.dtype == b.dtype == total.dtype and a.dim() and b.dim():
        total.addcmul_(a, b, value=factor)
    else:
        total.add_(a * b, alpha=factor)


@rule("div")
def _div(operator: Operator, x: Any, y: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None:
        return operator(derivatives(x)[0], derivatives(y)[0], rounding_mode=rounding_mode)
    if not isinstance(y, Jet):
        return as_jet(*(None if part is None else part / y for part in derivatives(x)))  # type: ignore[arg-type]
    x0, x1, x2 = derivatives(x)
    y0, y1, y2 = derivatives(y)
    # The quotient q satisfies q y = x. Differentiated twice: q' y = x' - q y', and q'' y = x'' - 2 q' y' - q y''.
    value = x0 / y0
    velocity = plus(x1, None if y1 is None else -(value * y1))
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
def matrix_product(operator: Operator, x: Any, w: Any) -> Any:
    """Return the product. Its derivatives are new tensors, which the caller may overwrite."""
    return as_jet(operator(derivatives(x)[0], derivatives(w)[0]), *moved_product(operator, x, w))


@rule("addmm", "baddbmm", "addmv", "addr")
def _added_product(operator: Operator, bias: Any, x: Any, w: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    products = {"addmm": aten.mm, "baddbmm": aten.bmm, "addmv": aten.mv, "addr": aten.outer}
    moved = moved_product(products[name_of(operator)].default, x, w)
    b0, b1, b2 = derivatives(bias)
    value = operator(b0, derivatives(x)[0], derivatives(w)[0], beta=beta, alpha=alpha)
    return as_jet(value, *(_plus_bias(m, b, alpha, beta) for m, b in zip(moved, (b1, b2), strict=True)))


def _plus_bias(product: Tensor | None, bias: Tensor | None, alpha: Any = 1, beta: Any = 1) -> Tensor | None:
    """Return `alpha * product + beta * bias`. The product is overwritten."""
    if product is None:
        return scaled(bias, beta)
    if alpha != 1:
        product.mul_(alpha)
    return product if bias is None else product.add_(bias, alpha=beta)


@rule("_grouped_mm")
def _grouped_product(
    operator: Operator, x: Any, w: Any, offsets: Any = None, bias: Any = None, out_dtype: Any = None
) -> Any:
    """Products of groups of rows, as of the experts of a mixture, with a matrix for each group."""
    x0, w0 = derivatives(x)[0], derivatives(w)[0]
    b0, b1, b2 = derivatives(bias)

    def product(a: Tensor, b: Tensor) -> Tensor:  # the kernel asks for aligned rows, which a derivative need not have
        found: Tensor = operator(_laid_out(a, x0), _laid_out(b, w0), offsets, None, out_dtype)
        return found

    velocity, acceleration = moved_product(product, x, w)
    value = operator(x0, w0, offsets, b0, out_dtype)
    return as_jet(value, plus(velocity, b1), plus(acceleration, b2))


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    if x.stride() == like.stride():
        return x
    return torch.empty_strided(x.shape, like.stride(), dtype=x.dtype, device=x.device).copy_(x)


@rule("addcmul")
def _addcmul(_: Operator, x: Any, a: Any, b: Any, *, value: Any = 1) -> Any:
    return torch.add(x, a * b, alpha=value)


@rule("addcdiv")
def _addcdiv(_: Operator, x: Any, a: Any, b: Any, *, value: Any = 1) -> Any:
    return torch.add(x, a / b, alpha=value)


@rule("lerp")
def _lerp(_: Operator, start: Any, end: Any, weight: Any) -> Any:
    return start + weight * (end - start)


@rule("_trilinear")
def _trilinear(_: Operator, a: Any, b: Any, c: Any, *settings: Any) -> Any:
    *expanded, summed = settings[:4]
    for axis in expanded[0]:
        a = a.unsqueeze(axis)
    for axis in expanded[1]:
        b = b.unsqueeze(axis)
    for axis in expanded[2]:
        c = c.unsqueeze(axis)
    return (a * b * c).sum(summed)


@rule("convolution")
def _convolution(operator: Operator, x: Any, w: Any, bias: Any, *settings: Any) -> Any:
    (b0, b1, b2), x0, w0 = derivatives(bias), derivatives(x)[0], derivatives(w)[0]
    value = operator(x0, w0, b0, *settings)
    velocity, acceleration = moved_product(lambda a, b: operator(a, b, None, *settings), x, w)
    for_channels = (1, -1) + (1,) * (value.dim() - 2)
    b1, b2 = (None if b is None else b.view(for_channels) for b in (b1, b2))
    return as_jet(value, _plus_bias(velocity, b1), _plus_bias(acceleration, b2))


@rule("convolution_backward")
def _convolution_backward(
    operator: Operator, gradient: Any, x: Any, w: Any, bias_sizes: Any, *rest: Any
) -> tuple[Any, Any, Any]:
    """Where a loss takes a gradient itself: bilinear in it and the weight, or in it and the input."""
    *settings, wanted = rest
    x0, w0 = derivatives(x)[0], derivatives(w)[0]

    def of(index: int, a: Tensor, other: Tensor) -> Tensor:
        pair = (x0, other) if index == 0 else (other, w0)
        mask = [k == index for k in range(3)]
        found: Tensor = operator(a, *pair, bias_sizes, *settings, mask)[index]
        return found

    def moved(index: int, other: Any) -> Any:
        if not wanted[index]:
            return None
        value = of(index, derivatives(gradient)[0], derivatives(other)[0])
        return as_jet(value, *moved_product(lambda a, b: of(index, a, b), gradient, other))

    bias = gradient.sum([0, *range(2, gradient.dim())]) if wanted[2] else None
    return moved(0, w), moved(1, x), bias
