"""The method on one page: one process, float64, double backward. Everything is held to it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Run:
    """What training did, step by step, and where it ended."""

    rates: list[float] = field(default_factory=list)
    numerators: list[float] = field(default_factory=list)
    denominators: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)


def direction(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """`d` of a step with the gradients that are there, from a copy that steps at rate 1."""
    twin_model, twin = copy.deepcopy((model, optimizer))
    for p, q in zip(model.parameters(), twin_model.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    for group in twin.param_groups:
        group["lr"] = 1.0
    twin.step()
    return [(p - q).detach() for p, q in zip(model.parameters(), twin_model.parameters(), strict=True)]


def derivatives(loss: Callable[[], Tensor], parameters: Sequence[Tensor], d: Sequence[Tensor]) -> tuple[float, ...]:
    """`(L, g.d, d'Hd)` by double backward."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        value = loss()
        gradient = torch.autograd.grad(value, parameters, create_graph=True, materialize_grads=True)
        slope = sum((g * v).sum() for g, v in zip(gradient, d, strict=True))
        if not slope.requires_grad:  # type: ignore[union-attr]
            return value.item(), slope.item(), 0.0  # type: ignore[union-attr]
        product = torch.autograd.grad(slope, parameters, materialize_grads=True)
    curvature = sum((h * v).sum() for h, v in zip(product, d, strict=True))
    return value.item(), slope.item(), curvature.item()  # type: ignore[union-attr]


def train(
    model: nn.Module,
    criterion: Callable[[Any, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    batches: Sequence[tuple[Any, Tensor]],
    lr_min: float = 0.0,
    lr_max: float = 1.0,
) -> Run:
    """Train on one whole batch a step, each at `clamp((g.d) / (d'Hd))`, or at the last rate where that is no rate."""
    run = Run()
    rate = optimizer.param_groups[0]["lr"]
    for x, y in batches:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        d = direction(model, optimizer)
        value, slope, curvature = derivatives(lambda x=x, y=y: criterion(model(x), y), [*model.parameters()], d)
        if slope > 0 and curvature > 0:
            rate = slope / curvature
        rate = min(max(rate, lr_min), lr_max)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        run.rates.append(rate)
        run.numerators.append(slope)
        run.denominators.append(curvature)
        run.losses.append(value)
    run.parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    return run
