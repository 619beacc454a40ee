"""An optimizer's own momentum, which averages of the weights can take over."""

from __future__ import annotations

from torch.optim import SGD, Adam, AdamW, Optimizer

__all__ = ["give_momentum_back", "take_momentum"]

TAKEN = "momentum_taken"  # the entry of a group that holds its momentum meanwhile; saved with the optimizer


def take_momentum(optimizer: Optimizer) -> None:
    """Set beta1 of Adam and AdamW, or the momentum of SGD, to zero, and keep it in the group.

    Other optimizers stay as they are. Groups that come later are not touched: call it again.
    """
    for group in optimizer.param_groups:
        if isinstance(optimizer, Adam | AdamW) and group["betas"][0]:
            group[TAKEN], group["betas"] = float(group["betas"][0]), (0.0, group["betas"][1])
        elif isinstance(optimizer, SGD) and group["momentum"]:
            group[TAKEN], group["momentum"] = float(group["momentum"]), 0.0


def give_momentum_back(optimizer: Optimizer) -> None:
    """Undo `take_momentum`."""
    for group in optimizer.param_groups:
        momentum = group.pop(TAKEN, None)
        if momentum is not None and isinstance(optimizer, SGD):
            group["momentum"] = momentum
        elif momentum is not None:
            group["betas"] = (momentum, group["betas"][1])
