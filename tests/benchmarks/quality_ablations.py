"""AutoGen's rule with one of its constants changed, or one of its parts left out; ablations.md has the results.

python tests/benchmarks/quality.py run --tasks design --seeds 0 10 --methods autogen 'ablation-*'
python tests/benchmarks/quality.py ablations --tasks design --seeds 0 10
"""

from __future__ import annotations

import math

from gen_dist.parabola import Parabola
from gen_dist.policy import Auto, Clamp, State
from gen_dist.policy.rule import WENT_TOO_FAR

__all__ = ["ABLATED", "WithoutBudget", "WithoutReturn"]

# One constant of the rule at a time is another value; "0" and "inf" take away what it is for.
ABLATED: dict[str, tuple[float, ...]] = {
    "start": (5e-6, 2e-4, 5e-4),
    "quick": (1.07, 1.25, 2.0),
    "slow": (1.03, 1.15),
    "edge": (0.4, 1.5),
    "share": (0.1, 0.4, math.inf),
    "creep": (0.0, 2.0),
    "far": (2.0, math.inf),
    "REMEMBERED": (1, 5),
    "FAR_BELOW": (0.001, 0.03),
    "NEAR": (0.03, 0.3),
    "CREEPING_SHARE": (1.0, 4.0),
    "LEAST_FALL": (0.25, 1.0),
    "GROWING": (4, 16),
    "SETTLED": (1, 4),
    "UNSETTLED_STRIDE": (3, 12),
    "LONGEST_STRIDE": (32, math.inf),
    "UNSEEN": (1.5, 6),
    "JUMP": (1.5, math.inf),
    "DONE": (0.0, 1.0),
}


class WithoutBudget(Auto):
    """The rule, whose settled rate creeps also while the rate times the loss grows."""

    def decide(self, state: State, parabola: Parabola, steps: int, clamp: Clamp) -> State:
        after = super().decide(state, parabola, steps, clamp)
        return after._replace(memory=after.memory._replace(budget=math.inf))


class WithoutReturn(Auto):
    """The rule, whose growth stays where it ended, beyond the limit."""

    def decide(self, state: State, parabola: Parabola, steps: int, clamp: Clamp) -> State:
        after = super().decide(state, parabola, steps, clamp)
        ended = after.memory.settled and not state.memory.settled and after.reason != WENT_TOO_FAR
        return after._replace(rate=clamp.of(state.rate)) if ended else after
