"""Operators that are linear in several arguments together, or in one argument under a condition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gen_dist.jets.jet import Jet, UnsupportedOperation, as_jet, derivatives
from gen_dist.jets.registry import rule
from gen_dist.jets.rules.products import moved_product
from gen_dist.jets.rules.terms import mapped
from gen_dist.torch_private import Operator, arguments_by_name, schema_of


@rule("where")
def _where(_: Operator, condition: Any, x: Any, y: Any) -> Any:
    condition = derivatives(condition)[0]
    (x0, x1, x2), (y0, y1, y2) = derivatives(x), derivatives(y)

    def choose(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return None if a is None and b is None else torch.where(condition, _or_zero(a), _or_zero(b))

    return as_jet(torch.where(condition, x0, y0), choose(x1, y1), choose(x2, y2))


def _or_zero(x: Any) -> Any:
    return 0.0 if x is None else x


@rule("masked_fill")
def _masked_fill(_: Operator, x: Any, mask: Tensor, fill: Any) -> Any:
    if isinstance(fill, Jet):
        return torch.where(mask, fill, x)
    return mapped(derivatives(x)[0].masked_fill(mask, fill), lambda d: d.masked_fill(mask, 0), x)


@rule("copy", "fill")
def _copy(_: Operator, target: Any, source: Any, *args: Any) -> Any:
    value = derivatives(target)[0]
    s0, s1, s2 = derivatives(source)
    return as_jet(torch.empty_like(value).copy_(torch.as_tensor(s0)), s1, s2)


@rule("native_dropout")
def _native_dropout(operator: Operator, x: Any, p: float, train: bool | None) -> Any:
    value, mask = operator(derivatives(x)[0], p, train)
    scale = (0.0 if p == 1 else 1 / (1 - p)) if train or train is None else 1.0
    return mapped(value, lambda d: d * mask * scale, x), mask


@rule("embedding")
def _embedding(
    operator: Operator, weight: Any, indices: Tensor, padding: int = -1, scaled: bool = False, sparse: bool = False
) -> Any:
    """Rows of a table. Autograd stops derivatives at those for padding, although their values are used."""
    if scaled:
        raise UnsupportedOperation(operator, "with scale_grad_by_freq takes another gradient than that of its output")

    def rows(d: Tensor) -> Tensor:
        found: Tensor = operator(d, indices)
        return found if padding < 0 else found.masked_fill_((indices == padding).unsqueeze(-1), 0)

    return mapped(operator(derivatives(weight)[0], indices), rows, weight)


@rule("_pack_padded_sequence")
def _pack_padded_sequence(operator: Operator, x: Any, lengths: Tensor, batch_first: bool) -> Any:
    value, sizes = operator(derivatives(x)[0], lengths, batch_first)
    return mapped(value, lambda d: operator(d, lengths, batch_first)[0], x), sizes


@rule("_embedding_bag", "_embedding_bag_forward_only")
def _embedding_bag(operator: Operator, weight: Any, *args: Any, **kwargs: Any) -> Any:
    given = arguments_by_name(operator, weight, *args, **kwargs)
    if given.get("scale_grad_by_freq"):
        raise UnsupportedOperation(operator, "with scale_grad_by_freq takes another gradient than that of its output")
    names = [argument.name for argument in schema_of(operator).arguments[1:]]
    settings = {name: given[name] for name in names if name in given}
    factors = settings.pop("per_sample_weights", None)
    w0, f0 = derivatives(weight)[0], derivatives(factors)[0]
    value, *rest = operator(w0, **settings, per_sample_weights=f0)
    if given.get("mode", 0) == 2:
        largest, empty = rest[2], (rest[1] == 0).unsqueeze(-1)
        return mapped(value, lambda d: d.gather(0, largest.clamp_min(0)).masked_fill_(empty, 0), weight), *rest

    def bags(d: Tensor, f: Tensor | None) -> Tensor:
        found: Tensor = operator(d, **settings, per_sample_weights=f)[0]
        return found

    if not isinstance(factors, Jet):
        return mapped(value, lambda d: bags(d, f0), weight), *rest
    return as_jet(value, *moved_product(bags, weight, factors)), *rest


@rule("rrelu_with_noise", "rrelu_with_noise_functional")
def _rrelu(operator: Operator, x: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Negative numbers times random slopes. The operator writes them into `noise`, with 1 for the other numbers."""
    given = arguments_by_name(operator, x, noise, *args, **kwargs)
    result = operator(derivatives(x)[0], noise, *args, **kwargs)
    value, *rest = result if isinstance(result, tuple) else (result,)
    mean = (given["lower"] + given["upper"]) / 2
    x0 = derivatives(x)[0]
    slope = (rest[0] if rest else noise) if given["training"] else torch.where(x0 > 0, torch.ones_like(x0), mean)
    jet = mapped(value, lambda d: d * slope, x)
    return (jet, *rest) if rest else jet


def _jointly_linear(*positions: int) -> Callable[..., Any]:
    """Return the operator rule of an operator that is linear in the arguments at these positions together."""

    def apply(operator: Operator, *args: Any, **kwargs: Any) -> Any:
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
            result: Tensor = operator(*parts, **kwargs)
            return result

        return as_jet(operator(*values, **kwargs), at(1), at(2))

    return apply


rule("slice_scatter", "select_scatter", "diagonal_scatter")(_jointly_linear(0, 1))
rule("index_put", "_unsafe_index_put", "masked_scatter")(_jointly_linear(0, 2))
rule("index_add", "index_copy", "scatter", "scatter_add")(_jointly_linear(0, 3))


@rule(
    "avg_pool2d_backward",
    "avg_pool3d_backward",
    "_adaptive_avg_pool2d_backward",
    "_adaptive_avg_pool3d_backward",
    "max_pool2d_with_indices_backward",
    "max_pool3d_with_indices_backward",
    "embedding_dense_backward",
)
def _gradient_of_linear(operator: Operator, gradient: Any, *others: Any) -> Any:
    """Where a loss takes a gradient itself. Of what the operator was applied to, only the shape counts."""
    others = tuple(derivatives(x)[0] for x in others)
    return mapped(operator(derivatives(gradient)[0], *others), lambda d: operator(d, *others), gradient)
