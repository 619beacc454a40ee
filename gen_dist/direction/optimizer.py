"""The update direction of any optimizer: `d` such that its step is `theta <- theta - lr d`."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from gen_dist import parallel as sharding
from gen_dist.restore import put_back

__all__ = ["Direction", "GenOptimizer", "as_gen_optimizer", "make_gen_optimizer"]

# The direction is the difference that a step at a trial rate makes, divided by that rate. A large power of two keeps
# all digits: the division is exact, and the subtraction loses nothing when the step dwarfs the weights.
TRIAL_RATE = 2.0**20
TRIAL_RATE_FLOAT16 = 2.0**8  # its numbers end at 65504

HELD = "held_direction"  # its key in a state dict

REFUSED = {
    "LBFGS": "searches along its direction itself",
    "Rprop": "sets a step size for each weight from signs alone, not from lr",
    "ASGD": "averages and decays with a rate of its own",
    "Adafactor": "takes the smaller of lr and 1/sqrt(step)",
}


class GroupDirection(NamedTuple):
    """The direction of one parameter group, in this rank's shards; its parameters move by `-a * ratio * update`."""

    group: int  # its index in optimizer.param_groups
    ratio: float  # the group's share of the common rate
    parameters: list[Tensor]
    updates: list[Tensor]


class Direction(list[GroupDirection]):
    """The update direction of an optimizer, group by group; parameters without a gradient are left out."""

    def items(self) -> list[tuple[Tensor, Tensor]]:
        """`(parameter, update)` of everything that moves."""
        return [pair for group in self for pair in zip(group.parameters, group.updates, strict=True)]


class GenOptimizer(Optimizer):
    """Mixin over an optimizer class: splits its step into finding a direction and moving along it.

    Made by `make_gen_optimizer` and `as_gen_optimizer`. Without a held direction it steps as its base class does.
    """

    base_class: type[Optimizer]
    _direction: Direction | None = None

    def compute_param_updates(self) -> None:
        """Run the base optimizer's step once, keep its direction `d`, and put the parameters back bit for bit.

        The optimizer's state advances here, exactly once; the current learning rate plays no part.
        """
        self._direction = measure_direction(self)

    def get_param_update(self, param: Tensor) -> Tensor:
        """The held direction of a parameter, in its shape, dtype and placement (a `DTensor` if it is one).

        Zero for a parameter that had no gradient. Raises `ValueError` when no direction is held, or when the
        parameter is not this optimizer's.
        """
        if self._direction is None:
            raise ValueError("no direction is held: call compute_param_updates() or scheduler.step(...) first")
        for parameter, update in self._direction.items():
            if parameter is param:
                return sharding.placed_like(update, param)
        if any(param is p for group in self.param_groups for p in group["params"]):
            return torch.zeros_like(param)
        raise ValueError(f"this parameter, of shape {tuple(param.shape)}, is not in the optimizer")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move along the held direction, `theta <- theta - lr d`; with none held, the base optimizer's step.

        Raises `ValueError` for a closure while a direction is held: the closure would make other gradients than
        those that were measured.
        """
        if self._direction is None:
            return _base_step(self, closure)
        if closure is not None:
            raise ValueError(
                "optimizer.step(closure) while a direction is held: run the closure before scheduler.step(...) and "
                "call optimizer.step() without it, or optimizer.reset() first"
            )
        with torch.no_grad():
            for group, _, parameters, updates in self._direction:
                _subtract([sharding.local(p) for p in parameters], updates, self.param_groups[group]["lr"])
        self._direction = None
        return None

    def skip_step(self) -> None:
        """Make the next `step()` do nothing: neither parameters nor state change."""
        self._direction = Direction()

    def reset(self) -> None:
        """Drop the held direction."""
        self._direction = None

    def keep_state(self) -> Callable[[], None]:
        """Copy the state, and the settings of the groups, some of which count steps too; returns what puts it back."""
        kept = {parameter: copy.deepcopy(state) for parameter, state in self.state.items()}
        settings = [dict(group) for group in self.param_groups]

        def put_back_state() -> None:
            self.state.clear()
            self.state.update(kept)
            _put_back_settings(self, settings)

        return put_back_state

    @property
    def direction(self) -> Direction | None:
        """The held direction."""
        return self._direction

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state; while a direction is held, with the direction as part of each parameter's state.

        After loading such a checkpoint, from between `scheduler.step()` and `optimizer.step()`, `optimizer.step()`
        comes next. `torch.distributed.checkpoint` fills in what is there: to load one with it, let this optimizer hold
        a direction beforehand, any, by `compute_param_updates()`.
        """
        packed = super().state_dict()
        if self._direction is None:
            return packed
        parameters = (p for group in self.param_groups for p in group["params"])
        positions = {id(parameter): position for position, parameter in enumerate(parameters)}
        state = dict(packed["state"])
        for parameter, update in self._direction.items():
            own = state.get(positions[id(parameter)], {})
            state[positions[id(parameter)]] = {**own, HELD: sharding.placed_like(update, parameter)}
        return {**packed, "state": state, HELD: True}  # the mark is for a direction along which nothing moves

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict()` returned, with the direction that was held then, or none."""
        super().load_state_dict(state_dict)
        held = {p: state.pop(HELD) for p, state in self.state.items() if HELD in state}
        self._direction = Direction() if held or state_dict.get(HELD) else None
        for index, (ratio, group) in enumerate(zip(rate_ratios(self), self.param_groups, strict=True)):
            moving = [p for p in group["params"] if p in held]
            if self._direction is not None and moving:
                updates = [sharding.local(held[p]) for p in moving]
                self._direction.append(GroupDirection(index, ratio, moving, updates))

    def __reduce__(self) -> Any:
        return _empty_gen_optimizer, (self.base_class,), self.__getstate__()


def make_gen_optimizer(base_optimizer_class: type[Optimizer], /, *args: Any, **kwargs: Any) -> GenOptimizer:
    """`base_optimizer_class(*args, **kwargs)`, able to tell its update direction.

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
    _refuse_by_name(base_optimizer_class)
    optimizer: GenOptimizer = _gen_class(base_optimizer_class)(*args, **kwargs)  # type: ignore[arg-type]
    _check_linearity(optimizer)
    return optimizer


def as_gen_optimizer(optimizer: Optimizer) -> GenOptimizer:
    """Turn an existing optimizer into a `GenOptimizer`, in place: same object, state, groups and hooks.

    Raises `TypeError` for an optimizer whose step is not the learning rate times a direction.
    """
    if isinstance(optimizer, GenOptimizer):
        return optimizer
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    _refuse_by_name(type(optimizer))
    _check_linearity(optimizer)
    name = type(optimizer).__name__
    try:
        optimizer.__class__ = _gen_class(type(optimizer))  # type: ignore[arg-type]
    except TypeError as error:  # a class with other than Optimizer at the root of its layout, such as ABC
        raise TypeError(
            f"{name} cannot be turned into another class in place ({error}): make it by "
            f"gen_dist.make_gen_optimizer({name}, model.parameters(), ...)"
        ) from error
    optimizer.__dict__.pop("step", None)  # another scheduler's counter, bound to the base class's step
    optimizer._patch_step_function()
    return cast(GenOptimizer, optimizer)


@cache
def _gen_class(base: Any) -> type[GenOptimizer]:
    namespace = {"base_class": base, "__doc__": base.__doc__, "__module__": base.__module__}
    return cast("type[GenOptimizer]", type(f"Gen{base.__name__}", (GenOptimizer, base), namespace))


def _empty_gen_optimizer(base: type[Optimizer]) -> GenOptimizer:
    """What pickle and copy fill with state."""
    kind: type[GenOptimizer] = _gen_class(base)  # type: ignore[arg-type]
    return kind.__new__(kind)


# -------------------------------------------------------------------------------------------- the direction


@torch.no_grad()
def measure_direction(optimizer: Optimizer) -> Direction:
    """Step once at a trial rate; return the direction, with every parameter as it was before and the state advanced."""
    ratios, groups = rate_ratios(optimizer), optimizer.param_groups
    moving = [[p for p in group["params"] if p.grad is not None] for group in groups]
    before = [[sharding.local(p).clone() for p in parameters] for parameters in moving]
    usual = [group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"] for group in groups]

    @torch.no_grad()
    def move_back() -> None:
        for group, rate, parameters, theta in zip(groups, usual, moving, before, strict=True):
            set_rate(group, rate)
            if parameters:
                torch._foreach_copy_([sharding.local(p) for p in parameters], theta)

    direction = Direction()
    with put_back(move_back):
        for group in groups:
            set_rate(group, _trial_rate(group))
        _base_step(optimizer)
        for index, (ratio, parameters, theta) in enumerate(zip(ratios, moving, before, strict=True)):
            if parameters:
                updates = torch._foreach_sub(theta, [sharding.local(p) for p in parameters])
                torch._foreach_div_(updates, _trial_rate(groups[index]))
                direction.append(GroupDirection(index, ratio, parameters, list(updates)))
    return direction


def direction_without_trace(optimizer: Optimizer) -> Direction:
    """The direction of a step with the gradients that are there, of any optimizer; nothing of it is left behind.

    Costs a copy of the state. Raises `TypeError` for an optimizer whose step is not lr times a direction.
    """
    with _on_a_copy_of_the_state(optimizer):
        if not isinstance(optimizer, GenOptimizer):
            _refuse_by_name(type(optimizer))
            _check_linearity(optimizer)
        return measure_direction(optimizer)


@contextlib.contextmanager
def _on_a_copy_of_the_state(optimizer: Optimizer) -> Iterator[None]:
    """Let the optimizer step on copies of its state and of its groups' settings, some of which count steps too."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    state, settings = optimizer.state, [dict(group) for group in optimizer.param_groups]

    def bring_back() -> None:
        optimizer.state = state
        _put_back_settings(optimizer, settings)

    devices = {p.device for group in settings for p in group["params"] if p.device.type == "cuda"}
    with torch.random.fork_rng(devices), put_back(bring_back):
        optimizer.state = defaultdict(dict, {p: copy.deepcopy(of_p) for p, of_p in state.items()})
        for group in optimizer.param_groups:
            group.update({key: copy.deepcopy(value) for key, value in group.items() if key != "params"})
        yield


def _put_back_settings(optimizer: Optimizer, settings: list[dict[str, Any]]) -> None:
    for group, before in zip(optimizer.param_groups, settings, strict=False):  # groups are only ever added
        group.clear()
        group.update(before)


def _base_step(optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
    """The step of the optimizer's own class. Its hooks are for the step that the user sees, and are left out."""
    step: Any = _base_class(optimizer).step
    while getattr(step, "hooked", False):
        step = step.__wrapped__
    return step(optimizer) if closure is None else step(optimizer, closure)


def _base_class(optimizer: Optimizer) -> Any:
    return optimizer.base_class if isinstance(optimizer, GenOptimizer) else type(optimizer)


def rate_ratios(optimizer: Optimizer) -> list[float]:
    """Each group's share of the common rate: the ratios of the learning rates that the user gave, at most 1."""
    rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    largest = max(rates, default=0.0)
    return [rate / largest if largest > 0 else 1.0 for rate in rates]


def _trial_rate(group: Mapping[str, Any]) -> float:
    has_float16 = any(p.dtype == torch.float16 for p in group["params"])
    return TRIAL_RATE_FLOAT16 if has_float16 else TRIAL_RATE


def set_rate(group: dict[str, Any], rate: Any) -> None:
    """Set a group's learning rate; one that is a tensor keeps its identity."""
    usual = group["lr"]
    if isinstance(usual, Tensor):
        usual.copy_(rate) if isinstance(rate, Tensor) else usual.fill_(rate)
    else:
        group["lr"] = rate


def _subtract(parameters: list[Tensor], updates: list[Tensor], rate: Any) -> None:
    """`theta -= rate * d`, in the precision of the parameters."""
    if isinstance(rate, Tensor):
        torch._foreach_sub_(parameters, torch._foreach_mul(updates, rate.to(parameters[0].device)))
    else:
        torch._foreach_add_(parameters, updates, alpha=-rate)


# ----------------------------------------------------------------------- which optimizers have a direction


def _refuse_by_name(kind: type[Optimizer]) -> None:
    for ancestor in kind.__mro__:
        if ancestor.__module__.startswith("torch.optim") and ancestor.__name__ in REFUSED:
            raise TypeError(
                f"{kind.__name__} {REFUSED[ancestor.__name__]}, so its step is not lr times a direction: "
                "use SGD, Adam, AdamW, RMSprop, Adagrad, NAdam, RAdam or Muon"
            )


def _check_linearity(optimizer: Optimizer) -> None:
    """Raise `TypeError` unless steps are lr times a direction and the state does not depend on lr.

    Tried once, on twelve weights of its own: along one path of weights and gradients, two very different sequences of
    rates must give the same directions.
    """
    kind = _base_class(optimizer)
    name = kind.__name__
    try:
        slow, fast = (_trial_directions(optimizer, rates) for rates in ((1.0, 2.0, 0.5, 1.0), (0.25, 128.0, 16.0, 0.5)))
    except Exception as error:
        raise TypeError(
            f"{name} could not be tried on a small problem ({type(error).__name__}: {error}), so it is not known "
            "whether its step is lr times a direction: use one of torch.optim's, or SGD with your own gradients"
        ) from error
    if not torch.allclose(slow, fast, rtol=1e-5, atol=1e-9):
        raise TypeError(
            f"{name}'s step is not lr times a direction (tried at two rates), so no rate can be chosen for it: "
            "use SGD, Adam, AdamW, RMSprop, Adagrad, NAdam, RAdam or Muon"
        )


def _trial_directions(optimizer: Optimizer, rates: tuple[float, ...]) -> Tensor:
    device = next((p.device for group in optimizer.param_groups for p in group["params"]), torch.device("cpu"))
    weights = torch.linspace(-1.0, 1.0, 12, dtype=torch.float32, device=device).view(4, 3)
    parameter = torch.nn.Parameter(weights.clone())
    trial: Any = _base_class(optimizer)([parameter], **_arguments(optimizer))
    directions = []
    for step, rate in enumerate(rates):
        gradient = torch.sin(weights * (5 + step)) + 0.1
        parameter.grad = gradient.to_sparse() if isinstance(optimizer, torch.optim.SparseAdam) else gradient
        for group in trial.param_groups:
            set_rate(group, rate * 2**14)
        with torch.no_grad():
            parameter.copy_(weights)
        trial.step()
        directions.append((weights - parameter.detach()) / (rate * 2**14))
        weights = weights - 0.05 * gradient  # the path goes downhill, as it would
    return torch.stack(directions)


def _arguments(optimizer: Optimizer) -> dict[str, Any]:
    """The defaults of an optimizer, as far as its constructor takes them."""
    signature = inspect.signature(_base_class(optimizer).__init__).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.values())
    return {
        key: value.clone() if isinstance(value, Tensor) else value
        for key, value in optimizer.defaults.items()
        if takes_any or key in signature
    }
