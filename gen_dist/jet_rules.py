"""What each PyTorch operator does to the derivatives of a jet: one rule an operator.

Rules get the operator and its arguments, at least one of which is a moving `Jet`, and return jets. `x0, x1, x2` are
value, velocity and acceleration; `None` is zero. Derivatives are never changed in place once a rule has returned
them, so rules may share them. What has no rule here is taken apart by PyTorch's own decompositions into operators
that have one; what has neither is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

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


Term = tuple[int, Any, Any]


def _second_order(x: Any, w: Any) -> tuple[list[Term], list[Term]]:
    """The terms `factor * a * b` of velocity and acceleration of a product of `x` and `w`, zero ones left out."""
    (x0, x1, x2), (w0, w1, w2) = derivatives(x), derivatives(w)
    velocity = [(1, x1, w0), (1, x0, w1)]
    acceleration = [(1, x2, w0), (1, x0, w2), (2, x1, w1)] if wants_acceleration() else []

    def present(terms: list[Term]) -> list[Term]:
        return [term for term in terms if term[1] is not None and term[2] is not None]

    return present(velocity), present(acceleration)


def _total(
    product: Callable[[Any, Any], Tensor], add_product: Callable[[Tensor, Any, Any, int], Any], terms: list[Term]
) -> Tensor | None:
    """The sum of the terms, a tensor of its own, built up in place."""
    if not terms:
        return None
    (factor, a, b), *others = terms
    total = product(a, b)
    if factor != 1:
        total.mul_(factor)
    for factor, a, b in others:
        add_product(total, a, b, factor)
    return total


def _moved_product(operation: Callable[[Any, Any], Tensor], x: Any, w: Any) -> tuple[Tensor | None, Tensor | None]:
    """Velocity and acceleration of a bilinear operation, new tensors both."""

    def add_product(total: Tensor, a: Any, b: Any, factor: int) -> None:
        if operation is aten.mm.default:
            total.addmm_(a, b, alpha=factor)
        elif operation is aten.bmm.default:
            total.baddbmm_(a, b, alpha=factor)
        else:
            total.add_(operation(a, b), alpha=factor)

    velocity, acceleration = _second_order(x, w)
    return _total(operation, add_product, velocity), _total(operation, add_product, acceleration)


@rule("mul")
def _mul(_: OpOverload, x: Any, w: Any) -> Any:
    velocity, acceleration = (_total(torch.mul, _add_elementwise, terms) for terms in _second_order(x, w))
    return as_jet(derivatives(x)[0] * derivatives(w)[0], velocity, acceleration)


def _add_elementwise(total: Tensor, a: Any, b: Any, factor: int) -> None:
    if a.dtype == b.dtype == total.dtype and a.dim() and b.dim():
        total.addcmul_(a, b, value=factor)
    else:
        total.add_(a * b, alpha=factor)


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
        return _scaled(bias, beta)
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


# --------------------------------------------------------------------------------- elementwise functions


class Elementwise(NamedTuple):
    """Derivatives of `f(x, *arguments)`; functions get `x0`, `f(x0)` and the arguments.

    `tangent(v, x, y, ...)` is `f'(x) v`: since the Jacobian is diagonal, the fused kernels that autograd has for its
    backward pass serve. Without one, `first(x, y, ...)` is `f'(x)`. `second` is `f''(x)`, None where that is zero; a tensor
    of its own, which may be overwritten.
    """

    tangent: Callable[..., Tensor] | None = None
    first: Callable[..., Tensor] | None = None
    second: Callable[..., Tensor] | None = None


def _chain(value: Tensor, tangent: Callable[[Tensor], Tensor], second: Callable[[], Tensor] | None, x: Jet) -> Any:
    """`f(x)`: velocity `f' x1`, acceleration `f'' x1^2 + f' x2`. What `second` returns is overwritten."""
    _, x1, x2 = derivatives(x)
    acceleration = None
    if wants_acceleration():
        acceleration = None if x2 is None else tangent(x2)
        if second is not None and x1 is not None:
            bend = second().mul_(x1).mul_(x1)
            acceleration = bend if acceleration is None else bend.add_(acceleration)
    return as_jet(value, None if x1 is None else tangent(x1), acceleration)


def _register_elementwise(name: str, f: Elementwise) -> None:
    def apply(operation: OpOverload, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, Jet) or any(isinstance(argument, Jet) for argument in args):
            raise UnsupportedOperation(operation, "has a moving argument besides its first one")
        x0 = x.value
        y = operation(x0, *args, **kwargs)
        second = None if f.second is None else lambda: f.second(x0, y, *args, **kwargs)  # type: ignore[misc]
        if f.tangent is not None:
            return _chain(y, lambda v: f.tangent(v, x0, y, *args, **kwargs), second, x)  # type: ignore[misc]
        assert f.first is not None
        slope = f.first(x0, y, *args, **kwargs)
        return _chain(y, lambda v: slope * v, second, x)

    RULES[name] = apply


def _gelu_bend(x: Tensor, y: Tensor, *, approximate: str = "none") -> Tensor:
    square = x * x
    if approximate == "none":  # (2 - x^2) times the normal density
        density = torch.mul(square, -0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
        return density.mul_(square.neg_().add_(2))
    # y = x s(u), s the logistic function, u = 2 sqrt(2/pi) (x + 0.044715 x^3)
    c = 2 * math.sqrt(2 / math.pi)
    s = torch.sigmoid(c * x * (1 + 0.044715 * square))
    u1, u2 = c * (1 + 3 * 0.044715 * square), (c * 6 * 0.044715) * x
    return s * (1 - s) * (2 * u1 + x * (u2 + u1 * u1 * (1 - 2 * s)))


def _silu_bend(x: Tensor, y: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s) * (2 + x * (1 - 2 * s))


def _softplus_bend(x: Tensor, y: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    s = torch.sigmoid(beta * x)
    return (beta * s * (1 - s)).masked_fill_(beta * x > threshold, 0)


def _mish_bend(x: Tensor, y: Tensor) -> Tensor:
    t, s = torch.tanh(torch.nn.functional.softplus(x)), torch.sigmoid(x)
    flat = 1 - t * t
    t1 = flat * s
    return 2 * t1 + x * (t1 * (1 - s) - 2 * t * t1 * s)


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
    "sigmoid": Elementwise(
        tangent=lambda v, x, y: aten.sigmoid_backward(v, y), second=lambda x, y: y * (1 - y) * (1 - 2 * y)
    ),
    "tanh": Elementwise(tangent=lambda v, x, y: aten.tanh_backward(v, y), second=lambda x, y: -2 * y * (1 - y * y)),
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
        first=lambda x, y, n: _power(x, n), second=lambda x, y, n: torch.zeros_like(x) if n == 1 else n * _power(x, n - 1)
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
    return _chain(value, lambda v: s * v, lambda: -s * (1 - s), x), buffer


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
    return _chain(y, lambda v: slope * v, lambda: (-0.25 / (y * x.value)).masked_fill_(at_zero, 0), x)


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


class Normalisation(NamedTuple):
    """`n = (x - E x) / sqrt(var x + eps)` at one point, and its derivatives.

    `tangent(v)` is `J v`, with the Jacobian there: it is symmetric, so that the backward kernel computes it. `mean(a, b)` is
    `E[a b]` over what is normalised together, in a shape that broadcasts.
    """

    n0: Tensor
    rstd: Tensor
    eps: float
    tangent: Callable[[Tensor], Tensor]
    mean: Callable[[Tensor, Tensor], Tensor]

    def applied_to(self, x: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The derivatives of `n`, each a new tensor. Differentiating twice, with `h = rstd E[n0 x1]`,

        n1 = J x1        n2 = J x2 - 2 h n1 - (E[n1^2] + eps rstd^2 h^2) n0
        """
        n0, rstd = self.n0, self.rstd
        _, x1, x2 = derivatives(x)
        n1 = None if x1 is None else self.tangent(x1)
        n2 = None if x2 is None or not wants_acceleration() else self.tangent(x2)
        if n1 is not None and wants_acceleration():
            h = self.mean(n0, x1) * rstd
            size = self.mean(n1, n1) + self.eps * rstd * rstd * h * h
            n2 = torch.mul(n1, -2 * h) if n2 is None else n2.addcmul_(n1, h, value=-2)
            n2.addcmul_(n0, size, value=-1)
        return n0, n1, n2


def _affine(normal: tuple[Tensor, Tensor | None, Tensor | None], weight: Any, bias: Any) -> Any:
    """The jet of `n w + b`, in the memory of the derivatives of `n`."""
    n0, n1, n2 = normal
    (w0, w1, w2), (b0, b1, b2) = derivatives(weight), derivatives(bias)

    def total(n: Tensor | None, b: Any, *terms: Term) -> Tensor | None:
        if n is not None and w0 is not None:
            n.mul_(w0)
        for factor, a, w in terms:
            if a is not None and w is not None:
                n = a * (factor * w) if n is None else n.addcmul_(a, w, value=factor)
        return b if n is None else n if b is None else n.add_(b)

    acceleration = total(n2, b2, (2, n1, w1), (1, n0, w2)) if wants_acceleration() else None
    velocity = total(n1, b1, (1, n0, w1))
    value = total(n0, b0)
    assert value is not None
    return as_jet(value, velocity, acceleration)


@rule("native_layer_norm")
def _layer_norm(_: OpOverload, x: Any, shape: list[int], weight: Any, bias: Any, eps: float) -> tuple[Any, Any, Any]:
    x0 = derivatives(x)[0].contiguous()
    dims = list(range(x0.dim() - len(shape), x0.dim()))
    n0, mean, rstd = aten.native_layer_norm(x0, shape, None, None, eps)
    mask = [True, False, False]
    normalisation = Normalisation(
        n0,
        rstd,
        eps,
        lambda v: aten.native_layer_norm_backward(v.contiguous(), x0, shape, mean, rstd, None, None, mask)[0],
        lambda a, b: (a * b).mean(dims, keepdim=True),
    )
    return _affine(normalisation.applied_to(x), weight, bias), _unused(), _unused()


@rule("native_group_norm")
def _group_norm(
    _: OpOverload, x: Any, weight: Any, bias: Any, n: int, channels: int, positions: int, groups: int, eps: float
) -> Any:
    x0, sizes = derivatives(x)[0].contiguous(), (n, channels, positions, groups)
    n0, mean, rstd = aten.native_group_norm(x0, None, None, *sizes, eps)

    def for_elements(statistic: Tensor) -> Tensor:
        per_channel = statistic.reshape(n, groups, 1).expand(n, groups, channels // groups)
        return per_channel.reshape(n, channels, *(1 for _ in x0.shape[2:]))

    mask = [True, False, False]
    normalisation = Normalisation(
        n0,
        for_elements(rstd),
        eps,
        lambda v: aten.native_group_norm_backward(v.contiguous(), x0, mean, rstd, None, *sizes, mask)[0],
        lambda a, b: for_elements((a * b).reshape(n, groups, -1).mean(2)),
    )
    parameters = (_for_channels(p, x0.dim()) for p in (weight, bias))
    return _affine(normalisation.applied_to(x), *parameters), _unused(), _unused()


def _unused() -> Any:
    """Statistics saved for a backward pass that there is not."""
    return torch.empty(0)


def _for_channels(parameter: Any, dim: int) -> Any:
    return None if parameter is None else parameter.reshape((-1,) + (1,) * (dim - 2))


@rule("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm", "miopen_batch_norm")
def _batch_norm(operation: OpOverload, x: Any, weight: Any, bias: Any, *rest: Any) -> Any:
    if operation._overloadname == "no_stats":
        rest = (None, None, *rest)
    running_mean, running_var, training, momentum, eps = rest
    x0, dim = derivatives(x)[0], x.dim()
    # The operator itself moves the running statistics, as in a plain forward pass.
    n0, mean, rstd = aten.native_batch_norm(x0, None, None, running_mean, running_var, training, momentum, eps)
    if training:
        backward = aten.native_batch_norm_backward
        no_mean, no_scale, count = torch.zeros_like(mean), torch.ones_like(rstd), x0.numel() // mean.numel()

        def mean_product(a: Tensor, b: Tensor) -> Tensor:
            # the gradient of the weight, with statistics that do nothing, is the sum of a b without a product in memory
            mask = [False, True, False]
            product = backward(a, b, None, None, None, no_mean, no_scale, True, eps, mask)[1]
            return _for_channels(product / count, dim)

        normal = Normalisation(
            n0,
            _for_channels(rstd, dim),
            eps,
            lambda v: backward(v, x0, None, None, None, mean, rstd, True, eps, [True, False, False])[0],
            mean_product,
        ).applied_to(x)
    else:
        scale = _for_channels(torch.rsqrt(running_var + eps), dim)
        normal = (n0, *(None if d is None else d * scale for d in derivatives(x)[1:]))
    parameters = (_for_channels(p, dim) for p in (weight, bias))
    unseen = (_unused() for _ in operation._schema.returns[1:])
    return (_affine(normal, *parameters), *unseen)


@rule("_fused_rms_norm")
def _fused_rms_norm(operation: OpOverload, x: Any, shape: list[int], weight: Any, eps: float | None) -> Any:
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    dims = list(range(x.dim() - len(shape), x.dim()))
    normal = x * torch.rsqrt((x * x).mean(dims, keepdim=True) + eps)
    return normal if weight is None else normal * weight, _unused()


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
