"""`Jet`: a tensor that carries its first and second derivatives along a line. `gen_dist.jets` gives the equations.

`Jet` works below autograd, on the operators that every Python or C++ function of PyTorch calls, so models need no
change. This module holds what all operator rules share: dispatch, views and writes in place. The operator rules are in
`gen_dist.jets.rules`. `JetMode` handles what stops a gradient in autograd (`detach`, `torch.no_grad`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, ClassVar, TypeAlias, cast

import torch
from torch import Tensor

from gen_dist.torch_private import Operator, forbid_memory, new_wrapper, no_torch_function

__all__ = ["Jet", "UnsupportedOperation", "as_jet", "derivatives", "velocity_only"]

DETACH = torch.ops.aten.detach.default

Derivatives: TypeAlias = "tuple[Tensor | None, Tensor | None]"

_velocity_only: ContextVar[bool] = ContextVar("velocity_only", default=False)
_stopping: ContextVar[bool] = ContextVar("stopping", default=False)
_in_script: ContextVar[list[UnsupportedOperation] | None] = ContextVar("in_script", default=None)
_script_stops: ContextVar[bool] = ContextVar("script_stops", default=False)
_casts: ContextVar[set[torch.dtype] | None] = ContextVar("casts", default=None)


class UnsupportedOperation(NotImplementedError):
    """Raised where a model uses an operation that jets cannot pass through. The message names the operation.

    Attributes:
        reason: the operation and what is wrong with it, without the remedy.
    """

    def __init__(self, operation: object, why: str = "has no verified second derivative") -> None:
        self.reason = f"{operation} {why}"
        raised = _in_script.get()
        if raised is not None:
            raised.append(self)
        super().__init__(
            f"{self.reason}, so 'exact' and 'gauss-newton' curvature cannot pass through it: "
            "use curvature='forward', which only needs the values of the loss"
        )


class NotCovered(Exception):
    """Raised by an operator rule for arguments that it does not cover: the general rule takes them."""


@contextlib.contextmanager
def velocity_only() -> Iterator[None]:
    """Context manager that cuts jets to first order: operator rules compute no accelerations."""
    token = _velocity_only.set(True)
    try:
        yield
    finally:
        _velocity_only.reset(token)


@contextlib.contextmanager
def with_acceleration() -> Iterator[None]:
    """Context manager that undoes `velocity_only` inside."""
    token = _velocity_only.set(False)
    try:
        yield
    finally:
        _velocity_only.reset(token)


@contextlib.contextmanager
def noting_casts() -> Iterator[set[torch.dtype]]:
    """Context manager with the set of the dtypes that jets are cast to inside, as autocast does."""
    found: set[torch.dtype] = set()
    token = _casts.set(found)
    try:
        yield found
    finally:
        _casts.reset(token)


def note_cast(dtype: torch.dtype) -> None:
    """Add the dtype to the set of `noting_casts`."""
    found = _casts.get()
    if found is not None:
        found.add(dtype)


class Jet(Tensor):
    """A tensor that moves along a line: `value`, `velocity` and `acceleration`.

    Velocity and acceleration have the shape and dtype of the value. `None` means zero. PyTorch sees a tensor with the
    shape, strides, dtype and device of `value`, without storage.

    A view keeps a reference to its source, so that a write through the view changes the source, and the other way
    round.
    """

    rule_for: ClassVar[Callable[[Operator], Callable[..., Any]]]  # `dispatch` sets it: operator rules need this class
    value: Tensor
    _derivatives: Derivatives
    _writes: int  # how often the derivatives were overwritten; a view compares it with the count it saw
    _source: tuple[Jet, Callable[[Tensor], Tensor], int] | None

    @staticmethod
    def __new__(cls, value: Tensor, velocity: Tensor | None = None, acceleration: Tensor | None = None) -> Jet:
        jet = new_wrapper(
            cls,
            value.shape,
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            device=value.device,
        )
        forbid_memory(jet)
        jet.value = value
        jet._derivatives = (velocity, acceleration)
        jet._writes = 0
        jet._source = None
        return jet

    def current(self) -> Derivatives:
        """Return velocity and acceleration, including what was written through the source of this view."""
        if self._source is not None:
            source, view, seen = self._source
            derivatives = source.current()
            if source._writes != seen:
                velocity, acceleration = derivatives
                self._derivatives = (applied(view, velocity), applied(view, acceleration))
                self._source = (source, view, source._writes)
                self._writes += 1
        return self._derivatives

    @staticmethod
    def unknown(value: Tensor, what: str) -> Jet:
        """Return a jet whose derivatives raise `UnsupportedOperation` where they are asked for."""
        jet = Jet(value)
        jet._source = (cast(Any, _Unknown(what)), lambda x: x, 0)
        return jet

    @property
    def velocity(self) -> Tensor | None:
        return self.current()[0]

    @property
    def acceleration(self) -> Tensor | None:
        return self.current()[1]

    @property
    def is_view(self) -> bool:
        return self._source is not None

    @property
    def is_unknown(self) -> bool:
        return self._source is not None and isinstance(self._source[0], _Unknown)

    def viewed(self, value: Tensor, view: Callable[[Tensor], Tensor]) -> Jet:
        """Return a view of this jet. `value` is the view of `self.value`, and `view` takes it of a derivative."""
        if self._source is not None and isinstance(self._source[0], _Unknown):
            return Jet.unknown(value, self._source[0].what)
        velocity, acceleration = self.current()
        result = Jet(value, applied(view, velocity), applied(view, acceleration))
        result._source = (self, view, self._writes)
        return result

    def write(self, derivatives: Derivatives) -> None:
        """Replace the derivatives of this jet and of all jets that share memory with it."""
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

    def become_view(self, view: Callable[[Tensor], Tensor]) -> None:
        """Replace the value and the derivatives by views of them. This jet must not be a view itself."""
        velocity, acceleration = self.current()
        self.value = view(self.value)
        self._derivatives = (applied(view, velocity), applied(view, acceleration))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        velocity, acceleration = self.current()
        return f"Jet(value={self.value}, velocity={velocity}, acceleration={acceleration})"

    __torch_function__ = no_torch_function  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operator: Operator, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if not _script_stops.get():
            return cls.rule_for(operator)(*args, **(kwargs or {}))
        if operator is DETACH or not torch.is_grad_enabled():
            return operator(*values(args), **values(kwargs or {}))
        token = _script_stops.set(False)  # what the operator rule calls is not the script's
        try:
            return cls.rule_for(operator)(*args, **(kwargs or {}))
        finally:
            _script_stops.reset(token)


class _Unknown:
    """In place of the source of a jet."""

    def __init__(self, what: str) -> None:
        self.what = what

    def current(self) -> Derivatives:
        raise UnsupportedOperation(self.what, "is used")


def derivatives(x: Any) -> tuple[Any, Any, Any]:
    """Return `(x, x', x'')` for a jet, and `(x, None, None)` for anything else."""
    return (x.value, *x.current()) if isinstance(x, Jet) else (x, None, None)


def moves(x: Any) -> bool:
    """Whether `x` is a jet with a velocity or an acceleration."""
    return isinstance(x, Jet) and x.current() != (None, None)


def without_derivatives(x: Tensor, wrapped: bool) -> Tensor:
    """Return `x` as a constant along the line. With `wrapped`, any tensor may hold a jet, else a subclass."""
    if isinstance(x, Jet):
        return x.value
    if (not wrapped and type(x) in (Tensor, torch.nn.Parameter)) or x.is_nested:  # no jet is nested
        return x
    token = _stopping.set(True)
    try:
        result: Tensor = torch.ops.aten.alias(x)  # comes through all wrappers to the jet
        return result
    finally:
        _stopping.reset(token)


@contextlib.contextmanager
def running_script(stops: bool) -> Iterator[list[UnsupportedOperation]]:
    """Context manager for TorchScript, with the list of the errors raised inside: its interpreter makes others of them.

    With `stops`, derivatives stop where it detaches or disables gradients, which no function mode sees.
    """
    raised: list[UnsupportedOperation] = []
    token, token_of_stops = _in_script.set(raised), _script_stops.set(stops)
    try:
        yield raised
    finally:
        _in_script.reset(token)
        _script_stops.reset(token_of_stops)


def stops_derivatives(name: str) -> bool:
    """Whether the operator of this name stops derivatives now: an alias where `without_derivatives` asks for it."""
    return _stopping.get() and name == "alias"


def as_jet(value: Tensor, velocity: Tensor | None, acceleration: Tensor | None = None) -> Tensor:
    """Return the jet with these derivatives, expanded to the shape and converted to the dtype of `value`.

    Return `value` itself if both derivatives are None. Drop the acceleration inside `velocity_only`.
    """
    if _velocity_only.get():
        acceleration = None
    if velocity is None and acceleration is None:
        return value
    return Jet(value, shaped_like(value, velocity), shaped_like(value, acceleration))


def wants_acceleration() -> bool:
    """Return False inside `velocity_only`."""
    return not _velocity_only.get()


def shaped_like(value: Tensor, derivative: Tensor | None) -> Tensor | None:
    """Return the derivative with the dtype and the shape of `value`."""
    if derivative is None:
        return None
    if derivative.dtype != value.dtype:
        derivative = derivative.to(value.dtype)
    return derivative if derivative.shape == value.shape else derivative.expand(value.shape)


def applied(linear: Callable[[Tensor], Tensor], x: Tensor | None) -> Tensor | None:
    """Return `linear(x)`, and None for None: a linear function maps zero to zero."""
    return None if x is None else linear(x)


def values(arguments: Any) -> Any:
    """Return the arguments with each jet replaced by its value, inside tuples, lists and dicts too."""
    if isinstance(arguments, Jet):
        return arguments.value
    if type(arguments) in (tuple, list):
        return type(arguments)([values(x) for x in arguments])
    if type(arguments) is dict:
        return {key: values(x) for key, x in arguments.items()}
    return arguments


def _write_through(
    view: Callable[[Tensor], Tensor], like: Tensor, before: Tensor | None, written: Tensor | None
) -> Tensor | None:
    """Return the source's derivative after a write to its view, as a new tensor, since derivatives may be shared."""
    if before is None and written is None:
        return None
    after = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
    after = after.zero_() if before is None else after.copy_(before)
    part = view(after)
    if part.untyped_storage().data_ptr() != after.untyped_storage().data_ptr():
        raise UnsupportedOperation("a write through a view that jets hold as a copy", "cannot be followed")
    part.copy_(torch.zeros((), dtype=like.dtype, device=like.device) if written is None else written)
    return after
