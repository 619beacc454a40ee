"""Plain replicas, and a model in one process, the trivial case of them."""

from __future__ import annotations

from torch import Tensor

from gen_dist.parallel.kind import Kind

__all__ = ["Replicas"]


class Replicas(Kind):
    """Parameters that every rank holds whole, without a wrapper: all that no other kind holds.

    Nobody averages their gradients, so `Layout.average_gradients` does.
    """

    def holds(self, tensor: Tensor) -> bool:
        return True
