"""Learning rates of parameter groups: their ratios, and how one is set."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["rate_ratios", "set_rate"]


def rate_ratios(optimizer: Optimizer) -> list[float]:
    """Each group's share of the common rate: the ratios of the learning rates that the user gave, at most 1."""
    rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    largest = max(rates, default=0.0)
    return [rate / largest if largest > 0 else 1.0 for rate in rates]


def set_rate(group: dict[str, Any], rate: Any) -> None:
    """Set a group's learning rate; a tensor is overwritten, never replaced."""
    present = group["lr"]
    if isinstance(present, Tensor):
        present.copy_(rate) if isinstance(rate, Tensor) else present.fill_(rate)
    else:
        group["lr"] = rate
