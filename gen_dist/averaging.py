"""Averaged weights: what takes the place of a decaying rate where no horizon is known."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from gen_dist import parallel as sharding
from gen_dist.parallel import Layout

__all__ = ["AveragedWeights", "Averaging"]


class Averaging(NamedTuple):
    """How weights are averaged: the window grows, and the weights of step `t` count about as `t^power`.

    `momentum` is the share of each move of the average that the weights make as well. The averages of plain training
    (0) lag behind; with it, they and the weights go on in the direction in which the whole run has been going. This is
    the interpolation of Schedule-Free (Defazio et al. 2024, arXiv 2405.15682) for any optimizer: theirs is `momentum`
    0.9 and `power` 9 with an optimizer that has no momentum of its own, their learning rate being
    `1 / (1 - momentum)` times the one here.
    """

    power: float = 12.0
    momentum: float = 0.3


class AveragedWeights:
    """The average `a` of the weights `theta` over a growing window, taken after each step `t = 1, 2, ...`.

    `k = (power + 1) / (t + power)`; `m = k (theta - a)`; `a += m`; `theta += momentum m`.

    This rank's shards alone are averaged, in place, in float32 at least; nothing is communicated.
    """

    def __init__(self, layout: Layout, parameters: Sequence[Tensor], averaging: Averaging) -> None:
        if not (averaging.power >= 0 and 0 <= averaging.momentum <= 1):
            raise ValueError(f"need power >= 0 and momentum from 0 to 1, got {averaging}")
        self.layout = layout
        self.parameters = list(parameters)
        self.averaging = averaging
        self.count = 0
        self.average: list[Tensor] = []

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights as they are now into the average, and move them along with it."""
        self.layout.reshard()
        weights = [sharding.local(p) for p in self.parameters]
        self.count += 1
        if self.count == 1:
            self.average = [_precise(w.clone()) for w in weights]
            return
        power, momentum = self.averaging
        share = (power + 1) / (self.count + power)
        torch._foreach_lerp_(self.average, [_precise(w) for w in weights], share)
        if momentum:  # theta - a is now 1 - share of what it was
            averages = [a.to(w.dtype) for a, w in zip(self.average, weights, strict=True)]
            torch._foreach_lerp_(weights, averages, -momentum * share / (1 - share))

    @contextlib.contextmanager
    def in_place(self, batches: Iterable[Any] = ()) -> Iterator[None]:
        """Put the average in the model, and afterwards, also after an error, the weights back, bit for bit.

        The running statistics of batch norms are computed anew from `batches` of inputs, if there are any.
        """
        if not self.count:
            raise ValueError("there are no averaged weights yet: they begin after the first optimizer.step()")
        buffers = [(b, b.clone()) for b in self.layout.model.buffers()]
        kept = [sharding.local(p).detach().clone() for p in self.parameters]
        try:
            self._put_in(self.average)
            batches = list(batches)
            if batches:
                _recompute_statistics(batches, self.layout.model)
            yield
        finally:
            self._put_in(kept)
            with torch.no_grad():
                for buffer, content in buffers:
                    buffer.copy_(content)

    @torch.no_grad()
    def _put_in(self, weights: list[Tensor]) -> None:
        self.layout.reshard()
        torch._foreach_copy_([sharding.local(p) for p in self.parameters], weights)

    def state_dict(self) -> dict[str, Any]:
        """The number of steps averaged and the averages, placed as the parameters are; zeros before the first step.

        The structure is always the same, as `torch.distributed.checkpoint` needs it: it loads in place. What FSDP1
        averages has no placement, and stands under its rank: it loads on as many ranks only.
        """
        averages = self.average or [_precise(torch.zeros_like(sharding.local(p))) for p in self.parameters]
        pairs = zip(averages, self.parameters, strict=True)
        placed = [sharding.placed_like(a.clone(), p).detach() for a, p in pairs]
        return {"count": self.count, "average": placed if self.layout.shards_have_placement else {_here(): placed}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = int(state_dict["count"])
        placed = state_dict["average"]
        placed = placed if self.layout.shards_have_placement else placed[_here()]
        self.average = [sharding.local(a).clone() for a in placed] if self.count else []


def _precise(weight: Tensor) -> Tensor:
    """In half precision the small moves of a long run's average would be rounded away."""
    return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight


def _here() -> str:
    return f"rank {dist.get_rank()} of {dist.get_world_size()}"


def _recompute_statistics(batches: list[Any], model: nn.Module) -> None:
    device = next((p.device for p in model.parameters()), None)
    update_bn(batches, model, device=device)
