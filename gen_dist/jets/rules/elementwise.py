"""Functions of one number, applied to each element."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

from gen_dist.jets.jet import Jet, UnsupportedOperation, as_jet, derivatives, wants_acceleration
from gen_dist.jets.registry import RULES, aten, rule


class Elementwise(NamedTuple):
    """Derivatives of `f(x, *arguments)`; functions get `x0`, `f(x0)` and the arguments.

    `tangent(v, x, y, ...)` is `f'(x) v`: since the Jacobian is diagonal, the fused kernels that autograd has for its
    backward pass serve. Without one, `first(x, y, ...)` is `f'(x)`. `second` is `f''(x)`, None where that is zero;
    a tensor of its own, which may be overwritten.
    """

    tangent: Callable[..., Tensor] | None = None
    first: Callable[..., Tensor] | None = None
    second: Callable[..., Tensor] | None = None


def chain(value: Tensor, tangent: Callable[[Tensor], Tensor], second: Callable[[], Tensor] | None, x: Jet) -> Any:
    """`f(x)`: velocity `f' x1`, acceleration `f'' x1^2 + f' x2`. What `second` returns is overwritten."""
    _, x1, x2 = derivatives(x)
    acceleration = None
    if wants_acceleration():
        if second is not None and x1 is not None:  # first, as `second` needs most memory
            acceleration = second().mul_(x1).mul_(x1)
        if x2 is not None:
            acceleration = tangent(x2) if acceleration is None else acceleration.add_(tangent(x2))
    return as_jet(value, None if x1 is None else tangent(x1), acceleration)


def _register_elementwise(name: str, f: Elementwise) -> None:
    def apply(operation: OpOverload, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, Jet) or any(isinstance(argument, Jet) for argument in args):
            raise UnsupportedOperation(operation, "has a moving argument besides its first one")
        x0 = x.value
        y = operation(x0, *args, **kwargs)
        second = None if f.second is None else lambda: f.second(x0, y, *args, **kwargs)  # type: ignore[misc]
        if f.tangent is not None:
            return chain(y, lambda v: f.tangent(v, x0, y, *args, **kwargs), second, x)  # type: ignore[misc]
        assert f.first is not None
        slope = f.first(x0, y, *args, **kwargs)
        return chain(y, lambda v: slope * v, second, x)

    RULES[name] = apply


# Second derivatives: activations are large, so each is written with as few tensors at a time as it can be.


def _gelu_bend(x: Tensor, y: Tensor, *, approximate: str = "none") -> Tensor:
    if approximate == "none":  # (2 - x^2) times the normal density
        square = x * x
        density = torch.mul(square, -0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
        return density.mul_(square.neg_().add_(2))
    # y = x s(u), s the logistic function, u = c x (1 + k x^2); with v = u' = c (1 + 3 k x^2), x u'' = 2 (v - c)
    c, k = 2 * math.sqrt(2 / math.pi), 0.044715
    v = (x * x).mul_(3 * c * k).add_(c)
    s = v.add(2 * c).mul_(x).div_(3).sigmoid_()
    bend = s.mul(-2).add_(1).mul_(x).mul_(v).add_(4).mul_(v).sub_(2 * c)
    return bend.mul_(_logistic_slope_(s))


def _silu_bend(x: Tensor, y: Tensor) -> Tensor:
    s = torch.sigmoid(x)  # (s - s^2) (2 + x (1 - 2 s))
    bend = s.mul(-2).add_(1).mul_(x).add_(2)
    return bend.mul_(_logistic_slope_(s))


def _softplus_bend(x: Tensor, y: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    straight = beta * x > threshold
    return _logistic_slope_(torch.mul(x, beta).sigmoid_()).mul_(beta).masked_fill_(straight, 0)


def _mish_bend(x: Tensor, y: Tensor) -> Tensor:  # (1 - t^2) s (2 + x (1 - s - 2 s t))
    t, s = torch.nn.functional.softplus(x).tanh_(), torch.sigmoid(x)
    bend = t.mul(2).add_(1).mul_(s).sub_(1).mul_(x).sub_(2)
    return bend.mul_(s).mul_(t.square_().sub_(1))


def _sigmoid_bend(x: Tensor, y: Tensor) -> Tensor:
    return _logistic_slope_(y.clone()).mul_(1 - 2 * y)


def _tanh_bend(x: Tensor, y: Tensor) -> Tensor:
    return (y * y).sub_(1).mul_(y).mul_(2)


def _logistic_slope_(s: Tensor) -> Tensor:
    """`s - s^2`, in its place."""
    return s.addcmul_(s, s, value=-1)


def _elu_bend(x: Tensor, y: Tensor, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Tensor:
    return torch.where(x > 0, 0.0, (alpha * scale * input_scale**2) * torch.exp(input_scale * x)).to(x.dtype)


def _inside(x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    inside = torch.ones_like(x, dtype=torch.bool)
    for bound, beyond in ((low, torch.lt), (high, torch.gt)):
        if bound is not None:
            inside &= ~beyond(x, bound)
    return inside.to(x.dtype)


def _power(x: Tensor, exponent: Any) -> Tensor:
    return torch.zeros_like(x) if exponent == 0 else exponent * torch.pow(x, exponent - 1)


_LN2, _LN10, _ERF = math.log(2), math.log(10), 2 / math.sqrt(math.pi)

ELEMENTWISE: dict[str, Elementwise] = {
    # with corners: straight pieces
    "relu": Elementwise(tangent=lambda v, x, y: aten.threshold_backward(v, x, 0)),
    "leaky_relu": Elementwise(tangent=lambda v, x, y, slope=0.01: aten.leaky_relu_backward(v, x, slope, False)),
    "threshold": Elementwise(tangent=lambda v, x, y, limit, fill: aten.threshold_backward(v, x, limit)),
    "hardtanh": Elementwise(tangent=lambda v, x, y, low=-1, high=1: aten.hardtanh_backward(v, x, low, high)),
    "hardshrink": Elementwise(tangent=lambda v, x, y, limit=0.5: aten.hardshrink_backward(v, x, limit)),
    "softshrink": Elementwise(tangent=lambda v, x, y, limit=0.5: aten.softshrink_backward(v, x, limit)),
    "abs": Elementwise(first=lambda x, y: torch.sign(x)),
    "clamp": Elementwise(first=lambda x, y, low=None, high=None: _inside(x, low, high)),
    "clamp_min": Elementwise(first=lambda x, y, low: _inside(x, low)),
    "clamp_max": Elementwise(first=lambda x, y, high: _inside(x, None, high)),
    "hardsigmoid": Elementwise(first=lambda x, y: ((x > -3) & (x < 3)).to(x.dtype) / 6),
    "hardswish": Elementwise(
        first=lambda x, y: torch.where((x > -3) & (x < 3), x / 3 + 0.5, (x >= 3).to(x.dtype)),
        second=lambda x, y: ((x > -3) & (x < 3)).to(x.dtype) / 3,
    ),
    # activations
    "gelu": Elementwise(tangent=lambda v, x, y, **how: aten.gelu_backward(v, x, **how), second=_gelu_bend),
    "silu": Elementwise(tangent=lambda v, x, y: aten.silu_backward(v, x), second=_silu_bend),
    "sigmoid": Elementwise(tangent=lambda v, x, y: aten.sigmoid_backward(v, y), second=_sigmoid_bend),
    "tanh": Elementwise(tangent=lambda v, x, y: aten.tanh_backward(v, y), second=_tanh_bend),
    "softplus": Elementwise(
        tangent=lambda v, x, y, beta=1, limit=20: aten.softplus_backward(v, x, beta, limit), second=_softplus_bend
    ),
    "mish": Elementwise(tangent=lambda v, x, y: aten.mish_backward(v, x), second=_mish_bend),
    "elu": Elementwise(
        tangent=lambda v, x, y, alpha=1, scale=1, inner=1: aten.elu_backward(v, alpha, scale, inner, False, x),
        second=_elu_bend,
    ),
    "celu": Elementwise(
        tangent=lambda v, x, y, alpha=1: aten.elu_backward(v, alpha, 1, 1 / alpha, False, x),
        second=lambda x, y, alpha=1: _elu_bend(x, y, alpha, 1, 1 / alpha),
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
    "pow": Elementwise(
        first=lambda x, y, n: _power(x, n),
        second=lambda x, y, n: torch.zeros_like(x) if n == 1 else n * _power(x, n - 1),
    ),
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
    _register_elementwise(_name, _function)
_scalar_power = RULES["pow"]


@rule("pow")
def _pow(operation: OpOverload, base: Any, exponent: Any) -> Any:
    if isinstance(base, Jet) and not isinstance(exponent, Tensor):
        return _scalar_power(operation, base, exponent)
    return torch.exp(exponent * (torch.log(base) if isinstance(base, Tensor) else math.log(base)))


@rule("log_sigmoid_forward")
def _log_sigmoid(operation: OpOverload, x: Jet) -> Any:
    value, buffer = operation(x.value)
    s = torch.sigmoid(-x.value)
    return chain(value, lambda v: s * v, lambda: -s * (1 - s), x), buffer


@rule("_prelu_kernel")
def _prelu(_: OpOverload, x: Any, weight: Any) -> Any:
    return torch.where(derivatives(x)[0] > 0, x, weight * x)


@rule("atan2")
def _atan2(_: OpOverload, y: Any, x: Any) -> Any:
    turned = torch.atan2(derivatives(y)[0], derivatives(x)[0])
    # the angle near `turned`, which is constant: atan of the component across over the one along
    c, s = torch.cos(turned), torch.sin(turned)
    return turned + torch.atan((c * y - s * x) / (c * x + s * y))
