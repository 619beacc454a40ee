"""Every private name of PyTorch that this library uses, each with its reason.

Checked on torch 2.6.0, 2.13.0 and 2.14.1. If a new version of PyTorch breaks something, look here first.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
import torch.nn.utils.parametrize
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # no public module has it
from torch.utils._pytree import tree_leaves as tree_leaves  # torch 2.6 has no public ones
from torch.utils._pytree import tree_map_only as tree_map_only

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

# --- tensors: one call for a whole list. Public optimizers are built on these; the public API has no list form.

foreach_add_ = torch._foreach_add_
foreach_copy_ = torch._foreach_copy_
foreach_div_ = torch._foreach_div_
foreach_lerp_ = torch._foreach_lerp_
foreach_mul = torch._foreach_mul
foreach_mul_ = torch._foreach_mul_
foreach_norm = torch._foreach_norm
foreach_sub_ = torch._foreach_sub_

set_grad_enabled = torch._C._set_grad_enabled
"""What `no_grad` and `enable_grad` call. A function mode sees this call, and not the public classes. A function that
restores what an interrupt has left behind needs no block for it."""


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a `DTensor`, sharing its memory; any other tensor as it is.

    With gradients enabled, the public `to_local()` returns a view with a graph.
    """
    part: Tensor = getattr(tensor, "_local_tensor", tensor)
    return part


def version_of(tensor: Tensor) -> int:
    """How often the tensor was written to; inference tensors do not count. No public name tells."""
    return 0 if tensor.is_inference() else tensor._version


# --- modules: a tensor is replaced for a while, under its name


def forward_pre_hooks_of(module: nn.Module) -> dict[int, Any]:
    """The module's hooks by key: one whose handle an interrupt has lost can be removed."""
    return module._forward_pre_hooks


global_forward_pre_hooks = torch.nn.modules.module._global_forward_pre_hooks
"""The hooks of all modules by key: one whose handle an interrupt has lost can be removed."""

own_attributes_of_modules = frozenset(nn.Module().__dict__)
"""What PyTorch itself keeps in the `__dict__` of every module."""


def is_uninitialized(tensor: Tensor) -> bool:
    """Whether it is the parameter of a lazy module that has not run."""
    return torch.nn.parameter.is_lazy(tensor)


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` has been asked for, by either of its ways."""
    return module.__dict__.get("_compiled_call_impl") is not None or type(module).__name__ == "OptimizedModule"


@cache
def _is_a(kind: Any, *names: str) -> bool:
    """Whether PyTorch's class of this name is a base: without an import that may be missing or take long.

    An import of FSDP also lets the last DDP model end gloo's process group with Python's lock held, for which a thread
    of the group may wait: then the process never ends.
    """
    return any(c.__name__ in names and c.__module__.startswith("torch.") for c in kind.__mro__)


def wraps_only(module: nn.Module) -> bool:
    """Whether the module is a wrapper, whose attributes are PyTorch's own bookkeeping."""
    return _is_a(cast(Any, type(module)), "DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule")


def is_fsdp1_unit(module: nn.Module) -> bool:
    """Whether the module is a unit of FSDP1, which moves the weights of all modules inside."""
    return _is_a(cast(Any, type(module)), "FullyShardedDataParallel")


# --- optimizers


def patch_step(optimizer: Optimizer) -> None:
    """Give a class its hooks around `step`, as the constructor does; for an object whose class has just changed."""
    optimizer._patch_step_function()


def supports_found_inf(optimizer: Optimizer) -> bool:
    """Whether a step does nothing where a tensor in `optimizer.found_inf` is 1: what `GradScaler` asks of it."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


# --- parallel: DTensor, FSDP2


def is_fsdp2_unit(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to the module itself."""
    return _is_a(cast(Any, type(module)), "FSDPModule")


def with_local_part(tensor: DTensor, part: Tensor) -> DTensor:
    """A `DTensor` like this one around another part, to which the public `from_local()` would apply an operator."""
    return type(tensor)(part, tensor._spec, requires_grad=False)


def fsdp2_compute_dtype(unit: nn.Module) -> torch.dtype | None:
    """The dtype of a unit's mixed precision policy, which FSDP2 does not hand out."""
    return cast(Any, unit)._get_fsdp_state()._mp_policy.param_dtype


def end_fsdp2_forward(unit: nn.Module) -> None:
    """End a unit's forward pass that an error has broken off; its weights can then be resharded.

    A unit that is still in its forward pass keeps its weights, also those of the next pass. PyTorch's public
    `reset_iter_state()`, from 2.13 on, also drops gradients that wait for others to be accumulated.
    """
    state = cast(Any, unit)._get_fsdp_state()
    if state._training_state.name != "FORWARD":
        return
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    for each in (state, *filter(None, groups)):
        each._training_state = type(each._training_state).IDLE
    state._modules_to_run_forward.clear()
    state._state_ctx.iter_forward_root = None


# --- parallel: DDP


def ddp_is_joining(wrapper: nn.Module) -> bool:
    """Whether the wrapper is inside `with model.join():`, of which DDP gives no sign."""
    return bool(cast(Any, wrapper)._join_config.enable)


# --- parallel: FSDP1
#
# FSDP1 keeps the weights of a unit in one flat parameter, of which each rank has a piece. Only the "handle" of the unit
# knows how they lie in it, and there is no public way to either.


def fsdp1_handle(wrapper: nn.Module) -> Any:
    """The handle of a unit; None for one without parameters of its own."""
    return cast(Any, wrapper)._handle


def fsdp1_inner(wrapper: nn.Module) -> nn.Module:
    """The module inside: the public `module` skips the wrapper of activation checkpointing, whose hooks we need."""
    return cast(Any, wrapper)._fsdp_wrapped_module


def fsdp1_replica_group(wrapper: nn.Module) -> ProcessGroup:
    """The ranks that hold the same piece, under the hybrid strategies."""
    return cast(Any, wrapper)._inter_node_pg


def fsdp1_is_sharded(handle: Any) -> bool:
    """Whether ranks hold different pieces: not so with `NO_SHARD`, nor in a group of one rank."""
    return handle.uses_sharded_strategy


def fsdp1_parameters(handle: Any) -> list[Tensor]:
    """What an optimizer sees of a unit: the original parameters with `use_orig_params`, otherwise the flat one."""
    flat = handle.flat_param
    return list(flat._params) if handle._use_orig_params else [flat]


def fsdp1_reshard(handle: Any) -> None:
    """Let go of gathered weights: FSDP1 has no public call for it."""
    # before the first forward pass nothing has been gathered, and the handle knows no shard yet
    if fsdp1_is_sharded(handle) and hasattr(handle.flat_param, "_local_shard"):
        handle.reshard(free_unsharded_flat_param=True)


def fsdp1_zeros(handle: Any) -> Tensor:
    """Zeros in the place of this rank's piece of the flat parameter."""
    flat = handle.flat_param
    return torch.zeros_like(flat._local_shard if fsdp1_is_sharded(handle) else flat)


def fsdp1_pieces(handle: Any, piece: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The parameters that an optimizer sees, each with its place in this rank's piece of the flat one."""
    if not handle._use_orig_params:
        yield handle.flat_param, piece
        return
    flat = handle.flat_param
    for parameter, info in zip(flat._params, flat._shard_param_infos, strict=True):
        if info.in_shard:
            yield parameter, piece.narrow(0, info.offset_in_shard, info.numel_in_shard)


def fsdp1_weights(handle: Any, whole: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The weights that a unit holds while it runs, each with its view of a tensor laid out as the flat parameter."""
    flat = handle.flat_param
    views = handle._get_unflat_views(whole[: flat._unpadded_unsharded_size.numel()])  # without the padding at the end
    for (name, module, _), view in zip(flat._param_infos, views, strict=True):
        yield getattr(module, name), view


def enable_gradients_unseen(enabled: bool) -> None:
    """As `torch.set_grad_enabled`, unseen by a mode that follows what the program itself does."""
    with torch._C.DisableTorchFunction():
        torch._C._set_grad_enabled(enabled)


# --- jets

Operator: TypeAlias = torch._ops.OpOverload
"""What `__torch_dispatch__` receives, such as `aten.add.Tensor`. Its class is public only under this private module."""

new_wrapper = Tensor._make_wrapper_subclass
"""Makes a tensor of a subclass that has a shape, strides, a dtype and a device, but no storage."""

forbid_memory = torch._C._set_throw_on_mutable_data_ptr
"""Lets C++ code that asks such a tensor for its memory raise `RuntimeError`: it would get a null pointer, and crash."""

no_torch_function = torch._C._disabled_torch_function_impl
"""As `__torch_function__` of a subclass: functions run as they are, and only `__torch_dispatch__` sees the subclass."""

without_torch_dispatch = torch._C._DisableTorchDispatch
"""Context manager: operators act on a subclass itself, so that an in-place view can change its shape and strides."""

decompositions = torch._decomp.decomposition_table
"""PyTorch's reductions of operators to simpler ones, by operator."""

without_torch_function = torch._C.DisableTorchFunction
"""Context manager: functions run as they are, unseen by function modes and subclasses."""

_keys_outside = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()


def _same(x: Tensor) -> Tensor:
    return x


class _Outside:
    """Context manager: operators are dispatched as outside of any operator, unseen by function modes.

    Inside `__torch_dispatch__`, PyTorch leaves out autograd and the resolution of lazy conjugates. Hooks on what
    autograd saves, as those of checkpointing, see nothing of what it saves here.
    """

    def __init__(self, gradients: bool) -> None:
        self._gradients = gradients

    def __enter__(self) -> None:
        # inside of a transform of torch.func there are no such hooks, and none can be added
        self._hides = self._gradients and cast(Any, torch._C._autograd)._saved_tensors_hooks_is_enabled()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(_same, _same)
        if self._hides:
            self._hooks.__enter__()
        self._function = torch._C.DisableTorchFunction()
        self._function.__enter__()
        self._dispatch = torch._C._ForceDispatchKeyGuard(*_keys_outside)
        self._dispatch.__enter__()
        self._before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(self._gradients)

    def __exit__(self, *exception: Any) -> None:
        torch._C._set_grad_enabled(self._before)
        self._dispatch.__exit__(*exception)
        self._function.__exit__(*exception)
        if self._hides:
            self._hooks.__exit__(*exception)


plain_autograd: Callable[[], Any] = functools.partial(_Outside, True)
"""Context manager inside `__torch_dispatch__` in which autograd records operators on plain tensors."""

plain_values: Callable[[], Any] = functools.partial(_Outside, False)
"""The same without a graph."""

active_dispatch_modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack
"""The dispatch modes that are entered now."""

active_function_modes = torch.overrides._get_current_function_mode_stack
"""The function modes that are entered now, so that a mode can tell whether it is still active."""

recurrent_kernels = frozenset({torch._VF.lstm, torch._VF.gru, torch._VF.rnn_tanh, torch._VF.rnn_relu})
"""The functions that `nn.LSTM`, `nn.GRU` and `nn.RNN` call. A function mode sees these, and not the modules."""

recurrent_layers: dict[Any, tuple[str, int]] = {torch._VF.lstm: ("lstm", 2), torch._VF.gru: ("gru", 1)}
"""Those of them with gates, by function: the kind, and how many states a layer keeps."""


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
def _written_by(operator: Operator) -> tuple[tuple[int, str], ...]:
    schema = getattr(operator, "_schema", None)  # higher-order operators have none
    if schema is None or not schema.is_mutable:
        return ()
    return tuple((i, a.name) for i, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write)


def written_arguments(operator: Operator, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call writes into."""
    written: list[Tensor] = []
    for index, name in _written_by(operator):
        found = args[index] if index < len(args) else kwargs.get(name)
        written += [x for x in (found if isinstance(found, (list, tuple)) else [found]) if isinstance(x, Tensor)]
    return written


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


def is_view(operator: Operator) -> bool:
    """Whether the operator returns views of its first argument."""
    result = schema_of(operator).returns
    return bool(result) and result[0].alias_info is not None and not result[0].alias_info.is_write


def base_of(tensor: Tensor) -> Tensor:
    """What the tensor is a view of, itself if it is none."""
    base: Tensor | None = tensor._base
    return tensor if base is None else base


transforms_are_active = torch._C._are_functorch_transforms_active
"""Whether a transform of `torch.func` runs now. It wraps tensors at a level of its own."""


def transform_level() -> int:
    """How many transforms of `torch.func` run inside each other now."""
    return torch._C._functorch.maybe_current_level() or 0


def is_wrapped_by_a_transform(tensor: Tensor) -> bool:
    """Whether a transform of `torch.func` has wrapped the tensor."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def replace_what_transforms_wrap(replaced: Callable[[Any], Any] | None) -> None:
    """Make the transforms of `torch.func` wrap `replaced(x)` in place of a tensor `x`; None ends it.

    They wrap by two C functions, which no function mode sees.
    """
    for module, name, wrap in _wrapping:
        if replaced is None:
            setattr(module, name, wrap)
        else:
            setattr(module, name, functools.partial(_wrap_replaced, wrap, replaced))


def _wrap_replaced(wrap: Callable[..., Any], replaced: Callable[[Any], Any], tensor: Any, *args: Any) -> Any:
    return wrap(replaced(tensor), *args)


_wrapping: list[tuple[Any, str, Callable[..., Any]]] = [
    (torch._functorch.eager_transforms, "_wrap_for_grad", torch._functorch.eager_transforms._wrap_for_grad),
    (torch._functorch.vmap, "_add_batch_dim", torch._functorch.vmap._add_batch_dim),
]


Forward = Callable[..., Any]


def watch_autograd_functions(watcher: Callable[[type, Forward, Any, Any], Any] | None) -> None:
    """Call `watcher(function, forward, args, kwargs)` in place of the forward of every `autograd.Function`.

    None ends it. C++ code calls the forward, however the function is written and applied. It looks it up in the class.
    """
    if watcher is None:
        if "__getattribute__" in vars(_FunctionMeta):
            del _FunctionMeta.__getattribute__
        return

    def attribute(function: type, name: str) -> Any:
        found = type.__getattribute__(function, name)
        return _watched(watcher, function, found) if name == "forward" else found

    _FunctionMeta.__getattribute__ = attribute


_FunctionMeta: Any = torch.autograd.function.FunctionMeta


def _watched(watcher: Callable[[type, Forward, Any, Any], Any], function: type, forward: Forward) -> Forward:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        return watcher(function, forward, args, kwargs)

    return run


_script_calls = {kind: kind.__call__ for kind in (torch._C.ScriptFunction, torch._C.ScriptMethod)}


def watch_scripts(watcher: Callable[[Callable[..., Any], Any, Any], Any] | None) -> None:
    """Call `watcher(run, args, kwargs)` in place of each function and method of TorchScript; None ends it.

    They are no functions to a function mode, and C++ code runs what they call.
    """
    for kind, call in _script_calls.items():
        cast(Any, kind).__call__ = call if watcher is None else _watched_script(watcher, call)


def _watched_script(watcher: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
    def run(script: Any, *args: Any, **kwargs: Any) -> Any:
        return watcher(functools.partial(call, script), args, kwargs)

    return run


# `backward()` in all its forms calls this, and so does `torch.autograd.grad`.
_run_backward = torch.autograd._engine_run_backward


def watch_backward(watcher: Callable[[], None] | None) -> None:
    """Call `watcher()` before each `backward()`, which accumulates gradients in tensors; None ends it."""

    def watched(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("accumulate_grad"):
            watcher()  # type: ignore[misc]
        return _run_backward(*args, **kwargs)

    torch.autograd._engine_run_backward = _run_backward if watcher is None else watched


def is_called_by_checkpoint() -> bool:
    """Whether reentrant checkpointing disables gradients now, which it does while it runs the user's code."""
    frame: Any = sys._getframe(1)
    while frame.f_globals["__name__"] in _SWITCHING:
        frame = frame.f_back
    return bool(frame.f_code is _checkpoint)


_checkpoint = torch.utils.checkpoint.CheckpointFunction.forward.__code__

_SWITCHING = ("gen_dist.jets.mode", "gen_dist.jets.stops", "torch.autograd.grad_mode")
"""The modules between a program that switches gradients and a mode that asks who did."""


backward_hook_function = torch.nn.modules._functions.BackwardHookFunction
"""The `autograd.Function` that a module with a full backward hook sends its inputs and outputs through."""

pad_packed_sequence = torch._VF._pad_packed_sequence
"""What `torch.nn.utils.rnn.pad_packed_sequence` calls."""

pad_sequence = torch._C._nn.pad_sequence
"""What `torch.nn.utils.rnn.pad_sequence` calls."""


def parametrization_cache() -> dict[Any, Any]:
    """The weights that `torch.nn.utils.parametrize.cached()` keeps, computed from the parameters as they were."""
    return torch.nn.utils.parametrize._cache


def is_scripted(module: nn.Module) -> bool:
    """Whether TorchScript runs the module. It reads the weights where no function mode sees them."""
    return isinstance(module, torch.jit.ScriptModule)


def scripted_attributes(module: nn.Module) -> list[tuple[Any, Callable[[Any], None]]]:
    """What TorchScript keeps of this module alone, weights and buffers too, each with what puts another in its place.

    Of lists and dicts these are copies.
    """
    script, kind = cast(Any, module)._c, cast(Any, module)._concrete_type
    return [(script.getattr(name), functools.partial(script.setattr, name)) for name in kind.get_attributes()]
