"""Learning rates of parameter groups: their ratios, and how one is set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["loss_sign", "rate_ratios", "set_rate"]


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


def loss_sign(groups: Sequence[dict[str, Any]]) -> float:
    """-1 for groups that maximize the loss: they minimize the negative one. Raises `ValueError` for a mixture."""
    maximizing = {bool(group.get("maximize")) for group in groups}
    if len(maximizing) > 1:
        raise ValueError("some parameter groups have maximize=True and others not: use an optimizer for each")
    return -1.0 if maximizing == {True} else 1.0
