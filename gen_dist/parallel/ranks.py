"""The ranks that train together: one small reduction, averaged gradients, one outcome for all.

One process is the trivial case: without torch.distributed every reduction is the identity.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Ranks", "dense"]

BUCKET_ELEMENTS = 6_553_600  # 25 MiB of float32, the size that DDP found to be good


class Ranks:
    """A process group, or this process alone where torch.distributed is not initialised.

    `process_group=None` is the default group. Every method is collective: all ranks of the group call it.
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

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, on `device`."""
        values = values.to(self.device)
        if self.size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def sum_by_name(
        self, numbers: Mapping[str, float], vectors: Mapping[str, Tensor]
    ) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Sum named numbers and named one-dimensional tensors over the ranks, by one all-reduce. Collective.

        Names, lengths and their order must be the same on all ranks. The host waits once.

        >>> Ranks().sum_by_name({"count": 2}, {"products": torch.tensor([1.0, 2.0])})
        ({'count': 2.0}, {'products': [1.0, 2.0]})
        """
        device = next((vector.device for vector in vectors.values()), self.device)
        host = torch.tensor([*numbers.values()], dtype=torch.float64).to(device)
        packed = torch.cat([host, *(vector.detach().to(device, torch.float64) for vector in vectors.values())])
        sums = iter(self.sum(packed).tolist())
        return (
            {name: next(sums) for name in numbers},
            {name: list(itertools.islice(sums, len(vector))) for name, vector in vectors.items()},
        )

    def any(self, flag: Tensor) -> Tensor:
        """Whether the flag, a boolean scalar, is set on any rank."""
        return self.sum(flag.to(torch.float32)) > 0

    def texts(self, text: str) -> list[str]:
        """What every rank has to say, in order of rank."""
        if self.size == 1:
            return [text]
        said: list[str] = [""] * self.size
        dist.all_gather_object(said, text, group=self.group)
        return said

    def average_gradients(self, parameters: Sequence[Tensor], weight: float = 1.0) -> None:
        """Replace every gradient by its mean over ranks, weighted by `weight`, in a few large reductions.

        A parameter that has a gradient on some ranks only counts as zero on the others, and has one on all
        afterwards. Each bucket carries its own flags and the weight, so that nothing else is communicated.
        Half-precision gradients are averaged in float32.
        """
        if self.size == 1:
            return
        for bucket in _buckets(parameters):
            _average(bucket, weight, self.group)


def _buckets(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters of one dtype and device, in order, as many as fit a bucket."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for alike in kinds.values():
        bucket: list[Tensor] = []
        elements = 0
        for parameter in alike:
            if bucket and elements + parameter.numel() > BUCKET_ELEMENTS:
                yield bucket
                bucket, elements = [], 0
            bucket.append(parameter)
            elements += parameter.numel()
        if bucket:
            yield bucket


def _average(parameters: list[Tensor], weight: float, group: dist.ProcessGroup | None) -> None:
    dtype = parameters[0].dtype
    dtype = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    device = parameters[0].device
    elements = sum(p.numel() for p in parameters)
    flat = torch.zeros(elements + len(parameters) + 1, dtype=dtype, device=device)
    places = flat[:elements].split([p.numel() for p in parameters])
    here = [p.grad is not None for p in parameters]
    if weight != 0:  # an empty slice may well have a NaN for its mean
        filled = [place for place, present in zip(places, here, strict=True) if present]
        gradients = [dense(p.grad).flatten() for p in parameters if p.grad is not None]
        if filled:
            torch._foreach_copy_(filled, gradients)
            torch._foreach_mul_(filled, weight)
    flags = flat[elements:-1]
    flags.copy_(torch.tensor(here, dtype=dtype))
    flat[-1] = weight
    dist.all_reduce(flat, group=group)
    flat[:elements] /= flat[-1].clone()
    for parameter, place, anywhere in zip(parameters, places, flags.tolist(), strict=True):
        if not anywhere:
            continue
        mean = place.view(parameter.shape).to(parameter.dtype)
        if parameter.grad is None or parameter.grad.is_sparse:
            parameter.grad = mean.clone()
        else:
            parameter.grad.copy_(mean)


def dense(gradient: Tensor) -> Tensor:
    """The gradient itself, or a sparse one written out."""
    return gradient.to_dense() if gradient.is_sparse else gradient
