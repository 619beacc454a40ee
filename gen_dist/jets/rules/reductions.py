"""Extrema, selections, softmax, and reductions along dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gen_dist.jets.jet import Jet, NotCovered, as_jet, derivatives, wants_acceleration
from gen_dist.jets.registry import aten, rule
from gen_dist.jets.rules.elementwise import chain
from gen_dist.jets.rules.terms import mapped, memory_order, plus, times
from gen_dist.jets.unwritten import through_autograd
from gen_dist.torch_private import Operator, arguments_by_name, name_of


def _dimensions(dim: Any, x: Tensor) -> list[int]:
    """Return the dimensions that an operator reduces, given its argument `dim`. None and `()` mean all."""
    if isinstance(dim, int):
        return [dim]
    return list(dim) if dim else list(range(x.dim()))


@rule("maximum", "minimum", "fmax", "fmin")
def _extremum(operator: Operator, x: Any, y: Any) -> Any:
    """The larger (smaller) of two elements. Equal elements share the derivatives, as in autograd."""
    (x0, x1, x2), (y0, y1, y2) = derivatives(x), derivatives(y)
    value = operator(x0, y0)
    share = (value == x0).to(value.dtype)
    share = share / (share + (value == y0).to(value.dtype)).clamp_min(1)

    def mixed(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return plus(times(share, a), times(1 - share, b))

    return as_jet(value, mixed(x1, y1), mixed(x2, y2))


@rule("amax", "amin")
def _extreme(operator: Operator, x: Any, dim: Any = (), keepdim: bool = False) -> Any:
    """The largest (smallest) element along dimensions. Equal elements share the derivatives, as in autograd."""
    x0 = derivatives(x)[0]
    dims = _dimensions(dim, x0)
    if not dims:  # a tensor without dimensions
        return x.clone()
    share = (x0 == operator(x0, dims, True)).to(x0.dtype)
    share = share / share.sum(dims, keepdim=True)
    return mapped(operator(x0, dims, keepdim), lambda d: (share * d).sum(dims, keepdim=keepdim), x)


@rule("max", "min")
def _max(operator: Operator, x: Any, *args: Any, **kwargs: Any) -> Any:
    if not args and not kwargs:
        return _extreme(getattr(aten, "a" + name_of(operator)).default, x)
    if isinstance(args[0], Tensor):
        return getattr(torch, name_of(operator) + "imum")(x, args[0])
    return _selected(operator, x, *args, **kwargs)


@rule("topk", "sort", "median", "nanmedian", "kthvalue", "mode", "cummax", "cummin")
def _selected(operator: Operator, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Selected elements and their indices along a dimension."""
    dim: Any = arguments_by_name(operator, x, *args, **kwargs).get("dim")
    if dim is None:
        raise NotCovered
    x0 = derivatives(x)[0]
    values, indices = operator(x0, *args, **kwargs)
    dropped = values.dim() < x0.dim()

    def pick(d: Tensor) -> Tensor:
        if dropped:
            return d.gather(dim, indices.unsqueeze(dim)).squeeze(dim)
        return d.gather(dim, indices) if d.dim() else d

    return mapped(values, pick, x), indices


def _pooled(spatial: int) -> Callable[..., Any]:
    """Return the operator rule of a maximum over windows of the last `spatial` dimensions."""

    def apply(operator: Operator, x: Any, *args: Any, **kwargs: Any) -> Any:
        x0 = derivatives(x)[0]
        order = memory_order(x0)
        if x0.device.type == "cpu" and x0.dim() == 4:  # the CPU kernel is only vectorised over channels
            x0 = x0.contiguous(memory_format=torch.channels_last)
        values, indices = (result.contiguous(memory_format=order) for result in operator(x0, *args, **kwargs))
        flat = indices.flatten(-spatial)

        def pick(d: Tensor) -> Tensor:
            return d.flatten(-spatial).gather(-1, flat).view(values.shape)

        return mapped(values, pick, x), indices

    return apply


rule("max_pool2d_with_indices", "adaptive_max_pool2d")(_pooled(2))
rule("max_pool3d_with_indices", "adaptive_max_pool3d")(_pooled(3))


@rule("prod")
def _prod(_: Operator, x: Any, dim: int | None = None, keepdim: bool = False, **kwargs: Any) -> Any:
    """The product of two halves, repeated. Unlike a quotient by one factor, it allows factors that are zero."""
    if not x.dim():
        return x.clone()
    if dim is None:
        x, dim = x.flatten(), 0
    while x.size(dim) > 1:
        half = x.size(dim) // 2
        halves = x.narrow(dim, 0, half) * x.narrow(dim, half, half)
        rest = x.narrow(dim, 2 * half, x.size(dim) - 2 * half)
        x = torch.cat([halves, rest], dim) if rest.size(dim) else halves
    return x if keepdim else x.squeeze(dim)


def _softmax_means(y: Tensor, dim: int | list[int], x1: Any, x2: Any) -> tuple[Any, Any, Any, Any]:
    """Return `m1 = E x1`, `u = x1 - m1`, `t = u^2 + x2` and `m2 = E t` for probabilities `y`. `u` and `t` are new.

    They give `y' = y u` and `y'' = y (t - m2)`. The log of the sum of `exp(x)` has derivatives `m1` and `m2`.
    """
    m1 = u = t = m2 = None
    if x1 is not None:
        m1 = (y * x1).sum(dim, keepdim=True)
        u = x1 - m1
    if wants_acceleration():
        t = x2.clone() if u is None else u * u if x2 is None else torch.addcmul(x2, u, u)
        m2 = (y * t).sum(dim, keepdim=True)
    return m1, u, t, m2


@rule("_softmax", "_safe_softmax")
def _softmax(operator: Operator, x: Any, dim: int, *args: Any, **kwargs: Any) -> Any:
    x0, x1, x2 = derivatives(x)
    y = operator(x0, dim, *args, **kwargs)
    _, u, t, m2 = _softmax_means(y, dim, x1, x2)
    return as_jet(y, None if u is None else u.mul_(y), None if t is None else t.sub_(m2).mul_(y))


@rule("_log_softmax")
def _log_softmax(operator: Operator, x: Any, dim: int, *args: Any, **kwargs: Any) -> Any:
    x0, x1, x2 = derivatives(x)
    value = operator(x0, dim, *args, **kwargs)
    _, u, _, m2 = _softmax_means(torch.exp(value), dim, x1, x2)
    acceleration = None if m2 is None else (-m2).expand(value.shape) if x2 is None else x2 - m2
    return as_jet(value, u, acceleration)


@rule("logsumexp")
def _logsumexp(operator: Operator, x: Any, dim: Any, keepdim: bool = False) -> Any:
    x0, x1, x2 = derivatives(x)
    dims = _dimensions(dim, x0)
    value = operator(x0, dims, True)
    m1, _, _, m2 = _softmax_means(torch.exp(x0 - value), dims, x1, x2)
    kept = (d if keepdim or d is None else d.squeeze(dims) for d in (m1, m2))
    return as_jet(value if keepdim else value.squeeze(dims), *kept)


@rule("var", "std")
def _variance(
    operator: Operator,
    x: Any,
    dim: Any = None,
    unbiased: bool | None = None,
    keepdim: bool = False,
    *,
    correction: Any = None,
) -> Any:
    if isinstance(dim, bool):  # the overload `(x, unbiased)`
        dim, unbiased = None, dim
    if correction is None:
        correction = 1 if unbiased is None else int(unbiased)
    dims = _dimensions(dim, x)
    count = math.prod(x.size(d) for d in dims)
    centred = x - x.mean(dims, keepdim=True)
    variance = (centred * centred).sum(dims, keepdim=keepdim) / max(count - correction, 0)
    return variance if name_of(operator) == "var" else _root(variance)


@rule("var_mean", "std_mean")
def _variance_and_mean(operator: Operator, x: Any, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
    keepdim = kwargs.get("keepdim", args[1] if len(args) > 1 else False)
    spread = getattr(torch, name_of(operator).removesuffix("_mean"))(x, dim, *args, **kwargs)
    return spread, x.mean(_dimensions(dim, x), keepdim=keepdim)


@rule("linalg_vector_norm", "norm")
def _norm(operator: Operator, x: Any, p: Any = 2, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    """The usual norms. PyTorch's own derivatives of the others know what is zero at zero."""
    p = 2 if p is None else p
    dims = _dimensions(dim, x)
    if p == 2:
        return _root(_sum(x * x, dims, keepdim))
    if p == 1:
        return _sum(x.abs(), dims, keepdim)
    if p == math.inf:
        return x.abs().amax(dims, keepdim)
    return through_autograd(operator, x, p, dim, keepdim, **kwargs)


def _sum(x: Any, dims: list[int], keepdim: bool) -> Any:
    return x.sum(dims, keepdim=keepdim) if dims else x


def _root(x: Any) -> Any:
    """Square root whose derivatives are zero at zero, as autograd has them for norms."""
    if not isinstance(x, Jet):
        return torch.sqrt(x)
    y = torch.sqrt(x.value)
    at_zero = x.value == 0
    slope = (0.5 / y).masked_fill_(at_zero, 0)
    return chain(y, lambda v: slope * v, lambda: (-0.25 / (y * x.value)).masked_fill_(at_zero, 0), x)
