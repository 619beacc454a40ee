"""Which parts make which method: the paper's, with exact curvature or by forward passes, and the one for training."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn
from torch.distributed import ProcessGroup

from gen_dist.averaging import Averaging
from gen_dist.direction import GenOptimizer
from gen_dist.line import Criterion
from gen_dist.policy import Auto
from gen_dist.scheduler import GenScheduler
from gen_dist.snapshots import Snapshots
from gen_dist.watch import Companion

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
    ) -> None:
        super().__init__(
            optimizer, model, criterion, lr_min, lr_max, update_every=update_every, process_group=process_group
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
        )


class AutoGen(GenScheduler):
    """The recipe for real training: it needs no rate, no schedule and no horizon.

    It measures at every eighth step, and at every sixteenth once the rate has settled. The rule is `Auto`: smoothed,
    with growth that stops by itself, start and cap relative to the weights. Averaged weights, which the weights follow
    part of the way (see `Averaging`), replace a decaying rate: evaluate and export inside
    `with scheduler.averaged():`. The initial learning rate plays no part, except for the ratios between groups.

    With `total_steps` the horizon is known: the rate also decays to zero, and averages are kept only if asked for.

    Args:
        rule: `Auto(...)` with other values; by default those of the recipe, with `total_steps`.
        average: keep averaged weights, or how: `Averaging(...)`; by default where no horizon is given.

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
        update_every: int = 4,
        total_steps: int | None = None,
        rule: Auto | None = None,
        average: bool | Averaging | None = None,
        group_rates: bool | str = False,
        companions: Sequence[Companion] = (),
        process_group: ProcessGroup | None = None,
    ) -> None:
        if rule is not None and total_steps is not None:
            raise ValueError("give total_steps to the rule: AutoGen(..., rule=Auto(total_steps=...))")
        rule = rule if rule is not None else Auto(total_steps=total_steps)
        if average is None or average is True:
            average = Averaging(takes_over=True)
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
            group_rates=group_rates,
            companions=companions,
            process_group=process_group,
        )
        self.companions.append(Snapshots(self.layout, optimizer, self.average))
