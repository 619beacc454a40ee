"""Which operators there are: with a rule, linear, constant, making new tensors, or taken apart by PyTorch itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch._ops import OpOverload

from gen_dist.jets.jet import Jet, UnsupportedOperation, as_jet, derivatives

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
    "pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle block_diag movedim".split()
)


def linear(operation: OpOverload) -> Callable[..., Any]:
    """The rule of an operator that is linear in its first argument: applied to each derivative."""

    def apply(_: OpOverload, x: Any, *args: Any, **kwargs: Any) -> Any:
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, Jet):
                raise UnsupportedOperation(operation, "has a moving argument besides its first one")
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
    if steps is None and operation.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
        steps = operation.decompose
    if steps is None:
        return None

    def apply(_: OpOverload, *args: Any, **kwargs: Any) -> Any:
        try:
            return steps(*args, **kwargs)
        except UnsupportedOperation as error:  # of a step, whose name the user does not know
            raise UnsupportedOperation(operation) from error

    return apply
