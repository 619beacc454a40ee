"""From an operator to what to do on jets: its rule, that of its kind, its decomposition, or an error that names it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_map_only

from gen_dist.jets.jet import Jet, UnsupportedOperation, applied, derivatives, shaped_like
from gen_dist.jets.registry import (
    CONSTANT,
    FACTORIES,
    LINEAR,
    RULES,
    decomposition,
    functional_form,
    linear,
    name_of,
    view_of_derivative,
)

__all__ = ["rule_for"]


@cache
def rule_for(operation: OpOverload) -> Callable[..., Any]:
    """What to do for an operator: its rule, or one of its kind, or its decomposition, or an error."""
    name = name_of(operation)
    if any(argument.is_out for argument in operation._schema.arguments):
        return _into_out(operation)
    if torch.Tag.inplace_view in operation.tags:
        return _in_place_view(operation)
    if name in RULES:
        return _skipping_constants(operation, RULES[name])
    if name in CONSTANT:
        return lambda *args, **kwargs: operation(*_values(args), **_values(kwargs))
    if name in FACTORIES:
        return lambda *args, **kwargs: Jet(operation(*_values(args), **_values(kwargs)))
    if operation._schema.is_mutable:
        return _in_place(operation)
    if name in LINEAR:
        if operation._schema.returns[0].alias_info is not None:
            return _view(operation)
        return _skipping_constants(operation, linear(operation))
    return _skipping_constants(operation, decomposition(operation) or _refuse)


def _refuse(operation: OpOverload, *args: Any, **kwargs: Any) -> Any:
    raise UnsupportedOperation(operation)


def _settled(argument: Any) -> Any:
    """An argument with every jet that stands still replaced by its value; lists and tuples are looked into."""
    kind = type(argument)
    if kind is Jet:
        velocity, acceleration = argument.current()
        return argument.value if velocity is None and acceleration is None else argument
    return [_settled(x) for x in argument] if kind is list or kind is tuple else argument


def _moves(argument: Any) -> bool:
    """Whether a settled argument holds a jet."""
    return type(argument) is Jet or (type(argument) is list and any(type(x) is Jet for x in argument))


def _values(arguments: Any) -> Any:
    return tree_map_only(Jet, lambda jet: jet.value, arguments)


def _skipping_constants(operation: OpOverload, rule: Callable[..., Any]) -> Callable[..., Any]:
    """Rules see no jet that stands still, and where none moves nothing is derived."""

    def apply(*args: Any, **kwargs: Any) -> Any:
        settled = [_settled(x) for x in args]
        kwargs = {key: _settled(x) for key, x in kwargs.items()}
        if any(map(_moves, settled)) or any(map(_moves, kwargs.values())):
            return rule(operation, *settled, **kwargs)
        return operation(*settled, **kwargs)

    return apply


def _view(operation: OpOverload) -> Callable[..., Any]:
    """Views of a jet are views of its value and of its derivatives, and remember where they come from."""

    def apply(source: Any, *args: Any, **kwargs: Any) -> Any:
        value = operation(source.value, *args, **kwargs)

        def jet(value: Tensor, index: int | None) -> Jet:
            def view(x: Tensor) -> Tensor:
                viewed: Any = view_of_derivative(operation, source.value, x, *args, **kwargs)
                return viewed if index is None else viewed[index]

            velocity, acceleration = source.current()
            result = Jet(value, applied(view, velocity), applied(view, acceleration))
            result._source = (source, view, source._writes)
            return result

        if isinstance(value, Tensor):
            return jet(value, None)
        return [jet(part, index) for index, part in enumerate(value)]

    return apply


def _in_place(operation: OpOverload) -> Callable[..., Any]:
    """Writes in place: the value is overwritten as the program says, derivatives by those of the result."""
    functional = functional_form(operation)

    def apply(target: Any, *args: Any, **kwargs: Any) -> Any:
        args = tuple(_settled(x) for x in args)
        kwargs = {key: _settled(x) for key, x in kwargs.items()}
        moves = any(map(_moves, args)) or any(map(_moves, kwargs.values()))
        if not isinstance(target, Jet):
            if moves:
                why = "writes a value that depends on the parameters into a tensor made outside the model"
                raise UnsupportedOperation(operation, why)
            return operation(target, *args, **kwargs)
        if not moves and type(_settled(target)) is not Jet:
            operation(target.value, *args, **kwargs)
            return target
        if functional is None:
            raise UnsupportedOperation(operation)
        value, *moved = derivatives(functional(target, *args, **kwargs))
        target.value.copy_(value)
        target.write((shaped_like(target.value, moved[0]), shaped_like(target.value, moved[1])))
        return target

    return apply


def _into_out(operation: OpOverload) -> Callable[..., Any]:
    """`f(..., out=target)` is `target` overwritten by `f(...)`."""
    functional = operation.overloadpacket

    def apply(*args: Any, out: Any, **kwargs: Any) -> Any:
        return torch.ops.aten.copy_(out, functional(*args, **kwargs))

    return apply


def _in_place_view(operation: OpOverload) -> Callable[..., Any]:
    """`transpose_` and its like: the tensor becomes a view of itself."""
    view = functional_form(operation)

    def apply(target: Jet, *args: Any, **kwargs: Any) -> Jet:
        if view is None or target._source is not None:
            raise UnsupportedOperation(operation)
        velocity, acceleration = target.current()
        target.value = view(target.value, *args, **kwargs)
        move = lambda x: view(x, *args, **kwargs)  # noqa: E731
        target._derivatives = (applied(move, velocity), applied(move, acceleration))
        with torch._C._DisableTorchDispatch():
            operation(target, *args, **kwargs)  # the shape and strides that PyTorch sees
        return target

    return apply


Jet.rule_for = staticmethod(rule_for)
