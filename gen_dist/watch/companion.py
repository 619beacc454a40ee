"""What a companion is: something that the updates of a scheduler carry along, with a state of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from gen_dist.direction import Direction, GenOptimizer
from gen_dist.line import Estimator, Line, Measured
from gen_dist.parallel import Layout, Ranks
from gen_dist.policy import State

__all__ = ["Companion", "Companions", "Seen"]


class Seen(NamedTuple):
    """What a companion may look at after the decision, the same on all ranks but for `line`.

    Attributes:
        line: along which the weights are about to move, at the groups' own ratios.
        ranks: the ranks that train together.
        measured: the parabola, and the means over ranks of what companions added.
        factor: what the rate is multiplied by at this step: 0 after a known horizon, else 1.
        before: the state before the decision.
        probe: the rate at which finite differences were taken.
    """

    line: Line
    ranks: Ranks
    measured: Measured
    factor: float
    before: State
    probe: float


class Companion:
    """Base class: each method may be overridden, and does nothing here.

    All ranks call them alike, at updates only. A companion may communicate in `look` alone, and decides there from
    numbers over all ranks.
    """

    def check(self, optimizer: GenOptimizer, layout: Layout, estimator: Estimator) -> None:
        """Raise `TypeError` or `ValueError` for a scheduler that this companion cannot serve."""

    def before_averaging(self, parameters: Sequence[Tensor]) -> None:
        """See the gradients of this rank alone, before they are averaged over the ranks."""

    def numbers(self, optimizer: GenOptimizer, direction: Direction) -> Mapping[str, float]:
        """Numbers of this rank, by name, which the update's reduction averages over the ranks."""
        return {}

    def look(self, seen: Seen, state: State) -> tuple[State, Mapping[str, float]]:
        """Look at the update; return the state to continue with, and fields of `Update` to report."""
        return state, {}

    def state_dict(self) -> dict[str, Any]:
        """Return what the companion needs to resume, as plain numbers."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict()` returned."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Companions(list[Companion]):
    """The companions of a scheduler, asked one after the other."""

    def before_averaging(self, parameters: Sequence[Tensor]) -> None:
        """Let each see the gradients of this rank alone."""
        for companion in self:
            companion.before_averaging(parameters)

    def numbers(self, optimizer: GenOptimizer, direction: Direction) -> dict[str, float]:
        """The numbers of all, by name."""
        return {name: n for each in self for name, n in each.numbers(optimizer, direction).items()}

    def look(self, seen: Seen, state: State) -> tuple[State, dict[str, float]]:
        """Let each look; the state that the last one leaves, and the fields of all."""
        found: dict[str, float] = {}
        for companion in self:
            state, reported = companion.look(seen, state)
            found |= reported
        return state, found

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """The states of those that have one, by the name of their class."""
        states = {type(companion).__name__: companion.state_dict() for companion in self}
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict()` returned; a companion that was not there then begins anew."""
        for companion in self:
            if type(companion).__name__ in state_dict:
                companion.load_state_dict(state_dict[type(companion).__name__])
