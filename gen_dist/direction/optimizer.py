"""`GenOptimizer`: an optimizer whose step is split into finding a direction and moving along it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeAlias, cast
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from gen_dist.direction.direction import (
    Direction,
    GroupDirection,
    base_step,
    find_direction,
    move_along,
    on_a_copy_of_the_state,
)
from gen_dist.direction.linearity import check_linearity, refuse_by_name
from gen_dist.direction.rates import rate_ratios
from gen_dist.parallel import local, placed_like
from gen_dist.torch_private import patch_step, supports_found_inf, version_of

__all__ = ["GenOptimizer", "as_gen_optimizer", "direction_without_trace", "make_gen_optimizer"]

HELD = "held_direction"  # its key in a state dict
FEW = 4  # parameters of each group whose gradients are compared

Versions: TypeAlias = Sequence[tuple[ReferenceType[Tensor], int]]
"""Gradients, and how often each was written to."""


class GenOptimizer(Optimizer):
    """Mixin over an optimizer class: splits its step into finding a direction and moving along it.

    `make_gen_optimizer` and `as_gen_optimizer` make one. Without a held direction it steps as its base class does.
    """

    base_class: type[Optimizer]
    steps = 0  # how often `step()` was called
    _direction: Direction | None = None
    _used: Versions = ()  # gradients that a step has used
    _noted: Versions = ()  # gradients when it was last asked whether they grew
    before_zero_grad: Callable[[], None] | None = None  # called with the gradients still there
    _not_finite: Tensor | None = None  # 1 where the next step must do nothing, on the device
    _checked = False  # whether its groups have been tried, so that one that comes later is tried, too

    def compute_param_updates(self) -> None:
        """Run the base optimizer's step once, keep its direction `d`, and restore the parameters bit for bit.

        The optimizer's state advances here, exactly once. The direction does not depend on the current learning rate.
        """
        self._direction = find_direction(self)

    def get_param_update(self, param: Tensor) -> Tensor:
        """Return the held direction of a parameter, in its shape, dtype and placement (a `DTensor` if it is one).

        It is zero for a parameter that had no gradient. Raises `ValueError` when no direction is held, or when the
        parameter is not in this optimizer.
        """
        if self._direction is None:
            raise ValueError("no direction is held: call compute_param_updates() or scheduler.step(...) first")
        for parameter, update in self._direction.items():
            if parameter is param:
                return placed_like(update, param)
        if any(param is p for group in self.param_groups for p in group["params"]):
            return torch.zeros_like(param)
        raise ValueError(f"this parameter, of shape {tuple(param.shape)}, is not in the optimizer")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move along the held direction, `theta <- theta - lr d`; with none held, run the base optimizer's step.

        Raises `ValueError` for a closure that makes gradients while a direction is held: other ones than those that
        were measured.
        """
        if self._direction is None:
            result = self._base_step(closure)
            self._note_step()
            return result
        if closure is not None and _makes_gradients(closure, self):
            raise ValueError(
                "optimizer.step(closure) while a direction is held: run the closure before scheduler.step(...) and "
                "call optimizer.step() without it, or optimizer.reset() first"
            )
        move_along(self._direction, self.param_groups)
        self._direction = None
        self._note_step()
        return None

    def _base_step(self, closure: Callable[[], Any] | None) -> Any:
        if self._not_finite is None:
            return base_step(self, closure)
        given = self.__dict__.get("found_inf")  # by a GradScaler
        self.found_inf = self._not_finite if given is None else torch.maximum(self._not_finite, given)
        try:
            return base_step(self, closure)
        finally:
            del self.found_inf
            if given is not None:
                self.found_inf = given
            self._not_finite = None

    def _note_step(self) -> None:
        self.steps += 1
        self._used = self._noted = self._versions()

    def _versions(self) -> Versions:
        """Those of a few parameters, whose gradients stand for all."""
        parameters = [p for group in self.param_groups for p in group["params"][:FEW]]
        return [(ref(p.grad), version_of(p.grad)) for p in parameters if p.grad is not None]

    def has_used_gradients(self) -> bool:
        """Whether the present gradients are those of the last step, untouched since."""
        present = self._versions()
        return bool(present) and len(present) == len(self._used) and not _are_new(present, self._used)

    def gradients_grew(self) -> bool:
        """Whether a backward pass has added to the gradients since this was last asked, a step, or `zero_grad()`."""
        before, self._noted = self._noted, self._versions()
        return _are_new(self._noted, before)

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Clear the gradients, as the base class does."""
        if self.before_zero_grad is not None:
            self.before_zero_grad()
        super().zero_grad(*args, **kwargs)
        self._noted = self._versions()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as the base class does. Raises `TypeError` if with its settings there is no direction."""
        super().add_param_group(param_group)
        if self._checked:
            try:
                check_linearity(self.base_class, self)
            except TypeError:
                self.param_groups.pop()
                raise

    def skip_step(self) -> None:
        """Make the next `step()` do nothing: neither parameters nor state change."""
        self._direction = Direction()

    @property
    def skips_by_tensor(self) -> bool:
        """Whether `skip_step_where` works, as it does in fused kernels.

        SGD with momentum is left out: where a momentum buffer begins in a skipped step, the kernel never sets it.
        """
        fused = supports_found_inf(self) and all(group.get("fused") for group in self.param_groups)
        return fused and not any(group.get("momentum") for group in self.param_groups)

    def skip_step_where(self, flag: Tensor | None) -> None:
        """Make the next `step()` do nothing if the flag, a scalar of float32, is 1; the host does not wait for it.

        It concerns a step without a held direction. With None, the next step is an ordinary one.
        """
        self._not_finite = flag

    def reset(self) -> None:
        """Drop the held direction."""
        self._direction = None

    @property
    def direction(self) -> Direction | None:
        """The held direction."""
        return self._direction

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state; a held direction is saved as part of each parameter's state.

        After loading such a checkpoint, made between `scheduler.step()` and `optimizer.step()`, call
        `optimizer.step()` next. `torch.distributed.checkpoint` loads into the entries that exist: let this optimizer
        hold any direction beforehand, by `compute_param_updates()`.
        """
        packed = super().state_dict()
        if self._direction is None:
            return packed
        parameters = (p for group in self.param_groups for p in group["params"])
        positions = {id(parameter): position for position, parameter in enumerate(parameters)}
        state = dict(packed["state"])
        for parameter, update in self._direction.items():
            own = state.get(positions[id(parameter)], {})
            state[positions[id(parameter)]] = {**own, HELD: placed_like(update, parameter)}
        return {**packed, "state": state, HELD: True}  # the mark is for a direction along which nothing moves

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` returned, with the direction that was held then, or none."""
        super().load_state_dict(state_dict)
        held = {p: state.pop(HELD) for p, state in self.state.items() if HELD in state}
        self._direction = Direction() if held or state_dict.get(HELD) else None
        for index, (ratio, group) in enumerate(zip(rate_ratios(self), self.param_groups, strict=True)):
            moving = [p for p in group["params"] if p in held]
            if self._direction is not None and moving:
                updates = [local(held[p]) for p in moving]
                self._direction.append(GroupDirection(index, ratio, moving, updates))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_direction": self._direction, "_checked": self._checked}

    def __reduce__(self) -> Any:
        return _empty_gen_optimizer, (self.base_class,), self.__getstate__()


def make_gen_optimizer(base_optimizer_class: type[Optimizer], /, *args: Any, **kwargs: Any) -> GenOptimizer:
    """Construct `base_optimizer_class(*args, **kwargs)` as a `GenOptimizer`, which can tell its update direction.

    The result is an instance of both `GenOptimizer` and the base class. Raises `TypeError` for an optimizer whose
    step is not the learning rate times a direction.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> optimizer = make_gen_optimizer(torch.optim.SGD, [weight], lr=0.5)
    >>> weight.grad = torch.tensor([1.0, -1.0])
    >>> optimizer.compute_param_updates()
    >>> optimizer.get_param_update(weight)
    tensor([ 1., -1.])
    """
    if not (isinstance(base_optimizer_class, type) and issubclass(base_optimizer_class, Optimizer)):
        raise TypeError(f"expected an optimizer class such as torch.optim.AdamW, got {base_optimizer_class!r}")
    refuse_by_name(base_optimizer_class)
    optimizer: GenOptimizer = _gen_class(base_optimizer_class)(*args, **kwargs)  # type: ignore[arg-type]
    check_linearity(base_optimizer_class, optimizer)
    optimizer._checked = True
    return optimizer


def as_gen_optimizer(optimizer: Optimizer) -> GenOptimizer:
    """Convert an existing optimizer into a `GenOptimizer` in place: same object, state, groups and hooks.

    Raises `TypeError` for an optimizer whose step is not the learning rate times a direction.
    """
    if isinstance(optimizer, GenOptimizer):
        return optimizer
    _check_is_optimizer(optimizer)
    _check_has_direction(optimizer)
    name = type(optimizer).__name__
    try:
        optimizer.__class__ = _gen_class(type(optimizer))  # type: ignore[arg-type]
    except TypeError as error:  # a class with other than Optimizer at the root of its layout, such as ABC
        raise TypeError(
            f"{name} cannot be converted into another class in place ({error}): make it by "
            f"gen_dist.make_gen_optimizer({name}, model.parameters(), ...)"
        ) from error
    optimizer.__dict__.pop("step", None)  # another scheduler's counter, bound to the base class's step
    patch_step(optimizer)
    converted = cast(GenOptimizer, optimizer)
    converted._checked = True
    return converted


def direction_without_trace(optimizer: Optimizer) -> Direction:
    """The direction of a step with the present gradients, of any optimizer, which does not change.

    Costs a copy of the optimizer's state. Raises `TypeError` for an optimizer whose step is not lr times a direction.
    """
    _check_is_optimizer(optimizer)
    with on_a_copy_of_the_state(optimizer):
        if not isinstance(optimizer, GenOptimizer):
            _check_has_direction(optimizer)
        return find_direction(optimizer)


def _are_new(present: Versions, before: Versions) -> bool:
    """Whether a gradient is not among those before, or was written to since."""
    known = {id(gradient()): version for gradient, version in before}  # a dead one is None, which no gradient is
    return any(known.get(id(gradient())) != version for gradient, version in present)


def _makes_gradients(closure: Callable[[], Any], optimizer: Optimizer) -> bool:
    """Call it, and tell whether it did. Some trainers pass one that does nothing."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    before = [(p.grad, None if p.grad is None else version_of(p.grad)) for p in parameters]
    with torch.enable_grad():
        closure()
    after = [(p.grad, None if p.grad is None else version_of(p.grad)) for p in parameters]
    return any(a is not b or v != w for (a, v), (b, w) in zip(before, after, strict=True))


def _check_is_optimizer(optimizer: Any) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}")


def _check_has_direction(optimizer: Optimizer) -> None:
    refuse_by_name(type(optimizer))
    check_linearity(type(optimizer), optimizer)


@cache
def _gen_class(base: Any) -> type[GenOptimizer]:
    namespace = {"base_class": base, "__doc__": base.__doc__, "__module__": base.__module__}
    return cast("type[GenOptimizer]", type(f"Gen{base.__name__}", (GenOptimizer, base), namespace))


def _empty_gen_optimizer(base: type[Optimizer]) -> GenOptimizer:
    """What pickle and copy fill with state."""
    kind: type[GenOptimizer] = _gen_class(base)  # type: ignore[arg-type]
    return kind.__new__(kind)
