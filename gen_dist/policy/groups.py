"""A rate for each parameter group: the ratios between them from curvature, while the rule sets the common rate.

Along K groups' directions the loss is a quadratic in K rates, `L - b.eta + eta'A eta / 2`, with its minimum where
`A eta = b` (Hi-DLR, arXiv 2501.06954, uses the diagonal of A). Only the ratios of the solution are used; on the line
that they define the rule decides as always. So `Raw` takes the whole solution, and `Auto` keeps its start, cap and
growth. Linear algebra is torch's; everything else of the policy is plain Python.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gen_dist.parabola import GroupParabola
from gen_dist.policy.state import GroupMemory

__all__ = ["begin_groups", "decide_ratios", "solve"]


def begin_groups(ratios: Sequence[float]) -> GroupMemory:
    """What is remembered before the first update: the ratios of the rates that the user gave."""
    zeros = [0.0] * len(ratios)
    return GroupMemory(list(ratios), zeros, [zeros] * len(ratios))


def decide_ratios(memory: GroupMemory, seen: GroupParabola, smoothing: float) -> GroupMemory:
    """The ratios after an update, from averages of `b` and `A`; the ratios stay where there is no solution."""
    old, new = smoothing, 1 - smoothing
    b = old * _vector(memory.numerators) + new * _vector(seen.numerators)
    a = old * _vector(memory.denominators) + new * _vector(seen.denominators)
    if not (b.isfinite().all() and a.isfinite().all()):
        return memory
    rates = solve(a, b)
    ratios = memory.ratios if rates is None else (rates / rates.max()).tolist()
    return GroupMemory(ratios, b.tolist(), a.tolist())


def solve(a: Tensor, b: Tensor) -> Tensor | None:
    """Positive `eta` with `(A + mu |diag A|) eta = b`, at the smallest `mu` that makes it a minimum.

    `a` has shape `(K, K)`, `b` and the result `(K,)`, all float64. `mu` is 0 where `A` is positive definite and all
    rates come out positive; otherwise it grows towards the diagonal's own answer, `b_k / |A_kk|`. A group that does not
    move (`b_k = A_kk = 0`) gets the mean of the others. Returns None where a direction does not descend or nothing
    curves.
    """
    bend = a.diagonal().abs()
    moving = (b != 0) | (bend != 0)
    a, b, bend = a[moving][:, moving], b[moving], bend[moving]
    if not len(b) or (b <= 0).any() or (bend <= 0).any():
        return None
    for mu in (0.0, *(4.0**power for power in range(-6, 12))):
        factor, failed = torch.linalg.cholesky_ex(a + mu * bend.diag())
        if not failed and (found := torch.cholesky_solve(b[:, None], factor)[:, 0]).gt(0).all():
            break
    else:
        found = b / bend
    if not (found.isfinite() & (found > 0)).all():  # infinite, or so small that it rounds to zero
        return None
    rates = torch.full(moving.shape, float(found.mean()), dtype=found.dtype)
    rates[moving] = found
    return rates


def _vector(values: list[float] | list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
