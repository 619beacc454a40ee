"""How much of the slope is signal: the part of `g.d` that comes from noise of the gradient, from how ranks differ.

`d` holds the gradient `g` of its own batch, so `g.d` is larger than the slope of the mean loss by the noise of `g`
times its own, `E[(g - E g)'J(g - E g)]` with `J` the derivative of `d` in the current gradient. Its unbiased estimate
from R slices of equal size is `sum_r (g_r - g)'J(g_r - g) / (R (R - 1))`. J is diagonal for SGD and Adam; with the
bias-corrected `v = sqrt(exp_avg_sq)` and `m`:

    SGD     1 - dampening, and with Nesterov 1 + momentum (1 - dampening)
    Adam    (1 - b1) / (1 - b1^k) / v - m g (1 - b2) / ((1 - b2^k) v^3)

A diagnostic: as a rule for the rate it has no fixed point.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from gen_dist.direction.optimizer import Direction
from gen_dist.parallel.gradients import dense

__all__ = ["check_optimizer", "gradient_noise"]


def check_optimizer(optimizer: Optimizer) -> None:
    """Raise `TypeError` for an optimizer whose J is not known."""
    known = isinstance(optimizer, (SGD, Adam, AdamW))
    if not known or any(group.get("amsgrad") for group in optimizer.param_groups):
        name = type(optimizer).__name__ + (" with amsgrad" if known else "")
        raise TypeError(f"signal=True knows the directions of SGD, Adam and AdamW, not of {name}: leave signal out")


def gradient_noise(optimizer: Optimizer, direction: Direction, own: Mapping[Tensor, Tensor]) -> float:
    """`g_r'J g_r - g'J g` of this rank: its mean over R ranks is R - 1 times the noise in `g.d`.

    `own` holds this rank's gradients `g_r` of replicated parameters; `grad` is their mean `g`, and the optimizer's
    state is that after the step.
    """
    total = torch.zeros((), dtype=torch.float64)
    for index, ratio, parameters, _ in direction:
        for parameter in parameters:
            g = dense(parameter.grad)  # type: ignore[arg-type]
            g_r = dense(own[parameter]) if parameter in own else torch.zeros_like(g)
            j = _jacobian(optimizer, optimizer.param_groups[index], parameter, g)
            total = total + ratio * (j * (g_r.square() - g.square())).sum().double().to(total.device)
    return float(total)


@torch.no_grad()
def _jacobian(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor, g: Tensor) -> Tensor:
    """The diagonal of J. A step that maximizes goes along minus g, as it were, and so against this noise."""
    sign = -1.0 if group["maximize"] else 1.0
    if isinstance(optimizer, SGD):
        now = 1.0 - group["dampening"] if group["momentum"] else 1.0
        now = 1.0 + group["momentum"] * now if group["nesterov"] else now
        return torch.full_like(g, sign * now)
    state, (beta1, beta2), step = optimizer.state[parameter], group["betas"], float(optimizer.state[parameter]["step"])
    decoupled = isinstance(optimizer, AdamW) or group.get("decoupled_weight_decay", False)
    taken = sign * g if decoupled else sign * g + group["weight_decay"] * parameter
    m = state["exp_avg"] / (1 - beta1**step)
    v = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt().clamp_min(torch.finfo(g.dtype).tiny)
    moved, spread = (1 - beta1) / (1 - beta1**step), (1 - beta2) / (1 - beta2**step)
    return sign * (moved / (v + group["eps"]) - m * taken * spread / (v * (v + group["eps"]).square()))
