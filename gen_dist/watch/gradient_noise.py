"""How much of the slope is signal: the part of `g.d` that is noise of the gradient, from how the ranks differ.

`d` contains the gradient `g` of its own batch, so `g.d` is larger than the slope of the mean loss by the noise of `g`
times its own, `E[(g - E g)'J(g - E g)]` with `J` the derivative of `d` in the current gradient. Its unbiased estimate
from R slices of equal size is `sum_r (g_r - g)'J(g_r - g) / (R (R - 1))`. J is diagonal for SGD and Adam; with the
bias-corrected `v = sqrt(exp_avg_sq)` and `m`:

    SGD     1 - dampening, and with Nesterov 1 + momentum (1 - dampening)
    Adam    (1 - b1) / (1 - b1^k) / v - m g (1 - b2) / ((1 - b2^k) v^3)

This is a diagnostic: as a rule for the rate it has no fixed point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from gen_dist.direction import Direction, GenOptimizer
from gen_dist.line import Estimator
from gen_dist.parallel import Layout, dense
from gen_dist.policy import State
from gen_dist.watch.companion import Companion, Seen

__all__ = ["GradientNoise"]


class GradientNoise(Companion):
    """Reports `signal`, the share of the numerator `g.d` that is not noise of this batch's gradient.

    For SGD, Adam and AdamW on plain replicas, where each rank sees the gradient of its own slice. Costs a copy of the
    gradients and a pass over them.
    """

    def __init__(self) -> None:
        self._own: dict[Tensor, Tensor] = {}  # this rank's gradients, from their averaging to the reduction

    def check(self, optimizer: GenOptimizer, layout: Layout, estimator: Estimator) -> None:
        known = isinstance(optimizer, (SGD, Adam, AdamW))
        if not known or any(group.get("amsgrad") for group in optimizer.param_groups):
            name = type(optimizer).__name__ + (" with amsgrad" if known else "")
            raise TypeError(
                f"GradientNoise knows the directions of SGD, Adam and AdamW, not of {name}: leave the companion out"
            )
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        if len(layout.needs_averaging(weights)) < len(weights):
            raise ValueError(
                "GradientNoise needs each rank's own gradients, which plain replicas have; the wrapper of this model "
                "hands over their mean: leave the companion out"
            )

    def before_averaging(self, parameters: Sequence[Tensor]) -> None:
        self._own = {p: p.grad.clone() for p in parameters if p.grad is not None}

    def numbers(self, optimizer: GenOptimizer, direction: Direction) -> Mapping[str, float]:
        own, self._own = self._own, {}
        return {"gradient noise": _spread(optimizer, direction, own)}

    def look(self, seen: Seen, state: State) -> tuple[State, Mapping[str, float]]:
        measured, numerator = seen.measured, seen.measured.parabola.gradient_numerator
        if measured.slices <= 1.001 or not numerator:
            return state, {}
        noise = seen.line.data.sign * measured.means["gradient noise"] / (measured.slices - 1)
        return state, {"signal": (numerator - noise) / numerator}


def _spread(optimizer: Optimizer, direction: Direction, own: Mapping[Tensor, Tensor]) -> float:
    """`g_r'J g_r - g'J g` of this rank: its mean over R ranks is R - 1 times the noise in `g.d`.

    `own` holds this rank's gradients `g_r`; `grad` is their mean `g`, and the optimizer's state is that after the step.
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
    """The diagonal of J. A step that maximizes goes along minus g, and so against this noise."""
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
