"""The method on one page, in one process, with double backward in float64. The tests compare everything with it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass
class Run:
    """What training did, step by step, and where it ended."""

    rates: list[float] = field(default_factory=list)
    numerators: list[float] = field(default_factory=list)
    denominators: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)


def direction(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """`d` of a step with the present gradients, from a copy that takes the step at rate 1."""
    twin_model, twin = copy.deepcopy((model, optimizer))
    for p, q in zip(model.parameters(), twin_model.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    for group in twin.param_groups:
        group["lr"] = 1.0
    twin.step()
    return [(p - q).detach() for p, q in zip(model.parameters(), twin_model.parameters(), strict=True)]


def derivatives(loss: Callable[[], Tensor], parameters: Sequence[Tensor], d: Sequence[Tensor]) -> tuple[float, ...]:
    """`(L, g.d, d'Hd)` by double backward."""
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
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
    """Train on whole batches, at `clamp((g.d) / (d'Hd))`, or at the last rate if either part is not positive."""
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


def finite_differences(
    loss: Callable[[], Tensor], parameters: Sequence[Tensor], d: Sequence[Tensor], h: float, probes: int
) -> tuple[float, float]:
    """`(g.d, d'Hd)` from the loss at `-h`, `0`, `h` along `theta - a d`; with one probe the slope is the gradient's."""
    start = [p.detach().clone() for p in parameters]

    def at(a: float) -> float:
        with torch.no_grad():
            for p, s, v in zip(parameters, start, d, strict=True):
                p.copy_(s - a * v)
            value = loss().item()
            for p, s in zip(parameters, start, strict=True):
                p.copy_(s)
        return value

    if probes == 2:
        return (at(-h) - at(h)) / (2 * h), (at(h) - 2 * at(0) + at(-h)) / h**2
    gradient = torch.autograd.grad(loss(), parameters)
    slope = sum((g * v).sum() for g, v in zip(gradient, d, strict=True)).item()  # type: ignore[union-attr]
    return slope, 2 * (at(h) - at(0) + h * slope) / h**2


def gauss_newton(
    model: nn.Module, criterion: Callable[[Tensor, Tensor], Tensor], x: Any, y: Tensor, d: Sequence[Tensor]
) -> tuple[float, ...]:
    """`(L, g.d, (Jd)' H (Jd))`, `J` the model's Jacobian and `H` the criterion's Hessian in the model's output."""
    names = [name for name, _ in model.named_parameters()]
    point, tangent = dict(model.named_parameters()), dict(zip(names, d, strict=True))
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward mode on every version of torch
        output, moved = torch.func.jvp(lambda p: torch.func.functional_call(model, p, (x,)), (point,), (tangent,))
    leaf = output.detach().requires_grad_()
    return derivatives(lambda: criterion(leaf, y), [leaf], [moved.detach()])


def estimate(
    model: nn.Module,
    criterion: Callable[[Any, Tensor], Tensor],
    x: Any,
    y: Tensor,
    d: Sequence[Tensor],
    curvature: str,
    h: float,
    probes: int,
) -> tuple[float, float]:
    """`(g.d, d'Hd)` as the estimator of this name defines them; `h` and `probes` are those of finite differences."""
    weights = [*model.parameters()]
    if curvature == "forward":
        return finite_differences(lambda: criterion(model(x), y), weights, d, h, probes)
    if curvature == "gauss-newton":
        _, slope, bend = gauss_newton(model, criterion, x, y, d)
    else:
        _, slope, bend = derivatives(lambda: criterion(model(x), y), weights, d)
    return slope, bend
