"""Selections, reductions along dimensions, softmax."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from gen_dist.jets.jet import Jet, UnsupportedOperation, as_jet, derivatives, wants_acceleration
from gen_dist.jets.registry import RULES, aten, name_of, rule
from gen_dist.jets.rules.elementwise import chain
from gen_dist.jets.rules.terms import plus, times


@rule("maximum", "minimum", "fmax", "fmin")
def _extremum(operation: OpOverload, x: Any, y: Any) -> Any:
    """The larger (smaller) of two; where they are equal, the mean of their derivatives, as in autograd."""
    (x0, x1, x2), (y0, y1, y2) = derivatives(x), derivatives(y)
    value = operation(x0, y0)
    share = (value == x0).to(value.dtype)
    share = share / (share + (value == y0).to(value.dtype)).clamp_min(1)

    def mixed(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return plus(times(share, a), times(1 - share, b))

    return as_jet(value, mixed(x1, y1), mixed(x2, y2))


@rule("amax", "amin")
def _extreme(operation: OpOverload, x: Any, dim: Any = (), keepdim: bool = False) -> Any:
    """The largest (smallest) along dimensions; of several equal ones the mean, as in autograd."""
    x0, x1, x2 = derivatives(x)
    dims = list(dim) if isinstance(dim, (list, tuple)) else [dim]
    dims = dims or list(range(x0.dim()))
    value = operation(x0, dims, True)
    share = (x0 == value).to(x0.dtype)
    share = share / share.sum(dims, keepdim=True) if dims else share
    moved = (None if d is None else (share * d).sum(dims, keepdim=keepdim) if dims else share * d for d in (x1, x2))
    return as_jet(operation(x0, dims, keepdim) if dims else value, *moved)


@rule("max", "min")
def _max(operation: OpOverload, x: Any, *args: Any, **kwargs: Any) -> Any:
    if not args and not kwargs:
        return _extreme(getattr(aten, "a" + name_of(operation)).default, x)
    if isinstance(args[0], Tensor):
        return getattr(torch, name_of(operation) + "imum")(x, args[0])
    return _selected(operation, x, *args, **kwargs)


@rule("topk", "sort", "median", "nanmedian", "kthvalue", "mode", "cummax", "cummin")
def _selected(operation: OpOverload, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Operators that return values and where along a dimension they were found."""
    x0, x1, x2 = derivatives(x)
    values, indices = operation(x0, *args, **kwargs)
    names = [argument.name for argument in operation._schema.arguments]
    bound: dict[str, Any] = {a.name: a.default_value for a in operation._schema.arguments if a.has_default_value()}
    bound |= dict(zip(names[1:], args, strict=False)) | kwargs
    if "dim" not in bound:
        raise UnsupportedOperation(operation)
    dim: Any = bound["dim"]
    dropped = values.dim() < x0.dim()

    def pick(d: Tensor | None) -> Tensor | None:
        if d is None:
            return None
        if dropped:
            return d.gather(dim, indices.unsqueeze(dim)).squeeze(dim)
        return d.gather(dim, indices) if d.dim() else d

    return as_jet(values, pick(x1), pick(x2)), indices


def _pooled(spatial: int) -> Callable[..., Any]:
    """Maximum over windows of the last `spatial` dimensions: derivatives are those at the places found."""

    def apply(operation: OpOverload, x: Any, *args: Any, **kwargs: Any) -> Any:
        x0, x1, x2 = derivatives(x)
        if x0.device.type == "cpu" and x0.dim() == 4:  # where its kernel is vectorised over channels alone
            x0 = x0.contiguous(memory_format=torch.channels_last)
        values, indices = (result.contiguous() for result in operation(x0, *args, **kwargs))
        flat = indices.flatten(-spatial)

        def pick(d: Tensor | None) -> Tensor | None:
            return None if d is None else d.flatten(-spatial).gather(-1, flat).view(values.shape)

        return as_jet(values, pick(x1), pick(x2)), indices

    return apply


RULES.update(
    max_pool2d_with_indices=_pooled(2),
    max_pool3d_with_indices=_pooled(3),
    adaptive_max_pool2d=_pooled(2),
    adaptive_max_pool3d=_pooled(3),
)


@rule("prod")
def _prod(_: OpOverload, x: Any, dim: int | None = None, keepdim: bool = False, **kwargs: Any) -> Any:
    """By halves, so that zeros among the factors do no harm."""
    if dim is None:
        x, dim = x.flatten(), 0
    while x.size(dim) > 1:
        half = x.size(dim) // 2
        halves = x.narrow(dim, 0, half) * x.narrow(dim, half, half)
        rest = x.narrow(dim, 2 * half, x.size(dim) - 2 * half)
        x = torch.cat([halves, rest], dim) if rest.size(dim) else halves
    return x if keepdim else x.squeeze(dim)


def _softmax_means(y: Tensor, dim: int, x1: Any, x2: Any) -> tuple[Any, Any, Any, Any]:
    """With probabilities `y`: `m1 = E x1`, `u = x1 - m1`, `t = u^2 + x2` and `m2 = E t`; `u` and `t` are new."""
    m1 = u = t = m2 = None
    if x1 is not None:
        m1 = (y * x1).sum(dim, keepdim=True)
        u = x1 - m1
    if wants_acceleration():
        t = x2.clone() if u is None else u * u if x2 is None else torch.addcmul(x2, u, u)
        m2 = (y * t).sum(dim, keepdim=True)
    return m1, u, t, m2


@rule("_softmax", "_safe_softmax")
def _softmax(operation: OpOverload, x: Any, dim: int, *args: Any, **kwargs: Any) -> Any:
    x0, x1, x2 = derivatives(x)
    y = operation(x0, dim, *args, **kwargs)
    _, u, t, m2 = _softmax_means(y, dim, x1, x2)
    return as_jet(y, None if u is None else u.mul_(y), None if t is None else t.sub_(m2).mul_(y))


@rule("_log_softmax")
def _log_softmax(operation: OpOverload, x: Any, dim: int, *args: Any, **kwargs: Any) -> Any:
    x0, x1, x2 = derivatives(x)
    value = operation(x0, dim, *args, **kwargs)
    _, u, _, m2 = _softmax_means(torch.exp(value), dim, x1, x2)
    acceleration = None if m2 is None else (-m2).expand(value.shape) if x2 is None else x2 - m2
    return as_jet(value, u, acceleration)


@rule("logsumexp")
def _logsumexp(operation: OpOverload, x: Any, dim: Any, keepdim: bool = False) -> Any:
    x0, x1, x2 = derivatives(x)
    value = operation(x0, dim, True)
    m1, _, _, m2 = _softmax_means(torch.exp(x0 - value), dim, x1, x2)
    dims = [dim] if isinstance(dim, int) else list(dim)
    kept = (d if keepdim or d is None else d.squeeze(dims) for d in (m1, m2))
    return as_jet(value if keepdim else value.squeeze(dims), *kept)


@rule("var", "std")
def _variance(
    operation: OpOverload,
    x: Any,
    dim: Any = None,
    unbiased: bool | None = None,
    keepdim: bool = False,
    *,
    correction: Any = None,
) -> Any:
    if isinstance(dim, bool):  # the overload (x, unbiased)
        dim, unbiased = None, dim
    if correction is None:
        correction = 1 if unbiased is None else int(unbiased)
    dims = list(range(x.dim())) if not dim and dim != 0 else [dim] if isinstance(dim, int) else list(dim)
    count = math.prod(x.size(d) for d in dims)
    centred = x - x.mean(dims, keepdim=True)
    variance = (centred * centred).sum(dims, keepdim=keepdim) / max(count - correction, 0)
    return variance if name_of(operation) == "var" else torch.sqrt(variance)


@rule("var_mean", "std_mean")
def _variance_and_mean(operation: OpOverload, x: Any, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
    keepdim = kwargs.get("keepdim", args[1] if len(args) > 1 else False)
    spread = getattr(torch, name_of(operation).removesuffix("_mean"))(x, dim, *args, **kwargs)
    dims = list(range(x.dim())) if not dim and dim != 0 else dim
    return spread, x.mean(dims, keepdim=keepdim)


@rule("linalg_vector_norm", "norm")
def _norm(operation: OpOverload, x: Any, p: Any = 2, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    p = 2 if p is None else p
    dims = list(range(x.dim())) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    if p == 2:
        return _root(_sum(x * x, dims, keepdim))
    if p == 1:
        return _sum(x.abs(), dims, keepdim)
    if p == math.inf:
        return x.abs().amax(dims, keepdim)
    if p in (0, -math.inf):
        raise UnsupportedOperation(operation)
    return _sum(x.abs() ** p, dims, keepdim) ** (1 / p)


def _sum(x: Any, dims: list[int], keepdim: bool) -> Any:
    return x.sum(dims, keepdim=keepdim) if dims else x


def _root(x: Any) -> Any:
    """Square root whose derivatives at zero are zero, as autograd has it for norms."""
    if not isinstance(x, Jet):
        return torch.sqrt(x)
    y = torch.sqrt(x.value)
    at_zero = x.value == 0
    slope = (0.5 / y).masked_fill_(at_zero, 0)
    return chain(y, lambda v: slope * v, lambda: (-0.25 / (y * x.value)).masked_fill_(at_zero, 0), x)
