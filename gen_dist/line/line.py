"""The line that the optimizer is about to move along, `phi(a) = L(theta - a d)`, as this rank sees it.

A line can be walked: the weights move in place and the model runs at each stop. Jets look at it another way (see
`by_jets.py`). Both restore weights, the state of modules and random numbers bit for bit.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from gen_dist.direction import Direction
from gen_dist.forward_state import Restart, forward_state_kept
from gen_dist.line.data import Slice
from gen_dist.parallel import Layout, local
from gen_dist.restore import contents_kept, gradients_kept, parametrizations_anew, restoring
from gen_dist.torch_private import forward_pre_hooks_of, is_compiled, is_scripted

__all__ = ["ROUNDINGS_OF_LOSS", "Line", "Walk", "noting_precision"]

# Units of rounding by which a loss is uncertain. That of its own dtype hits it directly. Inside the model many
# roundings average out: on a GPT and two conv nets under bfloat16 autocast, 0.006 to 0.25 units were measured.
ROUNDINGS_OF_LOSS = 8
ROUNDINGS_OF_MODEL = 1

# The share of a step, squared, that the rounding of half-precision weights may add. What it adds points everywhere, and
# bends the loss by the mean curvature, which is below that along a direction of descent. But it can be all of a step in
# weights that matter: with 0.013, the gains of a CNN's norms stood still, and its rate was half as large again.
LARGEST_MISS = 0.01
UNRESOLVED = 1e100  # a relative rounding above any curvature

# Models whose loss takes gradients of its own, or adds hooks to activations. Others run without gradients enabled, in
# less memory; what autograd says when it misses them tells which these are.
_taking_gradients: WeakSet[nn.Module] = WeakSet()
_NO_GRAPH = "requires?[_ ]grad|grad_fn|'NoneType' object has no attribute 'register_"

# Whether a model writes into its weights while it runs, in each of its modes; its first walk tells.
_rewriting: WeakKeyDictionary[nn.Module, dict[bool, bool]] = WeakKeyDictionary()


class Walk(NamedTuple):
    """What a rank saw on its way along a line.

    Attributes:
        losses: `phi` at each rate, shape `(micro-batches, rates)`, float64, on the loss's device.
        rounding: by how much rounding may change a loss, relative to it.
        draws_random_numbers: whether the model or the closure drew some.
        rewrites_weights: whether the model writes into its weights while it runs, as one that clips them does.
    """

    losses: Tensor
    rounding: float
    draws_random_numbers: bool
    rewrites_weights: bool


@dataclass(frozen=True)
class Line:
    """`phi(a)`, the mean loss of this rank's slice at `theta - a d`; not reduced over ranks."""

    layout: Layout
    direction: Direction
    data: Slice

    @contextlib.contextmanager
    def state_kept(self, watching: bool = False) -> Iterator[Restart]:
        """Restore what the model, the criterion or a closure changes while it runs; yields a function to do so.

        With `watching` this includes writes into the weights that the line moves.
        """
        moving = [p for group in self.direction for p in group.parameters]
        with (
            parametrizations_anew() as forget,
            forward_state_kept(self.layout.model, *self.data.programs, moving=moving, watching=watching) as restart,
        ):

            def restart_all() -> bool:
                forget()
                return restart()

            yield restart_all

    def walk(self, rates: Iterable[float]) -> Walk:
        """Measure `phi` at each rate by moving the weights in place."""
        model = self.layout.model
        if model not in _taking_gradients:
            given = {p: p.grad for p in model.parameters()}  # a loss that calls backward() may clear them
            try:
                return self._walk(rates := list(rates))
            except (RuntimeError, AttributeError) as error:
                if not re.search(_NO_GRAPH, str(error)):
                    raise
            _taking_gradients.add(model)
            for parameter, gradient in given.items():
                parameter.grad = gradient
        with gradients_kept([*model.parameters()]):  # the loss may call backward()
            return self._walk(rates, torch.enable_grad)

    def _walk(self, rates: Iterable[float], around: Callable[[], AbstractContextManager[Any]] = torch.no_grad) -> Walk:
        losses: list[Tensor] = []
        rounding, model = 0.0, self.layout.model
        rewriting = _rewriting.setdefault(model, {})
        # A model may put other memory in the place of a weight: it comes back before its contents do.
        with torch.no_grad(), self.layout.without_wrappers(), _moving(self.direction) as weights:
            with self.state_kept() as restart, noting_precision(self.layout) as model_rounding:
                for rate in rates:
                    if losses:
                        restart()
                    if not weights.move_to(rate):
                        rounding = UNRESOLVED
                    with around():
                        losses.append(torch.stack([each.loss().detach() for each in self.data.micro_batches]))
                    self.layout.reshard()
                    if model.training not in rewriting:
                        rewriting[model.training] = not weights.are_at(rate)
                rounding = max(rounding, *model_rounding, ROUNDINGS_OF_LOSS * torch.finfo(losses[0].dtype).eps)
                drawn = restart()
            seen = torch.stack([each.double() for each in losses], dim=1)
            return Walk(seen, rounding, drawn, rewriting[model.training])


class _Part(NamedTuple):
    """A weight that moves by `-a * ratio * update`, from where it starts; this rank's part of it."""

    weight: Tensor
    start: Tensor
    update: Tensor
    ratio: float


class _Moving:
    """The weights while they move along a line, set afresh at each stop: the model may have written into them."""

    def __init__(self, parts: list[_Part]) -> None:
        self.parts = parts
        self.at_start = True

    def move_to(self, rate: float) -> bool:
        """Set the weights to `theta - a d`; returns whether they arrived.

        A step below the rounding of half-precision weights takes them elsewhere.
        """
        torch.clear_autocast_cache()  # it would keep casts of the weights as they were
        if rate or not self.at_start:
            for weight, start, update, ratio in self.parts:
                torch.add(start, update, alpha=-rate * ratio, out=weight)
        self.at_start = False
        return rate == 0 or self._arrived(rate)

    def are_at(self, rate: float) -> bool:
        """Whether the weights are still, bit for bit, where they were moved to."""
        for weight, start, update, ratio in self.parts:
            meant = torch.add(start, update, alpha=-rate * ratio) if rate else start
            if not torch.allclose(weight, meant, rtol=0, atol=0, equal_nan=True):
                return False
        return True

    def _arrived(self, rate: float) -> bool:
        """Whether half-precision weights are where they should be: what rounding adds is small beside the step."""
        meant, missed = [], []
        for weight, start, update, ratio in self.parts:
            if weight.dtype in (torch.float16, torch.bfloat16):
                step = update.float() * (rate * ratio)
                meant.append(step.square().sum())
                missed.append((start.float() - weight.float() - step).square().sum())
        return not meant or bool(torch.stack(missed).sum() <= LARGEST_MISS * torch.stack(meant).sum())


@contextlib.contextmanager
def _moving(direction: Direction) -> Iterator[_Moving]:
    """Yield the weights of a line to move; they come back bit for bit afterwards."""
    moving = [(local(p), update, group.ratio) for group in direction for p, update in zip(*group[2:], strict=True)]
    with restoring(torch.clear_autocast_cache), contents_kept([weight for weight, _, _ in moving]) as before:
        yield _Moving([_Part(w, start, d, ratio) for (w, d, ratio), start in zip(moving, before, strict=True)])


@contextlib.contextmanager
def noting_precision(layout: Layout) -> Iterator[list[float]]:
    """Yield a list of the relative roundings of the model: of its weights, its policy, and autocast around or in it."""
    model: nn.Module = layout.model
    roundings = [ROUNDINGS_OF_MODEL * torch.finfo(dtype).eps for dtype in layout.compute_dtypes()]
    devices = {p.device.type for p in model.parameters()}
    modules = [model, *_inside(model)]

    def note(*_: object) -> None:
        for device in devices:
            if torch.is_autocast_enabled(device):
                roundings.append(ROUNDINGS_OF_MODEL * torch.finfo(torch.get_autocast_dtype(device)).eps)

    def remove() -> None:  # without its handle, which an interrupt can lose
        for hooks in map(forward_pre_hooks_of, modules):
            for key in [key for key, hook in hooks.items() if hook is note]:
                del hooks[key]

    with restoring(remove):
        for module in modules:
            nn.Module.register_forward_pre_hook(module, note)  # which a module of TorchScript itself refuses
        yield roundings


def _inside(module: nn.Module) -> Iterator[nn.Module]:
    """The modules inside of this one, but for those of compiled code, which would be compiled again for a hook."""
    for child in [] if is_compiled(module) or is_scripted(module) else module.children():
        if not (is_compiled(child) or is_scripted(child)):
            yield child
            yield from _inside(child)
