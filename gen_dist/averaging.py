"""Averaged weights: what replaces a decaying rate where no horizon is known."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import update_bn

from gen_dist.parallel import Layout, local, placed_like
from gen_dist.restore import contents_kept, everything_restored, restoring
from gen_dist.torch_private import foreach_copy_, foreach_lerp_

__all__ = ["AveragedWeights", "Averaging"]


class Averaging(NamedTuple):
    """How weights are averaged: the window grows, and the weights of step `t` count about as `t^power`.

    `momentum` is the share of each move of the average that the weights make as well. The averages of plain training
    (0) lag behind. With momentum, they and the weights continue in the direction of the whole run. This is the
    interpolation of Schedule-Free (Defazio et al. 2024, arXiv 2405.15682) for any optimizer: theirs is `momentum` 0.9
    and `power` 9 with an optimizer without momentum, and their learning rate is `1 / (1 - momentum)` times the one
    here.
    """

    power: float = 12.0
    momentum: float = 0.3


class AveragedWeights:
    """The average `a` of an optimizer's weights `theta` over a growing window, taken after its steps `t = 1, 2, ...`.

    `k = (power + 1) / (t + power)`; `m = k (theta - a)`; `a += m`; `theta += momentum m`.

    It hooks on the optimizer: each step that `expect_step` announced is taken into the average. Other steps, such as
    the one that fills an optimizer's state for a checkpoint, are not. Only this rank's shards are averaged, in place,
    in float32 at least; nothing is communicated.
    """

    def __init__(self, layout: Layout, optimizer: Optimizer, averaging: Averaging) -> None:
        if not (averaging.power >= 0 and 0 <= averaging.momentum <= 1):
            raise ValueError(f"need power >= 0 and momentum from 0 to 1, got {averaging}")
        self.layout = layout
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.averaging = averaging
        self.count = 0
        self.average: list[Tensor] = []
        self.expected = False  # whether the optimizer's next step counts
        optimizer.register_step_post_hook(_weakly(self._after_step))

    def expect_step(self, expected: bool = True) -> None:
        """Say whether the optimizer's next step is one of the training, to be averaged."""
        self.expected = expected

    def _after_step(self) -> None:
        if self.expected:
            self.expected = False
            self.update()

    @torch.no_grad()
    def update(self) -> None:
        """Take the present weights into the average, and move them along with it."""
        self.layout.reshard()
        weights = [local(p) for p in self.parameters]
        self.count += 1
        if self.count == 1:
            self.average = [_precise(w.clone()) for w in weights]
            return
        power, momentum = self.averaging
        share = (power + 1) / (self.count + power)
        foreach_lerp_(self.average, [_precise(w) for w in weights], share)
        if momentum:  # theta - a is now 1 - share of what it was
            averages = [a.to(w.dtype) for a, w in zip(self.average, weights, strict=True)]
            foreach_lerp_(weights, averages, -momentum * share / (1 - share))

    @contextlib.contextmanager
    def in_place(self, batches: Iterable[Any] = ()) -> Iterator[None]:
        """Put the average in the model; afterwards, also after an error or an interrupt, restore it bit for bit.

        Batches of inputs, if there are any, recompute the running statistics of batch norms.
        """
        if not self.count:
            raise ValueError("there are no averaged weights yet: they begin after the first optimizer.step()")
        self.layout.reshard()
        weights = [local(p).detach() for p in self.parameters]
        buffers = [local(b) for b in self.layout.model.buffers()]
        # the model may hold gathered copies of the average at the end
        with everything_restored(), restoring(self.layout.reshard), contents_kept(weights), contents_kept(buffers):
            with torch.no_grad():
                foreach_copy_(weights, self.average)
            batches = list(batches)
            if batches:
                _recompute_statistics(batches, self.layout.model)
            yield

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps averaged and the averages, placed as the parameters are; zeros before a step.

        The structure is always the same, since `torch.distributed.checkpoint` loads in place. Shards without a
        placement stand under their rank: they load on as many ranks only.
        """
        averages = self.average or [_precise(torch.zeros_like(local(p))) for p in self.parameters]
        pairs = zip(averages, self.parameters, strict=True)
        placed = [placed_like(a.clone(), p).detach() for a, p in pairs]
        return {"count": self.count, "average": placed if self.layout.shards_have_placement else {_here(): placed}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` returned."""
        self.count = int(state_dict["count"])
        placed = state_dict["average"] if self.layout.shards_have_placement else state_dict["average"][_here()]
        self.average = [local(a).clone() for a in placed] if self.count else []


def _weakly(method: Callable[[], None]) -> Callable[..., None]:
    """A hook that does not keep its owner alive: a DDP model in a cycle would outlive its process group."""
    reference = weakref.WeakMethod(method)

    def hook(*_: Any) -> None:
        if (alive := reference()) is not None:
            alive()

    return hook


def _precise(weight: Tensor) -> Tensor:
    """In half precision the small moves of a long run's average would be rounded away."""
    return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight


def _here() -> str:
    return f"rank {dist.get_rank()} of {dist.get_world_size()}"


def _recompute_statistics(batches: list[Any], model: nn.Module) -> None:
    device = next((p.device for p in model.parameters()), None)
    update_bn(batches, model, device=device)
