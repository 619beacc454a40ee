"""ScheduleFree+, a rival that no package on PyPI has, written from the formulas of its paper."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

GAUSSIAN = math.sqrt(math.pi / 2)  # what the paper multiplies the gradient's L1 norm by


class ScheduleFreePlus(torch.optim.Optimizer):
    """ScheduleFree+ (Defazio 2026, arXiv 2605.19095, algorithm 1), for one process, without weight decay.

    With the gradient `g` and the loss `f` at `y`, Adam's direction `d`, and the number `t` of the step:

        rate = min(1, t / warm_up) max(0, f + beta <g, z - x>) / (sqrt(pi / 2) |g|_1)          Polyak's step
        z -= rate d
        x += c (z - x)       c = 1 in the warm-up, then w / (the sum of all w),   w = (the largest rate so far)^2
        y = beta x + (1 - beta) z

    The defaults are those of the reference implementation: no power of `t` in `w`, the norm of the last
    gradient alone, no warm-up, and no annealing of `beta`. The weights are `y` in training and `x` after `eval()`. Call
    `see` before each `step`.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        beta: float = 0.9,
        warm_up: int = 0,
    ) -> None:
        super().__init__(parameters, {"betas": betas, "eps": eps, "beta": beta})
        self.warm_up = warm_up
        self.steps = 0
        self.rate = self.largest_rate = self.sum_of_weights = 0.0
        self.loss, self.shrunk = math.nan, 1.0

    def see(self, loss: float, shrunk: float = 1.0) -> None:
        """Take the loss at the present weights, and the factor by which clipping shortened the gradient."""
        self.loss, self.shrunk = loss, shrunk

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.steps += 1
        parameters = self.trained()
        self.rate = self.polyak_rate(parameters)
        self.largest_rate = max(self.largest_rate, self.rate)
        share = self.share()
        for parameter in parameters:
            x, z = self.state[parameter]["x"], self.state[parameter]["z"]
            z.sub_(self.direction(parameter), alpha=self.rate)
            x.lerp_(z, share)
            torch.lerp(z, x, self.param_groups[0]["beta"], out=parameter)

    def share(self) -> float:
        """The share `c` of the newest `z` in the average."""
        if self.steps <= self.warm_up:
            return 1.0
        weight = self.largest_rate**2
        self.sum_of_weights += weight
        return weight / self.sum_of_weights if weight else 1.0

    def trained(self) -> list[Tensor]:
        """The parameters with gradients, each with its state."""
        found = [p for p in self.param_groups[0]["params"] if p.grad is not None]
        for parameter in found:
            if not self.state[parameter]:
                x, z = parameter.clone(), parameter.clone()
                moments = {"first": torch.zeros_like(parameter), "second": torch.zeros_like(parameter)}
                self.state[parameter] = {"x": x, "z": z, **moments}
        return found

    def polyak_rate(self, parameters: list[Tensor]) -> float:
        """Both sums are linear in the gradient, so what clipping took away is given back."""
        norm = slope = 0.0
        for parameter in parameters:
            gradient, state = parameter.grad, self.state[parameter]
            assert gradient is not None
            norm += float(gradient.abs().sum())
            slope += float((gradient * (state["z"] - state["x"])).sum())
        numerator = self.loss + self.param_groups[0]["beta"] * slope / self.shrunk
        warm = min(1.0, self.steps / self.warm_up) if self.warm_up else 1.0
        return warm * max(0.0, numerator) / (GAUSSIAN * norm / self.shrunk) if norm else 0.0

    def direction(self, parameter: Tensor) -> Tensor:
        """Adam's, with both moments corrected for their start at zero."""
        (beta1, beta2), state, gradient = self.param_groups[0]["betas"], self.state[parameter], parameter.grad
        assert gradient is not None
        first = state["first"].lerp_(gradient, 1 - beta1) / (1 - beta1**self.steps)
        second = state["second"].lerp_(gradient.square(), 1 - beta2) / (1 - beta2**self.steps)
        return first / second.sqrt_().add_(self.param_groups[0]["eps"])

    def train(self) -> None:
        """Put `y` into the weights."""
        self._put(training=True)

    def eval(self) -> None:
        """Put the average `x` into the weights."""
        self._put(training=False)

    @torch.no_grad()
    def _put(self, training: bool) -> None:
        beta = self.param_groups[0]["beta"]
        for parameter, state in self.state.items():
            parameter.copy_(torch.lerp(state["z"], state["x"], beta) if training else state["x"])
