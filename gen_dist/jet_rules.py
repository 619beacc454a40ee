"""What each PyTorch operator does to the derivatives of a jet: one rule an operator.

Rules get the operator and its arguments, at least one of which is a moving `Jet`, and return jets. `x0, x1, x2` are
value, velocity and acceleration; `None` is zero. Derivatives are never changed in place once a rule has returned
them, so rules may share them. What has no rule here is taken apart by PyTorch's own decompositions into operators
that have one; what has neither is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch._ops import OpOverload

from gen_dist.jet import Jet, UnsupportedOperation, as_jet, derivatives, wants_acceleration

aten = torch.ops.aten

RULES: dict[str, Callable[..., Any]] = {}


def rule(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def name_of(operation: OpOverload) -> str:
    """`add` for `aten.add.Tensor`; with its namespace for operators outside ATen."""
    return operation._schema.name.removeprefix("aten::")


# Results that do not move with their arguments: booleans, integers, shapes, piecewise constant functions.
CONSTANT = frozenset(
    "eq ne lt le gt ge argmax argmin argsort isnan isinf isfinite isposinf isneginf sign sgn signbit floor ceil round "
    "trunc floor_divide logical_and logical_or logical_not logical_xor any all nonzero count_nonzero equal is_nonzero "
    "_local_scalar_dense bernoulli multinomial heaviside searchsorted bucketize one_hot zero item isclose allclose "
    "is_same_size bitwise_and bitwise_or bitwise_not bitwise_xor sym_size sym_stride sym_numel sym_storage_offset "
    "_assert_tensor_metadata _assert_async".split()
)

# New tensors in the likeness of a jet: they stand still until something is written into them.
FACTORIES = frozenset(
    "empty_like zeros_like ones_like full_like rand_like randn_like randint_like new_empty new_empty_strided new_zeros "
    "new_ones new_full".split()
)

# Linear in the first argument (a tensor or a list of them), the others standing still.
LINEAR = frozenset(
    "alias detach lift_fresh clone contiguous _to_copy view _unsafe_view _reshape_alias reshape t transpose permute "
    "expand squeeze unsqueeze slice select split split_with_sizes unsafe_split unsafe_split_with_sizes unsafe_chunk "
    "unbind diagonal narrow unfold as_strided flip roll rot90 repeat repeat_interleave tril triu trace diag_embed cat "
    "stack index index_select gather take masked_select embedding sum mean nansum cumsum neg constant_pad_nd "
    "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d "
    "avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d "
    "upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa im2col col2im "
    "pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle block_diag movedim "
    "_c10d_functional::wait_tensor _c10d_functional::all_gather_into_tensor "
    "_c10d_functional::reduce_scatter_tensor _c10d_functional::all_to_all_single _c10d_functional::all_reduce".split()
)


def linear(operation: OpOverload) -> Callable[..., Any]:
    """The rule of an operator that is linear in its first argument: applied to each derivative."""

    def apply(_: OpOverload, x: Any, *args: Any, **kwargs: Any) -> Any:
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, Jet):
                raise UnsupportedOperation(operation, "has a moving argument besides its first one")
        if "_c10d_functional" in name_of(operation) and args[0] in ("max", "min", "product"):
            raise UnsupportedOperation(operation)
        value = operation(_part(x, 0), *args, **kwargs)
        if isinstance(value, Tensor):
            if not (value.is_floating_point() or value.is_complex()):
                return value
            velocity, acceleration = (_of_part(operation, _part(x, k), args, kwargs) for k in (1, 2))
            return as_jet(value, velocity, acceleration)
        parts = [_of_part(operation, _part(x, k), args, kwargs) for k in (1, 2)]
        return [as_jet(v, *(p and p[i] for p in parts)) for i, v in enumerate(value)]

    return apply


def _part(x: Any, k: int) -> Any:
    """The k-th derivative of a tensor or of a list of tensors; None where all of it is zero."""
    if not isinstance(x, (list, tuple)):
        return derivatives(x)[k]
    parts = [derivatives(item)[k] for item in x]
    if k == 0 or all(part is None for part in parts):
        return parts if k == 0 else None
    return [torch.zeros_like(derivatives(item)[0]) if p is None else p for item, p in zip(x, parts, strict=True)]


def _of_part(operation: OpOverload, part: Any, args: Any, kwargs: Any) -> Any:
    if part is None:
        return None
    if name_of(operation) == "constant_pad_nd":
        return operation(part, args[0])
    return operation(part, *args, **kwargs)


def view_of_derivative(operation: OpOverload, value: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The view taken of `value`, taken of its derivative `x`, whose strides may be others."""
    name = name_of(operation)
    if name in ("view", "_unsafe_view", "_reshape_alias"):
        if not isinstance(args[0], (list, tuple)):
            raise UnsupportedOperation(operation, "reinterprets the bits of a value that moves")
        return x.reshape(args[0])
    if name == "as_strided":
        same_layout = torch.empty_strided(value.shape, value.stride(), dtype=x.dtype, device=x.device).copy_(x)
        size, stride, *offset = args
        start = (offset[0] if offset else value.storage_offset()) - value.storage_offset()
        return same_layout.as_strided(size, stride, start)
    return operation(x, *args, **kwargs)


def functional_form(operation: OpOverload) -> Callable[..., Any] | None:
    """The operator that returns what this one writes in place."""
    name = name_of(operation)
    if name in ("bernoulli_", "normal_", "uniform_", "exponential_", "random_", "log_normal_", "geometric_"):
        return lambda x, *args, **kwargs: operation(x.value, *args, **kwargs)
    packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    return packet if packet is None else getattr(packet, operation._overloadname, packet)


def decomposition(operation: OpOverload) -> Callable[..., Any] | None:
    """PyTorch's own reduction of the operator to simpler ones, as a rule."""
    steps = decomposition_table.get(operation)
    if steps is not None:
        return lambda _, *args, **kwargs: steps(*args, **kwargs)
    if operation.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
        return lambda _, *args, **kwargs: operation.decompose(*args, **kwargs)
    return None


# ------------------------------------------------------------------------------------- sums and products


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _scaled(x: Any, factor: Any) -> Any:
    return x if x is None or factor == 1 else x * factor


@rule("add", "sub", "rsub")
def _add(operation: OpOverload, x: Any, y: Any, alpha: Any = 1) -> Any:
    if name_of(operation) == "rsub":
        x, y = y, x
    (x0, x1, x2), (y0, y1, y2) = derivatives(x), derivatives(y)
    sign = 1 if name_of(operation) == "add" else -1
    factor = sign * alpha
    value = torch.add(x0, y0, alpha=factor) if isinstance(x0, Tensor) else torch.mul(y0, factor) + x0
    return as_jet(value, _plus(x1, _scaled(y1, factor)), _plus(x2, _scaled(y2, factor)))


def _bilinear(product: Callable[[Any, Any], Tensor], x: Any, w: Any) -> tuple[Any, Any, Any]:
    """The three derivatives of a product; terms with a zero factor are left out."""
    (x0, x1, x2), (w0, w1, w2) = derivatives(x), derivatives(w)

    def total(*terms: tuple[int, Any, Any]) -> Tensor | None:
        result = None
        for factor, a, b in terms:
            if a is None or b is None:
                continue
            term = product(a, b)
            if result is None:
                result = term if factor == 1 else term.mul_(factor)
            else:
                result = result.add_(term, alpha=factor)
        return result

    acceleration = total((2, x1, w1), (1, x2, w0), (1, x0, w2)) if wants_acceleration() else None
    return product(x0, w0), total((1, x1, w0), (1, x0, w1)), acceleration


@rule("mul")
def _mul(_: OpOverload, x: Any, w: Any) -> Any:
    (x0, x1, x2), (w0, w1, w2) = derivatives(x), derivatives(w)
    value = x0 * w0
    # Derivatives may be smaller than the product (broadcasting): sums out of place.
    velocity = _plus(_times(x1, w0), _times(x0, w1))
    acceleration = None
    if wants_acceleration():
        acceleration = _plus(_times(x2, w0), _times(x0, w2))
        if x1 is not None and w1 is not None:
            both = x1 * w1
            acceleration = 2 * both if acceleration is None else torch.add(acceleration, both, alpha=2)
    return as_jet(value, velocity, acceleration)


def _times(a: Any, b: Any) -> Any:
    return None if a is None or b is None else a * b


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
    velocity = _scaled(_plus(x1, None if y1 is None else -(value * y1)), 1)
    velocity = None if velocity is None else velocity / y0
    acceleration = None
    if wants_acceleration():
        if y1 is not None and velocity is not None:
            x2 = _plus(x2, -2 * velocity * y1)
        if y2 is not None:
            x2 = _plus(x2, -(value * y2))
        acceleration = None if x2 is None else x2 / y0
    return as_jet(value, velocity, acceleration)


@rule("mm", "bmm", "dot", "mv", "vdot")
def _matrix_product(operation: OpOverload, x: Any, w: Any) -> Any:
    return as_jet(*_bilinear(operation, x, w))


@rule("addmm", "baddbmm", "addmv", "addr")
def _added_product(operation: OpOverload, bias: Any, x: Any, w: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    product = {"addmm": aten.mm, "baddbmm": aten.bmm, "addmv": aten.mv, "addr": aten.outer}[name_of(operation)]
    _, velocity, acceleration = _bilinear(product, x, w)
    b0, b1, b2 = derivatives(bias)
    value = operation(b0, derivatives(x)[0], derivatives(w)[0], beta=beta, alpha=alpha)
    return as_jet(
        value,
        _plus(_scaled(velocity, alpha), _scaled(b1, beta)),
        _plus(_scaled(acceleration, alpha), _scaled(b2, beta)),
    )


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
def _trilinear(
    _: OpOverload, a: Any, b: Any, c: Any, expand_a: list[int], expand_b: list[int], expand_c: list[int], sumdim: list[int],
    unroll_dim: int = 1,
) -> Any:  # fmt: skip
    for expand, axes in (("a", expand_a), ("b", expand_b), ("c", expand_c)):
        for axis in axes:
            if expand == "a":
                a = a.unsqueeze(axis)
            elif expand == "b":
                b = b.unsqueeze(axis)
            else:
                c = c.unsqueeze(axis)
    return (a * b * c).sum(sumdim)


@rule("convolution")
def _convolution(operation: OpOverload, x: Any, w: Any, bias: Any, *settings: Any) -> Any:
    value, velocity, acceleration = _bilinear(lambda a, b: operation(a, b, None, *settings), x, w)
    for_channels = (1, -1) + (1,) * (value.dim() - 2)
    b0, b1, b2 = (None if b is None else b.view(for_channels) for b in derivatives(bias))
    value = value if b0 is None else value.add_(b0)
    return as_jet(value, _plus(velocity, b1), _plus(acceleration, b2))


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


# --------------------------------------------------------------------------------- elementwise functions


def _elementwise(value: Tensor, first: Any, second: Any, x1: Any, x2: Any) -> Any:
    """`f(x)` from `f'` and `f''` at `x0`: `f' x1` and `f'' x1^2 + f' x2`; `second` None where `f'' = 0`."""
    velocity = _times(first, x1)
    acceleration = None
    if wants_acceleration():
        acceleration = _times(first, x2)
        if second is not None and x1 is not None:
            bend = second * x1 * x1
            acceleration = bend if acceleration is None else acceleration.add_(bend)
    return as_jet(value, velocity, acceleration)


def _unary(name: str, slopes: Callable[..., tuple[Any, Any]]) -> None:
    """Register `f(x, *args)` by `slopes(x0, f(x0), *args) -> (f', f'')`."""

    def apply(operation: OpOverload, x: Any, *args: Any, **kwargs: Any) -> Any:
        x0, x1, x2 = derivatives(x)
        if any(isinstance(argument, Jet) for argument in args):
            raise UnsupportedOperation(operation, "has a moving argument besides its first one")
        value = operation(x0, *args, **kwargs)
        return _elementwise(value, *slopes(x0, value, *args, **kwargs), x1, x2)

    RULES[name] = apply


def _normal_density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _gelu(x: Tensor, y: Tensor, *, approximate: str = "none") -> tuple[Tensor, Tensor]:
    if approximate == "none":
        density = _normal_density(x)
        return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density, (2 - x * x) * density
    # y = x s(u), s the logistic function, u = 2 sqrt(2/pi) (x + 0.044715 x^3)
    c = 2 * math.sqrt(2 / math.pi)
    square = x * x
    s = torch.sigmoid(c * x * (1 + 0.044715 * square))
    u1, u2 = c * (1 + 3 * 0.044715 * square), (c * 6 * 0.044715) * x
    s1 = s * (1 - s)
    return s + x * s1 * u1, s1 * (2 * u1 + x * (u2 + u1 * u1 * (1 - 2 * s)))


def _silu(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(x)
    s1 = s * (1 - s)
    return s + x * s1, s1 * (2 + x * (1 - 2 * s))


def _sigmoid(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    first = y * (1 - y)
    return first, first * (1 - 2 * y)


def _tanh(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    first = 1 - y * y
    return first, -2 * y * first


def _softplus(x: Tensor, y: Tensor, beta: float = 1, threshold: float = 20) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(beta * x)
    straight = beta * x > threshold
    return s.masked_fill(straight, 1), (beta * s * (1 - s)).masked_fill(straight, 0)


def _mish(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    t, s = torch.tanh(torch.nn.functional.softplus(x)), torch.sigmoid(x)
    t1 = (1 - t * t) * s
    t2 = (1 - t * t) * s * (1 - s) - 2 * t * t1 * s
    return t + x * t1, 2 * t1 + x * t2


def _elu(x: Tensor, y: Tensor, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> tuple[Tensor, Tensor]:
    bent = (alpha * scale * input_scale) * torch.exp(input_scale * x)
    return torch.where(x > 0, scale, bent), torch.where(x > 0, 0.0, input_scale * bent)


def _celu(x: Tensor, y: Tensor, alpha: float = 1) -> tuple[Tensor, Tensor]:
    bent = torch.exp(x / alpha)
    return torch.where(x > 0, 1.0, bent), torch.where(x > 0, 0.0, bent / alpha)


def _hardswish(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    middle = (x > -3) & (x < 3)
    return torch.where(middle, x / 3 + 0.5, (x >= 3).to(x.dtype)), middle.to(x.dtype) / 3


def _clamp(x: Tensor, y: Tensor, low: Any = None, high: Any = None) -> tuple[Tensor, None]:
    inside = torch.ones_like(x, dtype=torch.bool)
    for bound, beyond in ((low, torch.lt), (high, torch.gt)):
        if bound is not None:
            inside &= ~beyond(x, bound)
    return inside.to(x.dtype), None


def _power(x: Tensor, y: Tensor, exponent: Any) -> tuple[Any, Any]:
    if exponent == 0:
        return torch.zeros_like(x), None
    if exponent == 1:
        return torch.ones_like(x), None
    if exponent == 2:
        return 2 * x, torch.full_like(x, 2)
    first = exponent * torch.pow(x, exponent - 1)
    return first, exponent * (exponent - 1) * torch.pow(x, exponent - 2)


def _step(x: Tensor, condition: Tensor) -> tuple[Tensor, None]:
    return condition.to(x.dtype), None


_SLOPES: dict[str, Callable[..., tuple[Any, Any]]] = {
    "relu": lambda x, y: _step(x, x > 0),
    "leaky_relu": lambda x, y, slope=0.01: (torch.where(x > 0, 1.0, slope).to(x.dtype), None),
    "threshold": lambda x, y, threshold, value: _step(x, x > threshold),
    "hardtanh": lambda x, y, low=-1, high=1: _step(x, (x > low) & (x < high)),
    "hardsigmoid": lambda x, y: (((x > -3) & (x < 3)).to(x.dtype) / 6, None),
    "hardshrink": lambda x, y, limit=0.5: _step(x, x.abs() > limit),
    "softshrink": lambda x, y, limit=0.5: _step(x, x.abs() > limit),
    "hardswish": _hardswish,
    "clamp": _clamp,
    "clamp_min": lambda x, y, low: _clamp(x, y, low),
    "clamp_max": lambda x, y, high: _clamp(x, y, None, high),
    "abs": lambda x, y: (torch.sign(x), None),
    "gelu": _gelu,
    "silu": _silu,
    "sigmoid": _sigmoid,
    "tanh": _tanh,
    "softplus": _softplus,
    "mish": _mish,
    "elu": _elu,
    "celu": _celu,
    "exp": lambda x, y: (y, y),
    "exp2": lambda x, y: (y * math.log(2), y * math.log(2) ** 2),
    "expm1": lambda x, y: (y + 1, y + 1),
    "log": lambda x, y: (1 / x, -1 / (x * x)),
    "log2": lambda x, y: (1 / (x * math.log(2)), -1 / (x * x * math.log(2))),
    "log10": lambda x, y: (1 / (x * math.log(10)), -1 / (x * x * math.log(10))),
    "log1p": lambda x, y: (1 / (1 + x), -1 / (1 + x).square()),
    "sqrt": lambda x, y: (0.5 / y, -0.25 / (y * x)),
    "rsqrt": lambda x, y: (-0.5 * y / x, 0.75 * y / (x * x)),
    "reciprocal": lambda x, y: (-y * y, 2 * y * y * y),
    "pow": _power,
    "sin": lambda x, y: (torch.cos(x), -y),
    "cos": lambda x, y: (-torch.sin(x), -y),
    "tan": lambda x, y: (1 + y * y, 2 * y * (1 + y * y)),
    "sinh": lambda x, y: (torch.cosh(x), y),
    "cosh": lambda x, y: (torch.sinh(x), y),
    "atan": lambda x, y: (1 / (1 + x * x), -2 * x / (1 + x * x).square()),
    "erf": lambda x, y: (
        (2 / math.sqrt(math.pi)) * torch.exp(-x * x),
        (-4 / math.sqrt(math.pi)) * x * torch.exp(-x * x),
    ),
    "lgamma": lambda x, y: (torch.digamma(x), torch.polygamma(1, x)),
}
for _name, _slopes in _SLOPES.items():
    _unary(_name, _slopes)
_scalar_power = RULES["pow"]


@rule("pow")
def _pow(operation: OpOverload, base: Any, exponent: Any) -> Any:
    if isinstance(base, Jet) and not isinstance(exponent, Tensor):
        return _scalar_power(operation, base, exponent)
    return torch.exp(exponent * (torch.log(base) if isinstance(base, Tensor) else math.log(base)))


@rule("log_sigmoid_forward")
def _log_sigmoid(operation: OpOverload, x: Any) -> Any:
    x0, x1, x2 = derivatives(x)
    value, buffer = operation(x0)
    s = torch.sigmoid(-x0)
    return _elementwise(value, s, -s * (1 - s), x1, x2), buffer


@rule("_prelu_kernel")
def _prelu(_: OpOverload, x: Any, weight: Any) -> Any:
    return torch.where(derivatives(x)[0] > 0, x, weight * x)


@rule("atan2")
def _atan2(_: OpOverload, y: Any, x: Any) -> Any:
    turned = torch.atan2(derivatives(y)[0], derivatives(x)[0])
    # the angle near `turned`, which is constant: atan of the component across over the one along
    c, s = torch.cos(turned), torch.sin(turned)
    return turned + torch.atan((c * y - s * x) / (c * x + s * y))


# ---------------------------------------------------------------------------- selections and reductions


@rule("maximum", "minimum", "fmax", "fmin")
def _extremum(operation: OpOverload, x: Any, y: Any) -> Any:
    """The larger (smaller) of two; where they are equal, the mean of their derivatives, as in autograd."""
    (x0, x1, x2), (y0, y1, y2) = derivatives(x), derivatives(y)
    value = operation(x0, y0)
    share = (value == x0).to(value.dtype)
    share = share / (share + (value == y0).to(value.dtype)).clamp_min(1)

    def mixed(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return _plus(_times(share, a), _times(1 - share, b))

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
    bound = {a.name: a.default_value for a in operation._schema.arguments if a.has_default_value()}
    bound |= dict(zip(names[1:], args, strict=False)) | kwargs
    if "dim" not in bound:
        raise UnsupportedOperation(operation)
    dim, dropped = bound["dim"], values.dim() < x0.dim()

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
        values, indices = operation(x0, *args, **kwargs)
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
    """With probabilities `y`: `m1 = E x1`, `u = x1 - m1`, `t = u^2 + x2` and `m2 = E t`."""
    if x1 is None:
        m2 = (y * x2).sum(dim, keepdim=True) if wants_acceleration() else None
        return None, None, x2, m2
    m1 = (y * x1).sum(dim, keepdim=True)
    u = x1 - m1
    if not wants_acceleration():
        return m1, u, None, None
    t = u * u if x2 is None else torch.addcmul(x2, u, u)
    return m1, u, t, (y * t).sum(dim, keepdim=True)


@rule("_softmax", "_safe_softmax")
def _softmax(operation: OpOverload, x: Any, dim: int, *args: Any, **kwargs: Any) -> Any:
    x0, x1, x2 = derivatives(x)
    y = operation(x0, dim, *args, **kwargs)
    _, u, t, m2 = _softmax_means(y, dim, x1, x2)
    return as_jet(y, _times(y, u), None if t is None else y * (t - m2))


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
    x0, x1, x2 = derivatives(x)
    value = torch.sqrt(x0)
    first, second = (d.masked_fill(x0 == 0, 0) for d in (0.5 / value, -0.25 / (value * x0)))
    return _elementwise(value, first, second, x1, x2)


# --------------------------------------------------------------------------------------------- attention


@rule(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
def _attention(operation: OpOverload, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Fused attention, computed from its parts; only the first of the results is what a program sees."""
    names = [argument.name for argument in operation._schema.arguments]
    given = dict(zip(names[3:], args, strict=False)) | kwargs
    result, _ = aten._scaled_dot_product_attention_math(
        query,
        key,
        value,
        given.get("attn_mask", given.get("attn_bias")),
        given.get("dropout_p", 0.0),
        given.get("is_causal", False),
        scale=given.get("scale"),
    )
    unseen = [torch.empty(0) for _ in operation._schema.returns[1:]]
    return (result, *unseen)


# ----------------------------------------------------------------------------------------- normalisation


def _normalised(x: Any, dims: list[int], eps: float, count: int | None = None) -> Any:
    """`(x - mean) / sqrt(var + eps)` over dimensions."""
    x0, x1, x2 = derivatives(x)
    c0, c1, c2 = (None if d is None else d - d.mean(dims, keepdim=True) for d in (x0, x1, x2))

    def mean(a: Tensor) -> Tensor:
        return a.mean(dims, keepdim=True)

    r0 = torch.rsqrt(mean(c0 * c0) + eps)
    n0 = c0 * r0
    # v' = 2 E c0 c1, and with r = v^(-1/2): r'/r = -v' / 2v, r''/r = 3 (v'/2v)^2 - v''/2v
    half_v1 = None if c1 is None else mean(n0 * c1) * r0  # v'/2v
    n1 = None if c1 is None else (c1 * r0).sub_(n0 * half_v1)
    n2 = None
    if wants_acceleration() and (c1 is not None or c2 is not None):
        half_v2 = torch.zeros_like(r0)  # v''/2v
        if c1 is not None:
            half_v2 = half_v2 + mean(c1 * c1) * (r0 * r0)
        if c2 is not None:
            half_v2 = half_v2 + mean(n0 * c2) * r0
        ratio = -half_v2 if half_v1 is None else 3 * half_v1 * half_v1 - half_v2  # r''/r
        n2 = n0 * ratio
        if c1 is not None:
            n2.sub_(c1 * (2 * r0 * half_v1))
        if c2 is not None:
            n2.add_(c2 * r0)
    return as_jet(n0, n1, n2)


def _affine(x: Any, weight: Any, bias: Any) -> Any:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


@rule("native_layer_norm")
def _layer_norm(
    operation: OpOverload, x: Any, shape: list[int], weight: Any, bias: Any, eps: float
) -> tuple[Any, None, None]:
    dims = list(range(x.dim() - len(shape), x.dim()))
    return _affine(_normalised(x, dims, eps), weight, bias), _unused(), _unused()


@rule("native_group_norm")
def _group_norm(
    operation: OpOverload,
    x: Any,
    weight: Any,
    bias: Any,
    n: int,
    channels: int,
    positions: int,
    groups: int,
    eps: float,
) -> Any:
    normal = _normalised(x.reshape(n, groups, -1), [2], eps).reshape(x.shape)
    return _affine(normal, *(_for_channels(p, x.dim()) for p in (weight, bias))), _unused(), _unused()


def _unused() -> Any:
    """Statistics saved for a backward pass that there is not."""
    return torch.empty(0)


def _for_channels(parameter: Any, dim: int) -> Any:
    return None if parameter is None else parameter.reshape((-1,) + (1,) * (dim - 2))


def _batch_norm(
    operation: OpOverload,
    x: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    x0 = derivatives(x)[0]
    per_channel = [_for_channels(p, x.dim()) for p in (weight, bias)]
    if training:
        # The operator itself moves the running statistics, as in a plain forward pass.
        still = (derivatives(p)[0] for p in (weight, bias))
        arguments = (x0, *still, running_mean, running_var, training, momentum, eps)
        results = operation(*arguments)
        normal = _normalised(x, [0, *range(2, x.dim())], eps)
        return _affine(normal, *per_channel), *results[1:]
    scale = torch.rsqrt(_for_channels(running_var, x.dim()) + eps)
    normal = (x - _for_channels(running_mean, x.dim())) * scale
    extra = len(operation._schema.returns) - 1
    return (_affine(normal, *per_channel), *(_unused() for _ in range(extra)))


@rule("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm", "miopen_batch_norm")
def _native_batch_norm(operation: OpOverload, x: Any, weight: Any, bias: Any, *rest: Any) -> Any:
    if operation._overloadname == "no_stats":
        training, momentum, eps = rest
        normal = _normalised(x, [0, *range(2, x.dim())], eps)
        parameters = (_for_channels(p, x.dim()) for p in (weight, bias))
        return _affine(normal, *parameters), _unused(), _unused()
    return _batch_norm(operation, x, weight, bias, *rest)


@rule("_fused_rms_norm")
def _fused_rms_norm(operation: OpOverload, x: Any, shape: list[int], weight: Any, eps: float | None) -> Any:
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    dims = list(range(x.dim() - len(shape), x.dim()))
    normal = x * torch.rsqrt((x * x).mean(dims, keepdim=True) + eps)
    return _affine(normal, weight, None), _unused()


# ------------------------------------------------------------------------------------ embeddings and losses


@rule("_embedding_bag", "_embedding_bag_forward_only")
def _embedding_bag(operation: OpOverload, weight: Any, *args: Any, **kwargs: Any) -> Any:
    names = [argument.name for argument in operation._schema.arguments]
    given = dict(zip(names[1:], args, strict=False)) | kwargs
    if given.get("mode", 0) == 2 or isinstance(given.get("per_sample_weights"), Jet):
        raise UnsupportedOperation(operation, "with mode 'max' or moving weights has no verified derivative")
    w0, w1, w2 = derivatives(weight)
    value, *rest = operation(w0, *args, **kwargs)
    moved = (None if d is None else operation(d, *args, **kwargs)[0] for d in (w1, w2))
    return as_jet(value, *moved), *rest


@rule("nll_loss_forward", "nll_loss2d_forward")
def _nll_loss(operation: OpOverload, x: Any, *args: Any) -> Any:
    if any(isinstance(argument, Jet) for argument in args):
        raise UnsupportedOperation(operation, "has a moving argument besides its first one")
    x0, x1, x2 = derivatives(x)
    value, total_weight = operation(x0, *args)
    return as_jet(value, *(None if d is None else operation(d, *args)[0] for d in (x1, x2))), total_weight


def _reduced(loss: Any, reduction: int) -> Any:
    """ATen's codes: 0 none, 1 mean, 2 sum."""
    return loss if reduction == 0 else loss.mean() if reduction == 1 else loss.sum()


@rule("mse_loss")
def _mse_loss(_: OpOverload, x: Any, target: Any, reduction: int = 1) -> Any:
    error = x - target
    return _reduced(error * error, reduction)


@rule("huber_loss")
def _huber_loss(_: OpOverload, x: Any, target: Any, reduction: int = 1, delta: float = 1.0) -> Any:
    error = x - target
    size = error.abs()
    near = derivatives(size)[0] <= delta
    return _reduced(torch.where(near, 0.5 * error * error, delta * size - 0.5 * delta**2), reduction)


@rule("smooth_l1_loss")
def _smooth_l1_loss(operation: OpOverload, x: Any, target: Any, reduction: int = 1, beta: float = 1.0) -> Any:
    error = x - target
    size = error.abs()
    near = derivatives(size)[0] < beta
    bowl = (0.5 / beta) * error * error if beta else size
    return _reduced(torch.where(near, bowl, size - 0.5 * beta), reduction)


@rule("binary_cross_entropy")
def _binary_cross_entropy(_: OpOverload, x: Any, target: Any, weight: Any = None, reduction: int = 1) -> Any:
    loss = -(target * torch.log(x).clamp_min(-100) + (1 - target) * torch.log(1 - x).clamp_min(-100))
    return _reduced(loss if weight is None else loss * weight, reduction)


@rule("binary_cross_entropy_with_logits")
def _binary_cross_entropy_with_logits(
    _: OpOverload, x: Any, target: Any, weight: Any = None, pos_weight: Any = None, reduction: int = 1
) -> Any:
    scale = 1 if pos_weight is None else 1 + (pos_weight - 1) * target
    loss = (1 - target) * x - scale * torch.nn.functional.logsigmoid(x)
    return _reduced(loss if weight is None else loss * weight, reduction)


@rule("xlogy")
def _xlogy(_: OpOverload, x: Any, y: Any) -> Any:
    zero = derivatives(x)[0] == 0
    y = torch.where(torch.as_tensor(zero), torch.ones_like(derivatives(y)[0]), y)
    return x * torch.log(y)
