"""An optimizer's own momentum, which averages of the weights can take over."""

from __future__ import annotations

import logging
from typing import Any

from torch.optim import SGD, Adam, AdamW, Optimizer

__all__ = ["MOMENTUM_CAN_BE_TAKEN", "give_momentum_back", "take_momentum"]

logger = logging.getLogger("gen_dist")

MOMENTUM_CAN_BE_TAKEN = (Adam, AdamW, SGD)
TAKEN = "momentum_taken"  # the entry of a group that holds its momentum meanwhile; saved with the optimizer


def take_momentum(optimizer: Optimizer) -> None:
    """Set beta1 of Adam and AdamW, or the momentum of SGD, to zero, and keep it in the group.

    Other optimizers stay as they are. Groups that come later are not touched: call it again.
    """
    groups = [group for group in optimizer.param_groups if _momentum(optimizer, group)]
    if groups and not any(TAKEN in group for group in optimizer.param_groups):
        logger.info("averaged weights take over the momentum of %s (said once)", type(optimizer).__name__)
    for group in groups:
        group[TAKEN] = _momentum(optimizer, group)
        _set_momentum(optimizer, group, 0.0)


def give_momentum_back(optimizer: Optimizer) -> None:
    """Undo `take_momentum`: for an optimizer that goes on without its scheduler."""
    for group in optimizer.param_groups:
        if TAKEN in group:
            _set_momentum(optimizer, group, group.pop(TAKEN))


def _momentum(optimizer: Optimizer, group: dict[str, Any]) -> float:
    if isinstance(optimizer, SGD):
        return float(group["momentum"])
    return float(group["betas"][0]) if isinstance(optimizer, Adam | AdamW) else 0.0


def _set_momentum(optimizer: Optimizer, group: dict[str, Any], momentum: float) -> None:
    if isinstance(optimizer, SGD):
        group["momentum"] = momentum
    else:
        group["betas"] = (momentum, *group["betas"][1:])
