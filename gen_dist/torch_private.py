"""All private names of PyTorch that this package uses, each under a plain name and with the reason for it.

No public name does the same. A new version of PyTorch may change any of them, so no other module uses one.
Checked on PyTorch 2.6.0, 2.13.0 and 2.14.1.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

# --- jets

Operator: TypeAlias = torch._ops.OpOverload
"""What `__torch_dispatch__` receives, such as `aten.add.Tensor`. Its class is public only under this private module."""

new_wrapper = Tensor._make_wrapper_subclass
"""Makes a tensor of a subclass that has a shape, strides, a dtype and a device, but no storage."""

no_torch_function = torch._C._disabled_torch_function_impl
"""As `__torch_function__` of a subclass: functions run as they are, and only `__torch_dispatch__` sees the subclass."""

without_torch_dispatch = torch._C._DisableTorchDispatch
"""Context manager: operators act on a subclass itself, so that an in-place view can change its shape and strides."""

decompositions = torch._decomp.decomposition_table
"""PyTorch's reductions of operators to simpler ones, by operator."""

set_grad_enabled = torch._C._set_grad_enabled
"""What `no_grad` and `enable_grad` call. A function mode sees this call, and not the public classes."""

active_function_modes = torch.overrides._get_current_function_mode_stack
"""The function modes that are entered now, so that a mode can tell whether it is still active."""

recurrent_kernels = frozenset({torch._VF.lstm, torch._VF.gru, torch._VF.rnn_tanh, torch._VF.rnn_relu})
"""The functions that `nn.LSTM`, `nn.GRU` and `nn.RNN` call. A function mode sees these, and not the modules."""


def schema_of(operator: Operator) -> Any:
    """The operator's `FunctionSchema`: the only place that tells its arguments, its results and what it writes."""
    return operator._schema


def name_of(operator: Operator) -> str:
    """`add` for `aten.add.Tensor`, and `namespace::name` outside ATen. `Operator.name()` adds the overload."""
    return schema_of(operator).name.removeprefix("aten::")


def overload_name_of(operator: Operator) -> str:
    """`Tensor` for `aten.add.Tensor`, which selects the same overload of another operator."""
    return operator._overloadname


@cache
def _signature_of(operator: Operator) -> tuple[tuple[str, ...], dict[str, Any]]:
    arguments = schema_of(operator).arguments
    defaults = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    return tuple(argument.name for argument in arguments), defaults


def arguments_by_name(operator: Operator, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by name, with defaults. `inspect` knows no signature of an operator."""
    names, defaults = _signature_of(operator)
    return defaults | dict(zip(names, args, strict=False)) | kwargs


def is_composite(operator: Operator) -> bool:
    """Whether PyTorch implements the operator by calling others, so that `operator.decompose` works."""
    return operator.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)


def autograd_function_of(context: object) -> type | None:
    """The `autograd.Function` that was given this `ctx`, or None for any other object. Only `ctx` knows its class."""
    if not isinstance(context, torch.autograd.function.BackwardCFunction):
        return None
    function: type = type(context)._forward_cls  # type: ignore[attr-defined]
    return function
