"""One common rate, or a rate for each parameter group: how a line is measured for them, and how they are applied."""

from __future__ import annotations

from collections.abc import Mapping

from torch.optim import Optimizer

from gen_dist.direction import rate_ratios
from gen_dist.line import Line, Measured, Method, measure, measure_groups
from gen_dist.parallel import Ranks
from gen_dist.policy import State
from gen_dist.policy.groups import begin_groups, decide_ratios

__all__ = ["CommonRate", "GroupRates"]


class CommonRate:
    """One rate; the groups keep the ratios of the rates that the user gave."""

    def adopt(self, optimizer: Optimizer, state: State) -> State:
        """The state, for the groups that the optimizer has now."""
        return state

    def ratios(self, optimizer: Optimizer, state: State) -> list[float]:
        """Each group's share of the common rate."""
        return rate_ratios(optimizer)

    def measure(
        self, line: Line, ranks: Ranks, method: Method, finite: bool, companions: Mapping[str, float], state: State
    ) -> tuple[Measured, State]:
        """Measure the line; the state comes back with the ratios that the line has. Collective."""
        return measure(line, ranks, method, finite, companions), state


class GroupRates(CommonRate):
    """A rate for each group: their ratios come from curvature, too.

    Args:
        smoothing: the weight of the past in averages of what was measured.
        full: whether all K x K of the curvature is measured, or that of each group alone.
    """

    def __init__(self, smoothing: float, full: bool) -> None:
        self.smoothing, self.full = smoothing, full

    def adopt(self, optimizer: Optimizer, state: State) -> State:
        if state.groups is not None and len(state.groups.ratios) == len(optimizer.param_groups):
            return state
        return state._replace(groups=begin_groups(rate_ratios(optimizer)))

    def ratios(self, optimizer: Optimizer, state: State) -> list[float]:
        assert state.groups is not None
        return state.groups.ratios

    def measure(
        self, line: Line, ranks: Ranks, method: Method, finite: bool, companions: Mapping[str, float], state: State
    ) -> tuple[Measured, State]:
        assert state.groups is not None
        seen = measure_groups(line, ranks, method, finite, companions, len(state.groups.ratios), self.full)
        groups = decide_ratios(state.groups, seen.parabola, self.smoothing)
        return seen.along(groups.ratios), state._replace(groups=groups)
