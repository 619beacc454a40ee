"""A step that a script's own optimizer makes: the difference of the weights before and after, whatever made it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gen_dist.parallel import local
from gen_dist.restore import contents_kept, restoring
from gen_dist.torch_private import foreach_copy_, foreach_sub_

__all__ = ["WeightsBefore", "any_not_zero"]


class WeightsBefore:
    """The weights before a step, this rank's parts of them, and the rate that the step will be made with."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.lr = max((float(group.get("lr", 1.0)) for group in groups), default=0.0)
        trained = [p for group in groups for p in group["params"] if p.requires_grad]
        self.parts = {p: local(p).detach().clone() for p in trained}
        self.with_gradient = {p for p in trained if p.grad is not None}

    @contextlib.contextmanager
    def in_place(self) -> Iterator[dict[Tensor, Tensor]]:
        """Put them back for the block, and yield the step that was made, by parameter. To be used once.

        After the block the weights are those after the step again, bit for bit.

        Parameters without a gradient before and after the step are no part of it.
        """
        moving = {p: part for p, part in self.parts.items() if p in self.with_gradient or p.grad is not None}
        weights, parts = [local(p) for p in moving], [*moving.values()]
        with restoring(torch.clear_autocast_cache), contents_kept(weights) as after:
            if weights:
                with torch.no_grad():
                    foreach_copy_(weights, parts)
                    foreach_sub_(parts, after)  # the copies become the step
            torch.clear_autocast_cache()  # it would keep casts of the weights after the step
            yield moving


def any_not_zero(tensors: Sequence[Tensor]) -> Tensor:
    flags = [tensor.any() for tensor in tensors] or [torch.tensor(False)]
    return torch.stack([flag.to(flags[-1].device) for flag in flags]).any()
