"""What an operator does to jets: its operator rule, the rule of its kind, its decomposition, or an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gen_dist.jets.jet import Jet, NotCovered, UnsupportedOperation, derivatives, shaped_like, stops_derivatives, values
from gen_dist.jets.registry import (
    CHOSEN,
    CONSTANT,
    FACTORIES,
    LINEAR,
    OF_COMPLEX,
    RULES,
    functional_form,
    linear,
    view_of_derivative,
)
from gen_dist.jets.unwritten import through_unwritten
from gen_dist.torch_private import Operator, is_view, name_of, schema_of, without_torch_dispatch

__all__ = ["rule_for"]


def rule_for(operator: Operator) -> Callable[..., Any]:
    """Return the function that runs in place of `operator` where an argument is a jet."""
    try:
        return CHOSEN[operator]
    except KeyError:
        chosen = CHOSEN[operator] = _choose(operator)
        return chosen


def _choose(operator: Operator) -> Callable[..., Any]:
    name, schema = name_of(operator), schema_of(operator)
    if any(argument.is_out for argument in schema.arguments):
        return _into_out(operator)
    if torch.Tag.inplace_view in operator.tags:
        return _in_place_view(operator)
    if name in RULES:
        return _skipping_constants(operator, _or_general(RULES[name], name in OF_COMPLEX))
    if name in CONSTANT:
        return lambda *args, **kwargs: operator(*values(args), **values(kwargs))
    if name in FACTORIES:
        return lambda *args, **kwargs: Jet(operator(*values(args), **values(kwargs)))
    if schema.is_mutable:
        return _in_place(operator)
    if is_view(operator):
        return _view(operator) if "nested" not in name else _skipping_constants(operator, _refuse)
    if name in LINEAR:
        return _skipping_constants(operator, _or_general(linear(operator), True))
    return _skipping_constants(operator, through_unwritten)


def _or_general(rule: Callable[..., Any], of_complex: bool) -> Callable[..., Any]:
    """The operator rule, and the general one for arguments that it does not cover."""

    def apply(operator: Operator, *args: Any, **kwargs: Any) -> Any:
        if of_complex or not any(type(x) is Jet and x.value.is_complex() for x in args):
            try:
                return rule(operator, *args, **kwargs)
            except NotCovered:
                pass
        return through_unwritten(operator, *args, **kwargs)

    return apply


def _refuse(operator: Operator, *args: Any, **kwargs: Any) -> Any:
    raise UnsupportedOperation(operator, "makes a nested tensor of values that move")


def _settled(argument: Any) -> Any:
    """Replace jets without velocity and acceleration by their values, inside lists and tuples too."""
    kind = type(argument)
    if kind is Jet:
        velocity, acceleration = argument.current()
        return argument.value if velocity is None and acceleration is None else argument
    return [_settled(x) for x in argument] if kind is list or kind is tuple else argument


def _moves(argument: Any) -> bool:
    """Whether a settled argument is a jet or a list with one."""
    return type(argument) is Jet or (type(argument) is list and any(type(x) is Jet for x in argument))


def _skipping_constants(operator: Operator, rule: Callable[..., Any]) -> Callable[..., Any]:
    """Call the operator rule only if a jet moves, and give it the plain values of the jets that do not."""

    def apply(*args: Any, **kwargs: Any) -> Any:
        settled = [_settled(x) for x in args]
        kwargs = {key: _settled(x) for key, x in kwargs.items()}
        if any(map(_moves, settled)) or any(map(_moves, kwargs.values())):
            return rule(operator, *settled, **kwargs)
        return operator(*settled, **kwargs)

    return apply


def _view(operator: Operator) -> Callable[..., Any]:
    """A view of a jet: views of its value and of its derivatives, with a reference to their source."""

    name = name_of(operator)
    if name == "_conj":  # inside `__torch_dispatch__`, no operator resolves a lazy conjugate
        operator = torch.ops.aten.conj_physical.default

    def apply(source: Any, *args: Any, **kwargs: Any) -> Any:
        value = operator(source.value, *args, **kwargs)
        if stops_derivatives(name):
            return value

        def jet(value: Tensor, index: int | None) -> Jet:
            def view(x: Tensor) -> Tensor:
                viewed: Any = view_of_derivative(operator, source.value, x, *args, **kwargs)
                return viewed if index is None else viewed[index]

            return source.viewed(value, view)

        if isinstance(value, Tensor):
            return jet(value, None)
        return [jet(part, index) for index, part in enumerate(value)]

    return apply


def _in_place(operator: Operator) -> Callable[..., Any]:
    """A write in place: overwrite the value, and replace the derivatives by those of the result."""
    functional = functional_form(operator)

    def apply(target: Any, *args: Any, **kwargs: Any) -> Any:
        args = tuple(_settled(x) for x in args)
        kwargs = {key: _settled(x) for key, x in kwargs.items()}
        moves = any(map(_moves, args)) or any(map(_moves, kwargs.values()))
        if isinstance(target, list):
            return _each_in_place(operator, target, *args, **kwargs)
        if not isinstance(target, Jet):
            if moves:
                why = "writes a value that depends on the parameters into a tensor made outside the model"
                raise UnsupportedOperation(operator, why)
            return operator(target, *args, **kwargs)
        if not moves and type(_settled(target)) is not Jet:
            operator(target.value, *args, **kwargs)
            return target
        if functional is None:
            raise UnsupportedOperation(operator)
        value, *moved = derivatives(functional(target, *args, **kwargs))
        _overwrite(target, value, moved)
        return target

    return apply


def _overwrite(target: Jet, value: Tensor, moved: list[Tensor | None]) -> None:
    target.value.copy_(value)
    target.write((shaped_like(target.value, moved[0]), shaped_like(target.value, moved[1])))


def _each_in_place(operator: Operator, targets: list[Any], *args: Any, **kwargs: Any) -> None:
    """A write into each tensor of a list, as `torch._foreach_add_` does."""
    functional = functional_form(operator)
    if functional is None or not all(isinstance(target, Jet) for target in targets):
        raise UnsupportedOperation(operator)
    for target, result in zip(targets, functional(targets, *args, **kwargs), strict=True):
        value, *moved = derivatives(result)
        _overwrite(target, value, moved)


def _into_out(operator: Operator) -> Callable[..., Any]:
    """`f(..., out=target)`: compute `f(...)` and copy the result into `target`."""
    functional = operator.overloadpacket

    def apply(*args: Any, out: Any, **kwargs: Any) -> Any:
        return torch.ops.aten.copy_(out, functional(*args, **kwargs))

    return apply


def _in_place_view(operator: Operator) -> Callable[..., Any]:
    """`transpose_`, `squeeze_` and others: the tensor becomes a view of itself."""
    view = functional_form(operator)

    def apply(target: Jet, *args: Any, **kwargs: Any) -> Jet:
        if view is None or target.is_view:
            raise UnsupportedOperation(operator)
        target.become_view(lambda x: view(x, *args, **kwargs))
        with without_torch_dispatch():
            operator(target, *args, **kwargs)  # changes the shape and strides that PyTorch sees
        return target

    return apply


Jet.rule_for = staticmethod(rule_for)
