"""2-jets: tensors that move along a line, carried forward through any PyTorch program.

Along `theta + a d` every tensor of a forward pass is a curve in `a`. A `Jet` stands for such a curve by its first
three derivatives at `a = 0`, each a plain tensor: value `x`, velocity `x'`, acceleration `x''`. An operation on
jets gives the jet of its result (Faa di Bruno's formula to second order):

    f(x)            f(x)    f'(x) x'        f''(x) x'^2 + f'(x) x''
    bilinear f      f(x,w)  f(x',w)+f(x,w') f(x'',w) + 2 f(x',w') + f(x,w'')

so that one forward pass without a graph ends in the loss, its slope and its curvature, exact up to rounding. `None`
is a derivative that is zero. What an operation does to the derivatives is a rule of `jet_rules`; this module holds the
class and what is common to all rules: dispatch, views and writes in place. It works underneath autograd, on the
operators that every Python or C++ function of PyTorch comes down to, so models need not know of it.

What stops a gradient in autograd (`detach`, `torch.no_grad`) is the business of `jet_mode`, under which models are run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_map_only

__all__ = ["Jet", "UnsupportedOperation", "as_jet", "derivatives", "velocity_only"]

Derivatives: TypeAlias = "tuple[Tensor | None, Tensor | None]"

_velocity_only: ContextVar[bool] = ContextVar("velocity_only", default=False)


class UnsupportedOperation(NotImplementedError):
    """An operation that `exact` and `gauss-newton` have no verified derivative for; names it."""

    def __init__(self, operation: object, why: str = "has no verified second derivative") -> None:
        super().__init__(
            f"{operation} {why}, so 'exact' and 'gauss-newton' curvature cannot pass through it: "
            "use curvature='forward', which needs nothing but the values of the loss"
        )


@contextlib.contextmanager
def velocity_only() -> Iterator[None]:
    """Within it, rules leave accelerations out: jets are cut to first order."""
    token = _velocity_only.set(True)
    try:
        yield
    finally:
        _velocity_only.reset(token)


class Jet(Tensor):
    """A tensor that moves: `value`, `velocity` and `acceleration`, of one shape and dtype; `None` stands for zero.

    To PyTorch it is a tensor of `value`'s shape, strides, dtype and device without storage of its own. Views
    keep their source, so that a write through a view moves the source too, and the other way round.
    """

    value: Tensor
    _derivatives: Derivatives
    _writes: int  # how often the derivatives were overwritten; a view compares it with what it saw
    _source: tuple[Jet, Callable[[Tensor], Tensor], int] | None

    @staticmethod
    def __new__(cls, value: Tensor, velocity: Tensor | None = None, acceleration: Tensor | None = None) -> Jet:
        jet = torch.Tensor._make_wrapper_subclass(
            cls,
            value.shape,
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            device=value.device,
        )
        jet.value = value
        jet._derivatives = (velocity, acceleration)
        jet._writes = 0
        jet._source = None
        return jet

    def current(self) -> Derivatives:
        """Velocity and acceleration, after any write through the source of this view."""
        if self._source is not None:
            source, view, seen = self._source
            derivatives = source.current()
            if source._writes != seen:
                velocity, acceleration = derivatives
                self._derivatives = (_apply(view, velocity), _apply(view, acceleration))
                self._source = (source, view, source._writes)
                self._writes += 1
        return self._derivatives

    @property
    def velocity(self) -> Tensor | None:
        return self.current()[0]

    @property
    def acceleration(self) -> Tensor | None:
        return self.current()[1]

    def write(self, derivatives: Derivatives) -> None:
        """Replace the derivatives, here and in everything that shares memory with this jet."""
        self.current()
        if self._source is None:
            self._derivatives = derivatives
            self._writes += 1
            return
        source, view, _ = self._source
        before = source.current()
        source.write(
            (
                _write_through(view, source.value, before[0], derivatives[0]),
                _write_through(view, source.value, before[1], derivatives[1]),
            )
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        velocity, acceleration = self.current()
        return f"Jet(value={self.value}, velocity={velocity}, acceleration={acceleration})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _rule(operation)(*args, **(kwargs or {}))


def derivatives(x: Any) -> tuple[Any, Any, Any]:
    """`(x, x', x'')` of a jet; of anything else `(x, None, None)`."""
    return (x.value, *x.current()) if isinstance(x, Jet) else (x, None, None)


def as_jet(value: Tensor, velocity: Tensor | None, acceleration: Tensor | None = None) -> Tensor:
    """The jet of these derivatives, brought to the shape and dtype of `value`; `value` itself if both are zero."""
    if _velocity_only.get():
        acceleration = None
    if velocity is None and acceleration is None:
        return value
    return Jet(value, _like(value, velocity), _like(value, acceleration))


def wants_acceleration() -> bool:
    return not _velocity_only.get()


def _like(value: Tensor, derivative: Tensor | None) -> Tensor | None:
    if derivative is None:
        return None
    if derivative.dtype != value.dtype:
        derivative = derivative.to(value.dtype)
    return derivative if derivative.shape == value.shape else derivative.expand(value.shape)


def _apply(function: Callable[[Tensor], Tensor], x: Tensor | None) -> Tensor | None:
    return None if x is None else function(x)


def _write_through(
    view: Callable[[Tensor], Tensor], like: Tensor, before: Tensor | None, written: Tensor | None
) -> Tensor | None:
    """The source's derivative after its view was overwritten. Derivatives are never changed in place."""
    if before is None and written is None:
        return None
    after = torch.zeros_like(like) if before is None else torch.empty_like(like).copy_(before)
    view(after).copy_(torch.zeros((), dtype=like.dtype, device=like.device) if written is None else written)
    return after


# ------------------------------------------------------------------------------------------------ dispatch


@cache
def _rule(operation: OpOverload) -> Callable[..., Any]:
    """What to do for an operator: its rule, or one of its kind, or its decomposition, or an error."""
    from gen_dist import jet_rules

    name = jet_rules.name_of(operation)
    if any(argument.is_out for argument in operation._schema.arguments):
        return _into_out(operation)
    if torch.Tag.inplace_view in operation.tags:
        return _in_place_view(operation)
    if name in jet_rules.RULES:
        return _skipping_constants(operation, jet_rules.RULES[name])
    if name in jet_rules.CONSTANT:
        return lambda *args, **kwargs: operation(*_values(args), **_values(kwargs))
    if name in jet_rules.FACTORIES:
        return lambda *args, **kwargs: Jet(operation(*_values(args), **_values(kwargs)))
    if operation._schema.is_mutable:
        return _in_place(operation)
    if name in jet_rules.LINEAR:
        if operation._schema.returns[0].alias_info is not None:
            return _view(operation)
        return _skipping_constants(operation, jet_rules.linear(operation))
    decomposition = jet_rules.decomposition(operation)
    if decomposition is not None:
        return _skipping_constants(operation, decomposition)
    return _skipping_constants(operation, _refusal(operation))


def _refusal(operation: object, *why: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise UnsupportedOperation(operation, *why)

    return refuse


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
    from gen_dist.jet_rules import view_of_derivative

    def apply(source: Any, *args: Any, **kwargs: Any) -> Any:
        value = operation(source.value, *args, **kwargs)

        def jet(value: Tensor, index: int | None) -> Jet:
            def view(x: Tensor) -> Tensor:
                viewed: Any = view_of_derivative(operation, source.value, x, *args, **kwargs)
                return viewed if index is None else viewed[index]

            velocity, acceleration = source.current()
            result = Jet(value, _apply(view, velocity), _apply(view, acceleration))
            result._source = (source, view, source._writes)
            return result

        if isinstance(value, Tensor):
            return jet(value, None)
        return [jet(part, index) for index, part in enumerate(value)]

    return apply


def _in_place(operation: OpOverload) -> Callable[..., Any]:
    """Writes in place: the value is overwritten as the program says, derivatives by those of the result."""
    from gen_dist import jet_rules

    functional = jet_rules.functional_form(operation)

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
        target.write((_like(target.value, moved[0]), _like(target.value, moved[1])))
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
    from gen_dist.jet_rules import functional_form

    view = functional_form(operation)

    def apply(target: Jet, *args: Any, **kwargs: Any) -> Jet:
        if view is None or target._source is not None:
            raise UnsupportedOperation(operation)
        velocity, acceleration = target.current()
        target.value = view(target.value, *args, **kwargs)
        move = lambda x: view(x, *args, **kwargs)  # noqa: E731
        target._derivatives = (_apply(move, velocity), _apply(move, acceleration))
        with torch._C._DisableTorchDispatch():
            operation(target, *args, **kwargs)  # the shape and strides that PyTorch sees
        return target

    return apply
