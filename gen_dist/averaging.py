"""Averaged weights: what takes the place of a decaying rate where no horizon is known."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from gen_dist import sharding
from gen_dist.sharding import Layout

__all__ = ["AveragedWeights"]


class AveragedWeights:
    """The average of the weights over a growing window: that of step `t` counts about as `t^power`.

    `a += (power + 1) / (t + power) (theta - a)`. This rank's shards alone are averaged, in place; nothing is
    communicated.
    """

    def __init__(self, layout: Layout, parameters: Sequence[Tensor], power: float = 8) -> None:
        self.layout = layout
        self.parameters = list(parameters)
        self.power = power
        self.count = 0
        self.average: list[Tensor] = []

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights as they are now into the average."""
        self.layout.reshard()
        weights = [sharding.local(p) for p in self.parameters]
        self.count += 1
        if self.count == 1:
            self.average = [w.clone() for w in weights]
        else:
            torch._foreach_lerp_(self.average, weights, (self.power + 1) / (self.count + self.power))

    @contextlib.contextmanager
    def in_place(self, batches: Iterable[Any] = ()) -> Iterator[None]:
        """Put the average in the model, and afterwards, also after an error, the weights back, bit for bit.

        The running statistics of batch norms are computed anew from `batches` of inputs, if there are any.
        """
        if not self.count:
            raise ValueError("there are no averaged weights yet: they begin after the first optimizer.step()")
        buffers = [(b, b.clone()) for b in self.layout.model.buffers()]
        self._exchange()
        try:
            batches = list(batches)
            if batches:
                _recompute_statistics(batches, self.layout.model)
            yield
        finally:
            self._exchange()
            with torch.no_grad():
                for buffer, content in buffers:
                    buffer.copy_(content)

    @torch.no_grad()
    def _exchange(self) -> None:
        self.layout.reshard()
        for parameter, average in zip(self.parameters, self.average, strict=True):
            weight = sharding.local(parameter)
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """The number of steps averaged and the averages, placed as the parameters are; zeros before the first step.

        The structure is always the same, as `torch.distributed.checkpoint` needs it: it loads in place. What FSDP1
        averages has no placement, and stands under its rank: it loads on as many ranks only.
        """
        averages = self.average if self.count else [torch.zeros_like(sharding.local(p)) for p in self.parameters]
        pairs = zip(averages, self.parameters, strict=True)
        placed = [sharding.placed_like(a.clone(), p).detach() for a, p in pairs]
        return {"count": self.count, "average": {_here(): placed} if self.layout.fsdp1 else placed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = int(state_dict["count"])
        placed = state_dict["average"][_here()] if self.layout.fsdp1 else state_dict["average"]
        self.average = [sharding.local(a).clone() for a in placed] if self.count else []


def _here() -> str:
    return f"rank {dist.get_rank()} of {dist.get_world_size()}"


def _recompute_statistics(batches: list[Any], model: nn.Module) -> None:
    device = next((p.device for p in model.parameters()), None)
    update_bn(batches, model, device=device)
