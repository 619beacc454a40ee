"""The ranks that train together: what they say to each other.

One process is the trivial case: without torch.distributed every reduction is the identity.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Ranks", "all_gather"]


class Ranks:
    """A process group, or this process alone where torch.distributed is not initialised.

    `process_group=None` is the default group. Methods that are called collective are called by all ranks of the group.
    Raises `ValueError` for a group without this rank, or while torch.distributed is not initialised.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        together = dist.is_available() and dist.is_initialized()
        if process_group is not None and not together:
            raise ValueError("a process_group was given, but torch.distributed is not initialised")
        self.group = process_group if process_group is not None or not together else dist.group.WORLD
        self.size = dist.get_world_size(self.group) if together else 1
        self.rank = dist.get_rank(self.group) if together else 0
        if self.rank < 0:
            raise ValueError("this rank is not in the given process_group")

    @property
    def device(self) -> torch.device:
        """Where tensors must be for the group's backend."""
        if self.size == 1:
            return torch.device("cpu")
        backends = dist.get_backend_config(self.group) if self.group is not None else ""
        if "cpu" in backends or "gloo" in backends or "mpi" in backends:
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())

    def among(self, world: Iterable[int]) -> tuple[int, ...]:
        """The ranks of this group, in ascending order, that are among these ranks of the default group."""
        return tuple(sorted(self._numbers[rank] for rank in world if rank in self._numbers))

    @functools.cached_property
    def _numbers(self) -> dict[int, int]:
        """Ranks of the default group, and what this group calls them."""
        if self.group is None:
            return {0: 0}
        return {rank: number for number, rank in enumerate(dist.get_process_group_ranks(self.group))}

    # --------------------------------------------------------------------------------------------- collective

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, on `device`. Collective."""
        values = values.to(self.device)
        self.sum_in_place(values)
        return values

    def sum_in_place(self, values: Tensor) -> None:
        """Replace a tensor, which is on a device that the backend can use, by its sum over ranks. Collective."""
        if self.size > 1:
            dist.all_reduce(values, group=self.group)

    def sum_by_name(
        self, numbers: Mapping[str, float], vectors: Mapping[str, Tensor]
    ) -> tuple[dict[str, float], dict[str, list[float]]]:
        """The sums over ranks of named numbers and named one-dimensional tensors, by one all-reduce. Collective.

        Names, lengths and their order must be the same on all ranks. The host waits once.

        >>> Ranks().sum_by_name({"count": 2}, {"products": torch.tensor([1.0, 2.0])})
        ({'count': 2.0}, {'products': [1.0, 2.0]})
        """
        device = [*(vector.device for vector in vectors.values()), self.device][0]
        host = torch.tensor([*numbers.values()], dtype=torch.float64).to(device)  # one transfer for all of them
        packed = torch.cat([host, *(vector.detach().to(device, torch.float64) for vector in vectors.values())])
        sums = iter(self.sum(packed).tolist())  # the host waits here
        return (
            {name: next(sums) for name in numbers},
            {name: list(itertools.islice(sums, len(vector))) for name, vector in vectors.items()},
        )

    def any(self, flag: Tensor) -> Tensor:
        """Whether the flag, a boolean scalar, is set on any rank. Collective."""
        return self.sum(flag.to(torch.float32)) > 0

    def texts(self, text: str) -> list[str]:
        """What every rank says, in order of rank. Collective."""
        if self.size == 1:
            return [text]
        said: list[str] = [""] * self.size
        dist.all_gather_object(said, text, group=self.group)
        return said


def all_gather(whole: Tensor, part: Tensor, group: dist.ProcessGroup, asynchronously: bool = False) -> Any:
    """Fill `whole` with the parts of all ranks of a group, in order of rank. Collective.

    If `asynchronously`, return at once, with something to `wait()` for.
    """
    gather = getattr(dist, "all_gather_single", None)  # from torch 2.13 on the old name warns
    return (gather or dist.all_gather_into_tensor)(whole, part, group=group, async_op=asynchronously)
