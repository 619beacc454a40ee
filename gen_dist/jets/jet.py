"""2-jets: tensors that move along a line, carried forward through any PyTorch program.

Along `theta + a d` every tensor of a forward pass is a curve in `a`. A `Jet` stands for such a curve by its first
three derivatives at `a = 0`, each a plain tensor: value `x`, velocity `x'`, acceleration `x''`. An operation on
jets gives the jet of its result (Faa di Bruno's formula to second order):

    f(x)            f(x)    f'(x) x'        f''(x) x'^2 + f'(x) x''
    bilinear f      f(x,w)  f(x',w)+f(x,w') f(x'',w) + 2 f(x',w') + f(x,w'')

so that one forward pass without a graph ends in the loss, its slope and its curvature, exact up to rounding. `None`
is a derivative that is zero. What an operation does to the derivatives is a rule of `jets.rules`; this module holds the
class and what is common to all rules: dispatch, views and writes in place. It works underneath autograd, on the
operators that every Python or C++ function of PyTorch comes down to, so models need not know of it.

What stops a gradient in autograd (`detach`, `torch.no_grad`) is the business of `jet_mode`, under which models are run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torch._ops import OpOverload

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

    rule_for: ClassVar[Callable[[OpOverload], Callable[..., Any]]]  # set by `dispatch`: rules need jets
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
                self._derivatives = (applied(view, velocity), applied(view, acceleration))
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

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        velocity, acceleration = self.current()
        return f"Jet(value={self.value}, velocity={velocity}, acceleration={acceleration})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operation: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return cls.rule_for(operation)(*args, **(kwargs or {}))


def derivatives(x: Any) -> tuple[Any, Any, Any]:
    """`(x, x', x'')` of a jet; of anything else `(x, None, None)`."""
    return (x.value, *x.current()) if isinstance(x, Jet) else (x, None, None)


def as_jet(value: Tensor, velocity: Tensor | None, acceleration: Tensor | None = None) -> Tensor:
    """The jet of these derivatives, brought to the shape and dtype of `value`; `value` itself if both are zero."""
    if _velocity_only.get():
        acceleration = None
    if velocity is None and acceleration is None:
        return value
    return Jet(value, shaped_like(value, velocity), shaped_like(value, acceleration))


def wants_acceleration() -> bool:
    return not _velocity_only.get()


def shaped_like(value: Tensor, derivative: Tensor | None) -> Tensor | None:
    if derivative is None:
        return None
    if derivative.dtype != value.dtype:
        derivative = derivative.to(value.dtype)
    return derivative if derivative.shape == value.shape else derivative.expand(value.shape)


def applied(function: Callable[[Tensor], Tensor], x: Tensor | None) -> Tensor | None:
    return None if x is None else function(x)


def _write_through(
    view: Callable[[Tensor], Tensor], like: Tensor, before: Tensor | None, written: Tensor | None
) -> Tensor | None:
    """The source's derivative after its view was overwritten. Derivatives are never changed in place."""
    if before is None and written is None:
        return None
    after = torch.zeros_like(like) if before is None else torch.empty_like(like).copy_(before)
    part = view(after)
    assert part.untyped_storage().data_ptr() == after.untyped_storage().data_ptr(), "a view, not a copy"
    part.copy_(torch.zeros((), dtype=like.dtype, device=like.device) if written is None else written)
    return after
