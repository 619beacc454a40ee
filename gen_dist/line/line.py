"""The line that the optimizer is about to move along, `phi(a) = L(theta - a d)`, as this rank sees it.

Two ways to look at it: by moving the weights in place and running the model, or by carrying jets through one run.
Either leaves everything as it was, bit for bit: weights, buffers, random state.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from gen_dist import parallel as sharding
from gen_dist.direction.optimizer import Direction
from gen_dist.jets.jet import Jet, derivatives, velocity_only
from gen_dist.jets.mode import JetMode
from gen_dist.line.data import Batch
from gen_dist.parallel import Layout
from gen_dist.restore import put_back

__all__ = ["Line", "undisturbed"]

# Units of rounding by which a loss is uncertain. That of its own dtype hits it directly. Inside the model many
# roundings average out: on a GPT and two conv nets under bfloat16 autocast, 0.006 to 0.25 units were measured.
ROUNDINGS_OF_LOSS = 8
ROUNDINGS_OF_MODEL = 1

# The share of a step, squared, that the rounding of half-precision weights may add. What it adds points everywhere, and
# bends the loss by the mean curvature, which is below that along a direction of descent.
LARGEST_MISS = 0.05
UNRESOLVED = 1e100  # a noise above any curvature

Restart: TypeAlias = Callable[[], bool]
"""Puts buffers and random state back; tells whether random numbers were drawn."""


class Line:
    """`phi(a)`, the mean of the batches' losses at `theta - a d`.

    All results are float64 tensors on the loss's device, one row for each batch, not reduced over ranks.
    """

    def __init__(self, layout: Layout, direction: Direction, batches: Sequence[Batch]) -> None:
        self.layout = layout
        self.model = layout.model
        self.direction = direction
        self.batches = batches
        self.draws_random_numbers = False  # whether the last evaluation did
        self.noise = 0.0  # of the loss, relative: what rounding may change; known after `losses`

    def losses(self, rates: Iterable[float]) -> Tensor:
        """`phi` at each rate, by moving the weights in place; shape `(batches, rates)`."""
        with torch.no_grad(), self.layout.without_wrappers(), undisturbed(self.model) as restart:
            with _moved(self.direction) as move_to, self._noting_precision():
                values = []
                for rate in rates:
                    if not move_to(rate):
                        self.noise = UNRESOLVED
                    restart()
                    values.append(self._values(batch.loss() for batch in self.batches))
                    self.layout.reshard()
                self.draws_random_numbers = restart()
            return torch.stack(values, dim=1)

    def jet(self) -> Tensor:
        """`(phi, phi', phi'')` at 0, exact up to rounding, from one run without a graph; shape `(batches, 3)`."""
        with self._carrying_jets():
            return torch.stack([_coefficients(batch.loss()) for batch in self.batches])

    def gauss_newton(self) -> Tensor:
        """As `jet`, with the model taken to first order: `phi'' = (J d)' H (J d)`, `H` the criterion's Hessian.

        Raises `ValueError` for closures, where model and criterion cannot be told apart.
        """
        with self._carrying_jets():
            results = []
            for batch in self.batches:
                with velocity_only():
                    output = batch.output()
                output = tree_map_only(Jet, lambda jet: Jet(jet.value, jet.velocity), output)
                results.append(_coefficients(batch.loss_of(output)))
            return torch.stack(results)

    @contextlib.contextmanager
    def _carrying_jets(self) -> Iterator[None]:
        # The line is theta - a d: the signs are turned at the end, so that no negated copy of d is needed.
        velocities = {
            p: d if group.ratio == 1 else group.ratio * d
            for group in self.direction
            for p, d in zip(group.parameters, group.updates, strict=True)
        }
        with (
            torch.no_grad(),
            _uncompiled(),
            self.layout.without_wrappers(),
            undisturbed(self.model),
            self.layout.moving_weights(velocities, Jet) as table,
        ):
            # Buffers too: what the model writes into them may move, and come back into the loss.
            table.update((id(b), Jet(b)) for b in self.model.buffers() if b.is_floating_point())
            mode = JetMode(table)
            try:
                with put_back(mode.leave), mode:
                    yield
            finally:
                self.layout.reshard()

    def _values(self, losses: Iterable[Tensor]) -> Tensor:
        values = [loss.detach() for loss in losses]
        self.noise = max(self.noise, ROUNDINGS_OF_LOSS * torch.finfo(values[0].dtype).eps)
        return torch.stack([value.double() for value in values])

    @contextlib.contextmanager
    def _noting_precision(self) -> Iterator[None]:
        """Find the precision that the model computes in, by its weights, its policy, or an autocast around it."""
        coarsest = max((torch.finfo(dtype).eps for dtype in self.layout.compute_dtypes()), default=0.0)
        self.noise = ROUNDINGS_OF_MODEL * coarsest

        kinds = {p.device.type for p in self.model.parameters()}
        hooks = self.model._forward_pre_hooks

        def note(*_: Any) -> None:
            for kind in kinds:
                if torch.is_autocast_enabled(kind):
                    eps = torch.finfo(torch.get_autocast_dtype(kind)).eps
                    self.noise = max(self.noise, ROUNDINGS_OF_MODEL * eps)

        def remove() -> None:  # by itself: an interrupt can come before its handle is there
            for key in [key for key, hook in hooks.items() if hook is note]:
                del hooks[key]

        with put_back(remove):
            self.model.register_forward_pre_hook(note)
            yield


def _coefficients(loss: Tensor) -> Tensor:
    """`(phi, phi', phi'')` from the jet of a loss along `theta + a d`: `phi` goes the other way."""
    value, velocity, acceleration = derivatives(loss)
    zero = torch.zeros_like(value)
    slope = zero if velocity is None else -velocity
    return torch.stack([value, slope, zero if acceleration is None else acceleration]).double()


@contextlib.contextmanager
def _moved(direction: Direction) -> Iterator[Callable[[float], bool]]:
    """Yield a function that puts the weights at `theta - a d`; they are back, bit for bit, afterwards.

    It tells whether they could go there: a step below the rounding of half-precision weights takes them elsewhere.
    """
    groups = [([sharding.local(p) for p in g.parameters], g.updates, g.ratio) for g in direction if g.parameters]
    before = [[shard.clone() for shard in shards] for shards, _, _ in groups]
    at = 0.0

    def move_to(rate: float) -> bool:
        nonlocal at
        torch.clear_autocast_cache()  # it would keep casts of the weights as they were
        if rate != at:
            for shards, updates, ratio in groups:
                torch._foreach_add_(shards, updates, alpha=(at - rate) * ratio)
        at = rate
        return rate == 0 or _arrived(groups, before, rate)

    def move_back() -> None:
        with torch.no_grad():
            for (shards, _, _), theta in zip(groups, before, strict=True):
                torch._foreach_copy_(shards, theta)
        torch.clear_autocast_cache()

    with put_back(move_back):
        yield move_to


def _arrived(groups: list[tuple[list[Tensor], list[Tensor], float]], before: list[list[Tensor]], rate: float) -> bool:
    """Whether half-precision weights are where they should be: what rounding adds to the step is small beside it."""
    meant, missed = [], []
    for (shards, updates, ratio), starts in zip(groups, before, strict=True):
        for shard, update, start in zip(shards, updates, starts, strict=True):
            if shard.dtype in (torch.float16, torch.bfloat16):
                step = update.float() * (rate * ratio)
                meant.append(step.square().sum())
                missed.append((start.float() - shard.float() - step).square().sum())
    return not meant or bool(torch.stack(missed).sum() <= LARGEST_MISS * torch.stack(meant).sum())


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[Restart]:
    """Put buffers and random state back at the end; yields a function that does so in between."""
    names = [(module, name) for module in model.modules() for name in module._buffers]
    buffers = [module._buffers[name] for module, name in names]
    present = [sharding.local(b) for b in buffers if b is not None]
    contents = [b.clone() for b in present]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    random = torch.get_rng_state(), [(d, torch.cuda.get_rng_state(d)) for d in devices]

    def restart() -> bool:
        drawn = not torch.equal(torch.get_rng_state(), random[0]) or any(
            not torch.equal(torch.cuda.get_rng_state(device), state) for device, state in random[1]
        )
        torch.set_rng_state(random[0])
        for device, state in random[1]:
            torch.cuda.set_rng_state(state, device)
        for (module, name), buffer in zip(names, buffers, strict=True):
            module._buffers[name] = buffer
        if present:
            with torch.no_grad():
                torch._foreach_copy_(present, contents)
        return drawn

    with put_back(restart):
        yield restart


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """Run compiled modules as they are written; jets are not for the compiler."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and its import takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
