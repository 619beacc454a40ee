"""Gradients over ranks: their mean, where no wrapper takes it, and whether all of them are finite."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gen_dist.parallel.placement import local
from gen_dist.parallel.ranks import Ranks
from gen_dist.torch_private import foreach_copy_, foreach_mul_, foreach_norm

__all__ = ["average_gradients", "dense", "gradients_are_finite", "gradients_not_finite"]

BUCKET_ELEMENTS = 6_553_600  # 25 MiB of float32, the size that DDP found to be good


def average_gradients(parameters: Sequence[Tensor], ranks: Ranks, weight: float = 1.0) -> None:
    """Replace every gradient by its mean over ranks, weighted by `weight`, in a few large reductions. Collective.

    A parameter that has a gradient on some ranks only counts as zero on the others, and has one on all afterwards.
    Gradients in half precision are averaged in float32.
    """
    if ranks.size == 1:
        return
    for bucket in _buckets(parameters):
        _average(bucket, ranks, weight)


def gradients_are_finite(parameters: Sequence[Tensor], ranks: Ranks, sharded: bool) -> bool:
    """Whether the gradients hold no NaN or infinity. Where they are `sharded`, on any rank, and then collective."""
    if not sharded and all(p.grad is None for p in parameters):
        return True
    if not _anywhere(~_sum_of_norms(parameters).isfinite(), ranks, sharded).item():
        return True
    exact = [v.isfinite().all() for v in _gradients(parameters)]  # a norm of finite numbers can overflow
    return not _anywhere(~torch.stack(exact).all() if exact else torch.tensor(False), ranks, sharded).item()


def gradients_not_finite(parameters: Sequence[Tensor], ranks: Ranks, sharded: bool) -> Tensor:
    """1 where the gradients hold a NaN or infinity, or their norms overflow float32, else 0.

    A scalar of float32, for which the host does not wait. Collective where the gradients are `sharded`.
    """
    return _anywhere(~_sum_of_norms(parameters).isfinite(), ranks, sharded).to(torch.float32)


def _anywhere(flag: Tensor, ranks: Ranks, sharded: bool) -> Tensor:
    return ranks.any(flag) if sharded else flag


def _sum_of_norms(parameters: Sequence[Tensor]) -> Tensor:
    """By far the cheapest number that is finite only where all gradients are."""
    gradients = _gradients(parameters)
    if not gradients:
        return torch.zeros(())
    dtype = functools.reduce(torch.promote_types, {g.dtype for g in gradients}, torch.float32)
    return torch.stack(foreach_norm(gradients, dtype=dtype)).sum()


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    return [g.coalesce().values() if g.is_sparse else g for g in gradients]


def dense(gradient: Tensor) -> Tensor:
    """The gradient itself, or a sparse one written out."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def _buckets(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters of one dtype and device, in order, as many as fit a bucket."""
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            alike.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for group in alike.values():
        bucket: list[Tensor] = []
        elements = 0
        for parameter in group:
            if bucket and elements + parameter.numel() > BUCKET_ELEMENTS:
                yield bucket
                bucket, elements = [], 0
            bucket.append(parameter)
            elements += parameter.numel()
        if bucket:
            yield bucket


def _average(parameters: list[Tensor], ranks: Ranks, weight: float) -> None:
    """Average one bucket. It carries its own flags and the weight, so that nothing else is communicated."""
    dtype, device = parameters[0].dtype, parameters[0].device
    dtype = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    sizes = [p.numel() for p in parameters]
    bucket = torch.zeros(sum(sizes) + len(parameters) + 1, dtype=dtype, device=device)
    sums, flags, total = bucket.split([sum(sizes), len(parameters), 1])
    places = sums.split(sizes)
    here = [p.grad is not None for p in parameters]
    if weight != 0:  # an empty slice may well have a NaN for its mean
        filled = [place for place, present in zip(places, here, strict=True) if present]
        gradients = [dense(p.grad).flatten() for p in parameters if p.grad is not None]
        if filled:
            foreach_copy_(filled, gradients)
            foreach_mul_(filled, weight)
    flags.copy_(torch.tensor(here, dtype=dtype))
    total.fill_(weight)
    ranks.sum_in_place(bucket)
    sums /= total
    for parameter, place, anywhere in zip(parameters, places, flags.tolist(), strict=True):
        if not anywhere:
            continue
        mean = place.view(parameter.shape).to(parameter.dtype)
        if parameter.grad is None or parameter.grad.is_sparse:
            parameter.grad = mean.clone()
        else:
            parameter.grad.copy_(mean)
