"""Insurance while a rate grows: earlier states of the run, to go back to where growth has broken the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gen_dist.averaging import AveragedWeights
from gen_dist.direction import GenOptimizer
from gen_dist.parallel import Layout, local
from gen_dist.policy import AutoMemory, State
from gen_dist.watch import Companion, Seen

__all__ = ["Snapshots"]

KEPT = 3  # the last ones; the rule goes back by two


class _Snapshot(NamedTuple):
    """Copies of this rank's weights and of what the optimizer and the averages keep."""

    rate: float
    tensors: list[tuple[Tensor, Tensor]]
    numbers: list[tuple[dict[Any, Any], Any, Any]]
    counts: list[int]
    totals: list[float]


class Snapshots(Companion):
    """Saves the run where the rule says so, and brings it back where the rule does: `Auto` keeps the rates of both.

    Each snapshot is a copy of this rank's weights, averages and optimizer state. None is kept once growth is long over,
    nor in checkpoints: a run that was resumed lowers its rate, and goes on from its weights. Nothing is communicated.
    """

    def __init__(self, layout: Layout, optimizer: GenOptimizer, average: AveragedWeights | None) -> None:
        self.layout, self.optimizer, self.average = layout, optimizer, average
        self.kept: list[_Snapshot] = []
        self.settled_at = 0

    def look(self, seen: Seen, state: State) -> tuple[State, Mapping[str, float]]:
        memory, before = state.memory, seen.before.memory
        if not isinstance(memory, AutoMemory):
            return state, {}
        if len(memory.snapshots) > len(before.snapshots):
            self.kept = [*self.kept, self._take(memory.snapshots[-1])][-KEPT:]
        elif len(memory.snapshots) < len(before.snapshots):
            self._go_back(memory.snapshots[-1])
        if memory.settled and not before.settled:
            self.settled_at = memory.age
        if memory.settled and memory.age > 2 * self.settled_at:
            self.kept = []
        return state, {}

    @torch.no_grad()
    def _take(self, rate: float) -> _Snapshot:
        self.layout.reshard()
        tensors = [local(p.detach()) for group in self.optimizer.param_groups for p in group["params"]]
        numbers = []
        for of_parameter in self.optimizer.state.values():
            for name, value in of_parameter.items():
                if isinstance(value, Tensor):
                    tensors.append(local(value))
                else:
                    numbers.append((of_parameter, name, value))
        counts, totals = [], []
        if self.average is not None:
            tensors += self.average.average
            counts, totals = [*self.average.counts], [*self.average.totals]
        return _Snapshot(rate, [(tensor, tensor.clone()) for tensor in tensors], numbers, counts, totals)

    @torch.no_grad()
    def _go_back(self, rate: float) -> None:
        """Restore the snapshot of this rate; the present step, whose direction belongs to other weights, is skipped."""
        self.kept = [snapshot for snapshot in self.kept if snapshot.rate <= rate]
        if not self.kept:
            return
        snapshot = self.kept[-1]
        self.layout.reshard()
        for tensor, copy in snapshot.tensors:
            tensor.copy_(copy)
        for of_parameter, name, value in snapshot.numbers:
            of_parameter[name] = value
        if self.average is not None:
            self.average.counts, self.average.totals = [*snapshot.counts], [*snapshot.totals]
            self.average.expect_step(False)
        self.optimizer.skip_step()
