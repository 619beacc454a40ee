"""The update direction `d` of any optimizer: its step is `theta <- theta - lr d`."""

from gen_dist.direction.direction import Direction, GroupDirection
from gen_dist.direction.momentum import MOMENTUM_CAN_BE_TAKEN, give_momentum_back, take_momentum
from gen_dist.direction.optimizer import (
    GenOptimizer,
    as_gen_optimizer,
    direction_without_trace,
    make_gen_optimizer,
)
from gen_dist.direction.rates import loss_sign, rate_ratios, set_rate

__all__ = [
    "MOMENTUM_CAN_BE_TAKEN",
    "Direction",
    "GenOptimizer",
    "GroupDirection",
    "as_gen_optimizer",
    "direction_without_trace",
    "give_momentum_back",
    "loss_sign",
    "make_gen_optimizer",
    "rate_ratios",
    "set_rate",
    "take_momentum",
]
