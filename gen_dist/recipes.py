"""Which parts make which method: the paper's, with exact curvature or by forward passes, and the one for training."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn
from torch.distributed import ProcessGroup

from gen_dist.averaging import Averaging
from gen_dist.direction import MOMENTUM_CAN_BE_TAKEN, GenOptimizer
from gen_dist.line import BatchLoss, Criterion
from gen_dist.policy import Auto
from gen_dist.scheduler import GenScheduler
from gen_dist.watch import Companion

SCHEDULE_FREE = Averaging(momentum=0.9, power=1, rate_power=2, takes_over=True)

__all__ = ["ApproxGen", "AutoGen", "ExactGen"]


class ExactGen(GenScheduler):
    """`GenScheduler` with exact curvature and the rule of the paper as it stands: the raw ratio, clamped."""

    def __init__(
        self,
        optimizer: GenOptimizer,
        model: nn.Module,
        criterion: Criterion | None = None,
        lr_min: float = 0.0,
        lr_max: float = 1.0,
        *,
        update_every: int = 1,
        process_group: ProcessGroup | None = None,
        compute_loss: BatchLoss | None = None,
    ) -> None:
        super().__init__(
            optimizer,
            model,
            criterion,
            lr_min,
            lr_max,
            update_every=update_every,
            process_group=process_group,
            compute_loss=compute_loss,
        )


class ApproxGen(GenScheduler):
    """`GenScheduler` with curvature by forward passes alone: it works for any model that can evaluate its loss."""

    def __init__(
        self,
        optimizer: GenOptimizer,
        model: nn.Module,
        criterion: Criterion | None = None,
        lr_min: float = 0.0,
        lr_max: float = 1.0,
        *,
        probes: int = 2,
        update_every: int = 1,
        process_group: ProcessGroup | None = None,
        compute_loss: BatchLoss | None = None,
    ) -> None:
        super().__init__(
            optimizer,
            model,
            criterion,
            lr_min,
            lr_max,
            curvature="forward",
            probes=probes,
            update_every=update_every,
            process_group=process_group,
            compute_loss=compute_loss,
        )


class AutoGen(GenScheduler):
    """The recipe for real training: it needs no rate, no schedule and no horizon.

    The rule is `Auto`: the rate starts small relative to the weights, and grows until it nears the minimum along the
    direction (GeN) or promises much of the loss (Polyak). Averaged weights, which the weights in training follow as in
    Schedule-Free (see `Averaging`), replace a decaying rate: evaluate and export inside `with scheduler.averaged():`.
    The averages also do the work of momentum: the optimizer's own (beta1 of Adam and AdamW, the momentum of SGD) is
    set to zero in its groups, which keep it as `momentum_taken`; `give_momentum_back(optimizer)` undoes that. The
    initial learning rate plays no part, except for the ratios between groups.

    With `total_steps` the horizon is known: at the last step the weights become their average, so at the end there is
    nothing to evaluate or export apart.

    Args:
        update_every: the number of steps between updates at the start; later they are rarer (see `Auto`).
        rule: `Auto(...)` with other values; by default those of the recipe, with `total_steps`.
        average: how to average, `Averaging(...)`; False for none.
        momentum: `'averages'`, as above, or `'optimizer'`: it keeps its momentum, and the averages are
            those of `Averaging()`. Optimizers whose momentum cannot be taken over keep it in any case.

    The other arguments are those of `GenScheduler`.
    """

    def __init__(
        self,
        optimizer: GenOptimizer,
        model: nn.Module,
        criterion: Criterion | None = None,
        lr_min: float = 0.0,
        lr_max: float = math.inf,
        *,
        curvature: str = "auto",
        probes: int = 2,
        update_every: int = 3,
        total_steps: int | None = None,
        rule: Auto | None = None,
        average: bool | Averaging = True,
        momentum: str = "averages",
        companions: Sequence[Companion] = (),
        process_group: ProcessGroup | None = None,
        compute_loss: BatchLoss | None = None,
    ) -> None:
        if rule is not None and total_steps is not None:
            raise ValueError("give total_steps to the rule: AutoGen(..., rule=Auto(total_steps=...))")
        rule = rule if rule is not None else Auto(total_steps=total_steps)
        if momentum not in ("averages", "optimizer"):
            raise ValueError(f"momentum must be 'averages' or 'optimizer', got {momentum!r}")
        if average is True:
            taken = momentum == "averages" and isinstance(optimizer, MOMENTUM_CAN_BE_TAKEN)
            average = SCHEDULE_FREE if taken else Averaging()
        super().__init__(
            optimizer,
            model,
            criterion,
            lr_min,
            lr_max,
            curvature=curvature,
            probes=probes,
            update_every=update_every,
            rule=rule,
            average=average,
            companions=companions,
            process_group=process_group,
            compute_loss=compute_loss,
        )
