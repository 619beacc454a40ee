"""A trial of an optimizer: steps along held directions beside its own steps, on a small problem."""

from __future__ import annotations

import copy
import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gen_dist.direction.direction import base_step, find_direction, move_along
from gen_dist.direction.rates import set_rate
from gen_dist.restore import restoring

__all__ = ["Group", "Trial"]

# How far results may be apart, relative to their size: float64 shows small terms that do not scale with the rate,
# and the others show what an optimizer does in low precision only, such as keeping what rounding has lost.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.5}
WITHOUT_GRADIENT = 4  # the step at which one parameter has none
DEPTH = 6  # of nested containers and objects in what an optimizer keeps


class Group(NamedTuple):
    """A parameter group to try: its settings, and how many dimensions its parameters have."""

    settings: dict[str, Any]
    dimensions: tuple[int, ...]


class Trial(NamedTuple):
    """How an optimizer is made and tried: `make(groups)` is one that has taken no step."""

    make: Callable[[list[dict[str, Any]]], Optimizer]
    groups: Sequence[Group]
    device: torch.device
    sparse: bool = False

    def difference(self, dtype: torch.dtype, steps: int, complete: bool) -> str | None:
        """Tell what differs first between steps along held directions and plain steps, or None.

        Gradients and rates are given. Rates vary from step to step and between groups. One parameter has no gradient
        at one step, unless they are to be `complete`. What an optimizer raises, is raised.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        python, numpy = random.getstate(), _numpy_random()
        numpy_state = numpy.get_state() if numpy else None

        def restore() -> None:
            random.setstate(python)
            if numpy:
                numpy.set_state(numpy_state)

        with torch.random.fork_rng(devices), restoring(restore):
            held, plain = self._side(dtype), self._side(dtype)
            start = [p.detach().clone() for p in plain.parameters]
            gradients = [_gradients(plain.parameters, step) for step in range(steps)]
            if not complete:
                gradients[WITHOUT_GRADIENT][0] = None
            for step in range(steps):
                for side in (held, plain):
                    side.prepare(gradients[step], step, self.sparse)
                    _seed(self.device, step)
                    side.step(along_a_direction=side is held)
                if difference := _first_difference(held, plain, start, TOLERANCE[dtype]):
                    return f"after step {step + 1} {difference}"
            moved = [float((p.detach() - s).abs().max()) for p, s in zip(plain.parameters, start, strict=True)]
        if not all(math.isfinite(distance) for distance in moved) or not any(moved):
            return f"its own steps move the weights by {max(moved)}"  # which compares nothing
        return None

    def _side(self, dtype: torch.dtype) -> _Side:
        groups = []
        for settings, dimensions in self.groups:
            weights = [_weight(n, dtype, self.device) for n in dimensions for _ in range(2)]
            groups.append({"params": weights, **copy.deepcopy(settings)})
        return _Side(self.make(groups), [p for group in groups for p in group["params"]])


class _Side(NamedTuple):
    """One of the two optimizers, and its parameters."""

    optimizer: Optimizer
    parameters: list[nn.Parameter]

    def prepare(self, gradients: list[Tensor | None], step: int, sparse: bool) -> None:
        for p, gradient in zip(self.parameters, gradients, strict=True):
            p.grad = None if gradient is None else gradient.to_sparse() if sparse else gradient.clone()
        for index, group in enumerate(self.optimizer.param_groups):
            set_rate(group, 0.1 * 2.0 ** (step * 7 % 5 - 2) / (1 + index % 3))

    def step(self, along_a_direction: bool) -> None:
        if along_a_direction:
            move_along(find_direction(self.optimizer), self.optimizer.param_groups)
        else:
            base_step(self.optimizer)

    def kept(self) -> dict[str, Any]:
        """The tensors and numbers that the optimizer keeps, by name."""
        numbers = {id(p): str(index) for index, p in enumerate(self.parameters)}
        state = {numbers.get(id(key)) or str(key): value for key, value in self.optimizer.state.items()}
        own = {name: value for name, value in vars(self.optimizer).items() if name not in ("state", "defaults")}
        return dict(_leaves({"state": state, **own}, "", DEPTH))


def _leaves(value: Any, name: str, depth: int) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor | int | float | complex):
        yield name, value
    elif depth and not isinstance(value, str | type | nn.Module) and not callable(value):
        if isinstance(value, Mapping):
            # the rate is given, and hooks of PyTorch's keep nothing
            items = [(key, v) for key, v in value.items() if key not in ("lr", "initial_lr", "params")]
        elif isinstance(value, list | tuple):
            items = list(enumerate(value))
        else:
            items = list(getattr(value, "__dict__", {}).items())
        for key, each in items:
            yield from _leaves(each, f"{name}.{key}" if name else str(key), depth - 1)


def _first_difference(held: _Side, plain: _Side, start: list[Tensor], tolerance: float) -> str | None:
    rounding = 100 * torch.finfo(start[0].dtype).eps
    for p, q, s in zip(held.parameters, plain.parameters, start, strict=True):
        if _differs(p.detach() - s, q.detach() - s, tolerance, rounding * max(1.0, float(q.detach().abs().max()))):
            return "the weights are not those of its own step"
    mine, its = held.kept(), plain.kept()
    for name in mine.keys() | its.keys():
        if name not in mine or name not in its or _differs(mine[name], its[name], tolerance, rounding):
            return f"what it keeps as {name.split('.')[-1]!r} depends on the rate, or on the weights after the step"
    return None


def _differs(mine: Any, its: Any, tolerance: float, rounding: float) -> bool:
    if not isinstance(mine, Tensor) and not isinstance(its, Tensor):
        if mine == its:
            return False
        mine, its = torch.as_tensor(mine), torch.as_tensor(its)
    if not isinstance(mine, Tensor) or not isinstance(its, Tensor) or mine.shape != its.shape:
        return True
    if mine.dtype == its.dtype and not mine.is_sparse and torch.equal(mine, its):
        return False
    mine, its = _precise(mine), _precise(its)
    if not its.numel():
        return False
    near = (mine - its).abs() <= tolerance * its.nan_to_num(0, 0, 0).abs().max() + rounding
    return not bool((near | (mine == its) | (mine.isnan() & its.isnan())).all())


def _precise(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    return torch.view_as_real(tensor.to(torch.complex128)) if tensor.is_complex() else tensor.double()


def _weight(dimensions: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    shape = {0: (), 1: (3,), 2: (4, 3), 3: (2, 3, 2), 4: (2, 3, 2, 2)}.get(dimensions, (2,) * dimensions)
    count = math.prod(shape)
    weights = torch.linspace(-1.0, 1.2, count, dtype=torch.float64) if count > 1 else torch.ones(1, dtype=torch.float64)
    return nn.Parameter(weights.view(shape).to(device, dtype))


def _gradients(parameters: Sequence[Tensor], step: int) -> list[Tensor | None]:
    """Waves whose phases move on from step to step, of either sign."""
    count = sum(p.numel() for p in parameters)
    waves = torch.sin(torch.arange(1.0, count + 1, dtype=torch.float64) * (step + 2)) + 0.1
    pieces = waves.to(parameters[0].device, parameters[0].dtype).split([p.numel() for p in parameters])
    return [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]


def _numpy_random() -> Any:
    """NumPy's global random numbers, which some optimizers draw; None while nobody has imported it."""
    return getattr(sys.modules.get("numpy"), "random", None)


def _seed(device: torch.device, seed: int) -> None:
    random.seed(seed)
    if numpy := _numpy_random():
        numpy.seed(seed)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
