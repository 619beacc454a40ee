"""Sums of products of derivatives, where None means zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gen_dist.jets.jet import applied, as_jet, derivatives, wants_acceleration


def times(a: Any, b: Any) -> Any:
    return None if a is None or b is None else a * b


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def scaled(x: Any, factor: Any) -> Any:
    return x if x is None or factor == 1 else x * factor


def mapped(value: Tensor, linear: Callable[[Tensor], Tensor], x: Any) -> Any:
    """Return the jet of `value`, whose derivatives are those of `x` under a linear function."""
    _, x1, x2 = derivatives(x)
    return as_jet(value, applied(linear, x1), applied(linear, x2))


def memory_order(x: Tensor) -> torch.memory_format:
    """Return the order in which kernels for images return what they compute from `x`."""
    for order, dim in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
        if x.dim() == dim and x.is_contiguous(memory_format=order) and not x.is_contiguous():
            return order
    return torch.contiguous_format


Term = tuple[int, Any, Any]


def second_order(x: Any, w: Any) -> tuple[list[Term], list[Term]]:
    """Return the terms `factor * a * b` of the velocity and of the acceleration of a product, without zero terms."""
    (x0, x1, x2), (w0, w1, w2) = derivatives(x), derivatives(w)
    velocity = [(1, x1, w0), (1, x0, w1)]
    acceleration = [(1, x2, w0), (1, x0, w2), (2, x1, w1)] if wants_acceleration() else []

    def present(terms: list[Term]) -> list[Term]:
        return [term for term in terms if term[1] is not None and term[2] is not None]

    return present(velocity), present(acceleration)


def total_of(
    product: Callable[[Any, Any], Tensor], add_product: Callable[[Tensor, Any, Any, int], Any], terms: list[Term]
) -> Tensor | None:
    """Return the sum of the terms as a new tensor. `add_product(total, a, b, factor)` adds one of them in place."""
    if not terms:
        return None
    (factor, a, b), *others = terms
    total = product(a, b)
    if factor != 1:
        total.mul_(factor)
    for factor, a, b in others:
        add_product(total, a, b, factor)
    return total
