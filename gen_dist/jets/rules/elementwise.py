"""Functions of one number that apply to each element, and functions of two numbers composed from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gen_dist.jets.jet import Jet, applied, as_jet, derivatives, wants_acceleration
from gen_dist.jets.registry import aten, refuse_jets, rule
from gen_dist.jets.rules.terms import times
from gen_dist.jets.unwritten import through_autograd
from gen_dist.torch_private import Operator


class Elementwise(NamedTuple):
    """Derivatives of `y = f(x, *arguments)`. The arguments do not move, and each function below receives them.

    `tangent(v, x, y, ...)` is `f'(x) v`. The Jacobian is diagonal, so the kernel of autograd's backward pass computes
    it. Without such a kernel, `first(x, y, ...)` is `f'(x)`. `second(x, y, ...)` is `f''(x)` as a new tensor, which
    the caller overwrites; None means that it is zero everywhere.
    """

    tangent: Callable[..., Tensor] | None = None
    first: Callable[..., Tensor] | None = None
    second: Callable[..., Tensor] | None = None


def chain(value: Tensor, tangent: Callable[[Tensor], Tensor], second: Callable[[], Tensor] | None, x: Jet) -> Any:
    """Return the jet of `value = f(x)`. `tangent(v)` is `f'(x) v`. The result of `second`, `f''(x)`, is overwritten."""
    _, x1, x2 = derivatives(x)
    acceleration = None
    if wants_acceleration():
        if second is not None and x1 is not None:  # comes first, since `second` needs the most memory
            acceleration = second().mul_(x1).mul_(x1)
        if x2 is not None:
            acceleration = tangent(x2) if acceleration is None else acceleration.add_(tangent(x2))
    return as_jet(value, applied(tangent, x1), acceleration)


def elementwise_rule(f: Elementwise) -> Callable[..., Any]:
    """Return the operator rule of an elementwise function of its first argument."""

    def apply(operator: Operator, x: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_jets(operator, (*args, *kwargs.values()))
        x0 = x.value
        y = operator(x0, *args, **kwargs)
        second = None if f.second is None else lambda: f.second(x0, y, *args, **kwargs)  # type: ignore[misc]
        if f.tangent is not None:
            return chain(y, lambda v: f.tangent(v, x0, y, *args, **kwargs), second, x)  # type: ignore[misc]
        assert f.first is not None
        slope = f.first(x0, y, *args, **kwargs)
        return chain(y, lambda v: slope * v, second, x)

    return apply


# Second derivatives. Activations are large, so each function holds as few tensors at a time as it can.


def _gelu_second(x: Tensor, y: Tensor, *, approximate: str = "none") -> Tensor:
    if approximate == "none":  # (2 - x^2) times the normal density
        square = x * x
        density = torch.mul(square, -0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
        return density.mul_(square.neg_().add_(2))
    # y = x s(u), s the logistic function, u = c x (1 + k x^2); with v = u' = c (1 + 3 k x^2), x u'' = 2 (v - c)
    c, k = 2 * math.sqrt(2 / math.pi), 0.044715
    v = (x * x).mul_(3 * c * k).add_(c)
    s = v.add(2 * c).mul_(x).div_(3).sigmoid_()
    second = s.mul(-2).add_(1).mul_(x).mul_(v).add_(4).mul_(v).sub_(2 * c)
    return second.mul_(_logistic_slope_(s))


def _silu_second(x: Tensor, y: Tensor) -> Tensor:
    s = torch.sigmoid(x)  # (s - s^2) (2 + x (1 - 2 s))
    second = s.mul(-2).add_(1).mul_(x).add_(2)
    return second.mul_(_logistic_slope_(s))


def _softplus_second(x: Tensor, y: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    straight = beta * x >= threshold
    return _logistic_slope_(torch.mul(x, beta).sigmoid_()).mul_(beta).masked_fill_(straight, 0)


def _mish_second(x: Tensor, y: Tensor) -> Tensor:  # (1 - t^2) s (2 + x (1 - s - 2 s t))
    t, s = torch.nn.functional.softplus(x).tanh_(), torch.sigmoid(x)
    second = t.mul(2).add_(1).mul_(s).sub_(1).mul_(x).sub_(2)
    return second.mul_(s).mul_(t.square_().sub_(1))


def _sigmoid_second(x: Tensor, y: Tensor) -> Tensor:
    return _logistic_slope_(y.clone()).mul_(1 - 2 * y)


def _tanh_second(x: Tensor, y: Tensor) -> Tensor:
    return (y * y).sub_(1).mul_(y).mul_(2)


def _logistic_slope_(s: Tensor) -> Tensor:
    """Overwrite `s` with `s - s^2`, the derivative of the logistic function."""
    return s.addcmul_(s, s, value=-1)


def _elu_second(x: Tensor, y: Tensor, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Tensor:
    return torch.where(x >= 0, 0.0, (alpha * scale * input_scale**2) * torch.exp(input_scale * x)).to(x.dtype)


def _inside(x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    inside = torch.ones_like(x, dtype=torch.bool)
    for bound, beyond in ((low, torch.lt), (high, torch.gt)):
        if bound is not None:
            inside &= ~beyond(x, bound)
    return inside.to(x.dtype)


_LN2, _LN10, _ERF = math.log(2), math.log(10), 2 / math.sqrt(math.pi)

ELEMENTWISE: dict[str, Elementwise] = {
    # piecewise linear or quadratic functions
    "relu": Elementwise(tangent=lambda v, x, y: aten.threshold_backward(v, x, 0)),
    "leaky_relu": Elementwise(tangent=lambda v, x, y, slope=0.01: aten.leaky_relu_backward(v, x, slope, False)),
    "threshold": Elementwise(tangent=lambda v, x, y, limit, fill: aten.threshold_backward(v, x, limit)),
    "hardtanh": Elementwise(tangent=lambda v, x, y, low=-1, high=1: aten.hardtanh_backward(v, x, low, high)),
    "hardshrink": Elementwise(tangent=lambda v, x, y, limit=0.5: aten.hardshrink_backward(v, x, limit)),
    "softshrink": Elementwise(tangent=lambda v, x, y, limit=0.5: aten.softshrink_backward(v, x, limit)),
    "clamp": Elementwise(first=lambda x, y, low=None, high=None: _inside(x, low, high)),
    "clamp_min": Elementwise(first=lambda x, y, low: _inside(x, low)),
    "clamp_max": Elementwise(first=lambda x, y, high: _inside(x, None, high)),
    "hardsigmoid": Elementwise(first=lambda x, y: ((x > -3) & (x < 3)).to(x.dtype) / 6),
    "hardswish": Elementwise(
        first=lambda x, y: torch.where((x > -3) & (x < 3), x / 3 + 0.5, (x >= 3).to(x.dtype)),
        second=lambda x, y: ((x > -3) & (x < 3)).to(x.dtype) / 3,
    ),
    # activations
    "gelu": Elementwise(tangent=lambda v, x, y, **how: aten.gelu_backward(v, x, **how), second=_gelu_second),
    "silu": Elementwise(tangent=lambda v, x, y: aten.silu_backward(v, x), second=_silu_second),
    "sigmoid": Elementwise(tangent=lambda v, x, y: aten.sigmoid_backward(v, y), second=_sigmoid_second),
    "tanh": Elementwise(tangent=lambda v, x, y: aten.tanh_backward(v, y), second=_tanh_second),
    "softplus": Elementwise(
        tangent=lambda v, x, y, beta=1, limit=20: aten.softplus_backward(v, x, beta, limit), second=_softplus_second
    ),
    "mish": Elementwise(tangent=lambda v, x, y: aten.mish_backward(v, x), second=_mish_second),
    "elu": Elementwise(
        tangent=lambda v, x, y, alpha=1, scale=1, inner=1: aten.elu_backward(v, alpha, scale, inner, False, x),
        second=_elu_second,
    ),
    "celu": Elementwise(
        tangent=lambda v, x, y, alpha=1: aten.elu_backward(v, alpha, 1, 1 / alpha, False, x),
        second=lambda x, y, alpha=1: _elu_second(x, y, alpha, 1, 1 / alpha),
    ),
    # elementary functions
    "exp": Elementwise(first=lambda x, y: y, second=lambda x, y: y.clone()),
    "exp2": Elementwise(first=lambda x, y: y * _LN2, second=lambda x, y: y * _LN2**2),
    "expm1": Elementwise(first=lambda x, y: y + 1, second=lambda x, y: y + 1),
    "log": Elementwise(first=lambda x, y: 1 / x, second=lambda x, y: -1 / (x * x)),
    "log2": Elementwise(first=lambda x, y: 1 / (x * _LN2), second=lambda x, y: -1 / (x * x * _LN2)),
    "log10": Elementwise(first=lambda x, y: 1 / (x * _LN10), second=lambda x, y: -1 / (x * x * _LN10)),
    "log1p": Elementwise(first=lambda x, y: 1 / (1 + x), second=lambda x, y: -1 / (1 + x).square()),
    "sqrt": Elementwise(first=lambda x, y: 0.5 / y, second=lambda x, y: -0.25 / (y * x)),
    "rsqrt": Elementwise(first=lambda x, y: -0.5 * y / x, second=lambda x, y: 0.75 * y / (x * x)),
    "reciprocal": Elementwise(first=lambda x, y: -y * y, second=lambda x, y: 2 * y * y * y),
    "sin": Elementwise(first=lambda x, y: torch.cos(x), second=lambda x, y: -y),
    "cos": Elementwise(first=lambda x, y: -torch.sin(x), second=lambda x, y: -y),
    "tan": Elementwise(first=lambda x, y: 1 + y * y, second=lambda x, y: 2 * y * (1 + y * y)),
    "sinh": Elementwise(first=lambda x, y: torch.cosh(x), second=lambda x, y: y.clone()),
    "cosh": Elementwise(first=lambda x, y: torch.sinh(x), second=lambda x, y: y.clone()),
    "atan": Elementwise(first=lambda x, y: 1 / (1 + x * x), second=lambda x, y: -2 * x / (1 + x * x).square()),
    "erf": Elementwise(
        first=lambda x, y: _ERF * torch.exp(-x * x), second=lambda x, y: -2 * _ERF * x * torch.exp(-x * x)
    ),
    "lgamma": Elementwise(first=lambda x, y: torch.digamma(x), second=lambda x, y: torch.polygamma(1, x)),
}
for _name, _function in ELEMENTWISE.items():
    rule(_name)(elementwise_rule(_function))


def _slope_of_power(x: Tensor, exponent: Any) -> Tensor:
    return torch.zeros_like(x) if exponent == 0 else exponent * torch.pow(x, exponent - 1)


_to_constant_power = elementwise_rule(
    Elementwise(
        first=lambda x, y, n: _slope_of_power(x, n),
        second=lambda x, y, n: torch.zeros_like(x) if n in (0, 1) else n * _slope_of_power(x, n - 1),
    )
)


@rule("abs")
def _abs(operator: Operator, x: Any) -> Any:
    if x.is_complex():  # the norm of a pair, whose derivatives are zero at zero
        return torch.linalg.vector_norm(torch.view_as_real(x), dim=-1)
    return _abs_of_real(operator, x)


_abs_of_real = elementwise_rule(Elementwise(first=lambda x, y: torch.sign(x)))


@rule("pow")
def _pow(operator: Operator, base: Any, exponent: Any) -> Any:
    if isinstance(base, Jet) and not isinstance(exponent, Tensor):
        return _to_constant_power(operator, base, exponent)
    return through_autograd(operator, base, exponent)


@rule("log_sigmoid_forward")
def _log_sigmoid(operator: Operator, x: Jet) -> Any:
    value, buffer = operator(x.value)
    s = torch.sigmoid(-x.value)
    return chain(value, lambda v: s * v, lambda: -s * (1 - s), x), buffer


@rule("log_sigmoid_backward")
def _log_sigmoid_backward(_: Operator, gradient: Any, x: Any, buffer: Any) -> Any:
    """Where a loss takes a gradient itself. The buffer holds a function of `x`, as if it were a constant."""
    return gradient * torch.sigmoid(-x)


@rule("_prelu_kernel")
def _prelu(_: Operator, x: Any, weight: Any) -> Any:
    """As `x` or `w x`. At zero, where the slope is `w`, autograd has no second derivative."""
    x0, x1, _ = derivatives(x)
    jet = torch.where(x0 > 0, x, weight * x)
    value, velocity, acceleration = derivatives(jet)
    mixed = times(x1, derivatives(weight)[1])
    if acceleration is None or mixed is None:
        return jet
    return as_jet(value, velocity, torch.where(x0 == 0, acceleration - 2 * mixed, acceleration))
