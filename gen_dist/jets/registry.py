"""The operators that jets know: operator rules by name, and tables of the operators that need no rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from gen_dist.jets.jet import Jet, NotCovered, UnsupportedOperation, as_jet, derivatives, note_cast
from gen_dist.torch_private import Operator, name_of, schema_of

aten = torch.ops.aten

OperatorRule = TypeVar("OperatorRule", bound=Callable[..., Any])

RULES: dict[str, Callable[..., Any]] = {}
CHOSEN: dict[Operator, Callable[..., Any]] = {}  # what `dispatch` has chosen so far, by operator


def rule(*names: str) -> Callable[[OperatorRule], OperatorRule]:
    """Decorator that registers an operator rule for all overloads of the named operators.

    A name is `add` for `aten.add.Tensor`, and `namespace::name` outside ATen. The operator rule is called as
    `f(operator, *args, **kwargs)`, and only if at least one argument is a moving `Jet` or a list with one. Jets that do
    not move are replaced by their values. It returns what the operator returns, with jets for the tensors that move.
    """

    def register(function: OperatorRule) -> OperatorRule:
        RULES.update(dict.fromkeys(names, function))
        CHOSEN.clear()
        return function

    return register


# The result does not move with the arguments: booleans, integers, shapes, piecewise constant functions.
CONSTANT = frozenset(
    "eq ne lt le gt ge argmax argmin argsort isnan isinf isfinite isposinf isneginf sign sgn signbit floor ceil round "
    "trunc floor_divide normal normal_functional poisson binomial logical_and logical_or logical_not logical_xor any "
    "all nonzero count_nonzero equal is_nonzero _local_scalar_dense bernoulli multinomial heaviside searchsorted "
    "bucketize one_hot zero item isclose allclose is_same_size bitwise_and bitwise_or bitwise_not bitwise_xor "
    "sym_size sym_stride sym_numel sym_storage_offset _assert_tensor_metadata _assert_async "
    "_has_same_storage_numel".split()
)

# The result is a new tensor, shaped like a jet. It is a jet without derivatives, since the program may write into it.
FACTORIES = frozenset(
    "empty_like zeros_like ones_like full_like rand_like randn_like randint_like new_empty new_empty_strided new_zeros "
    "new_ones new_full".split()
)

# The result is linear in the first argument, a tensor or a list of tensors. The other arguments must not move.
LINEAR = frozenset(
    "alias detach lift_fresh clone contiguous _to_copy view _unsafe_view _reshape_alias reshape t transpose permute "
    "expand squeeze unsqueeze slice select split split_with_sizes unsafe_split unsafe_split_with_sizes unsafe_chunk "
    "unbind diagonal narrow unfold as_strided flip roll rot90 repeat repeat_interleave tril triu trace diag_embed cat "
    "stack index index_select gather take masked_select sum mean nansum cumsum neg constant_pad_nd "
    "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d "
    "avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d "
    "upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa im2col col2im "
    "pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle block_diag movedim".split()
)

# The operator rules that hold for complex numbers too, which is not so where a derivative conjugates.
OF_COMPLEX = frozenset(
    "abs add sub rsub mul div mm bmm dot mv vdot addmm baddbmm addmv addr addcmul addcdiv where masked_fill copy fill "
    "native_dropout convolution slice_scatter select_scatter diagonal_scatter index_put _unsafe_index_put "
    "masked_scatter index_add index_copy scatter scatter_add embedding".split()
)


def linear(operator: Operator) -> Callable[..., Any]:
    """Return the operator rule of an operator that is linear in its first argument: it maps each derivative."""

    casts = name_of(operator) == "_to_copy"

    def apply(_: Operator, x: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_jets(operator, (*args, *kwargs.values()))
        value = operator(_part(x, 0), *args, **kwargs)
        if casts:
            note_cast(value.dtype)
            if value.is_meta:  # the shape of a result is wanted, as `torch.func.jvp` does
                return value
        if isinstance(value, Tensor):
            if not (value.is_floating_point() or value.is_complex()):
                return value
            velocity, acceleration = (_of_part(operator, _part(x, k), args, kwargs) for k in (1, 2))
            return as_jet(value, velocity, acceleration)
        parts = [_of_part(operator, _part(x, k), args, kwargs) for k in (1, 2)]
        return [as_jet(v, *(p and p[i] for p in parts)) for i, v in enumerate(value)]

    return apply


def for_backward(statistic: Tensor) -> Tensor:
    """Return what an operator keeps for its backward pass, whose derivatives no rule computes. There is none."""
    return Jet.unknown(statistic, "what an operator keeps for a gradient, in a loss that takes gradients,")


def refuse_jets(operator: Operator, others: Iterable[Any]) -> None:
    """Raise `NotCovered` if one of the arguments after the first is a jet."""
    for argument in others:
        if isinstance(argument, Jet):
            raise NotCovered(operator)


def _part(x: Any, k: int) -> Any:
    """Return the k-th derivative of a tensor, or the list of those of a list. None means that all are zero."""
    if not isinstance(x, (list, tuple)):
        return derivatives(x)[k]
    parts = [derivatives(item)[k] for item in x]
    if k == 0 or all(part is None for part in parts):
        return parts if k == 0 else None
    return [torch.zeros_like(derivatives(item)[0]) if p is None else p for item, p in zip(x, parts, strict=True)]


def _of_part(operator: Operator, part: Any, args: Any, kwargs: Any) -> Any:
    if part is None:
        return None
    if name_of(operator) == "constant_pad_nd":
        return operator(part, args[0])  # derivatives are padded with zeros
    if name_of(operator) == "_unsafe_view":  # the strides of a derivative may differ
        return part.reshape(args[0])
    return operator(part, *args, **kwargs)


def view_of_derivative(operator: Operator, value: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Take the view that the operator takes of `value` of its derivative `x`, whose strides may differ."""
    name = name_of(operator)
    if name in ("view", "_unsafe_view", "_reshape_alias"):
        if not isinstance(args[0], (list, tuple)):
            raise UnsupportedOperation(operator, "reinterprets the bits of a value that moves")
        return x.reshape(args[0])
    if name == "as_strided":
        same_layout = x
        if x.stride() != value.stride():
            same_layout = torch.empty_strided(value.shape, value.stride(), dtype=x.dtype, device=x.device).copy_(x)
        size, stride, *offset = args
        start = (offset[0] if offset else value.storage_offset()) - value.storage_offset()
        return same_layout.as_strided(size, stride, start)
    return operator(x, *args, **kwargs)


def functional_form(operator: Operator) -> Callable[..., Any] | None:
    """Return the operator that returns what this one writes in place, or None if there is none."""
    name = name_of(operator)
    if name in ("bernoulli_", "normal_", "uniform_", "exponential_", "random_", "log_normal_", "geometric_"):
        return lambda x, *args, **kwargs: operator(x.value, *args, **kwargs)
    packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    if packet is None:
        return None
    wanted = _types(operator)
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    return next((overload for overload in overloads if _types(overload) == wanted), packet)


def _types(operator: Operator) -> list[tuple[str, str]]:
    """The types and names of the arguments: `pow_.Scalar` takes a number as exponent, `pow.Scalar` as base."""
    return [(argument.name, str(argument.type)) for argument in schema_of(operator).arguments]
