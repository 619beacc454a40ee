"""The net under all measurements: does the line agree with an ordinary forward and backward pass?"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from gen_dist.direction import GenOptimizer
from gen_dist.line import Estimator, Line, NeedsForward, Ordinary, by_backward, walk_over_ranks
from gen_dist.parabola import Parabola
from gen_dist.parallel import Layout
from gen_dist.policy import OTHER_FUNCTION, State
from gen_dist.watch.companion import Companion, Seen

__all__ = ["SelfCheck"]

logger = logging.getLogger("gen_dist")

COARSE = 1e-3  # a relative rounding from which on a mismatch is no proof: half precision
TOLERANCE = 0.1  # of the slope, relative, that finite differences may be off by, besides what they tell themselves
SIZES = 8  # of steps that finite differences are checked at
CAUSES = (
    "a closure that computes another loss at each call (other data, a random stream that this library does not know, "
    "state that it changes), a gradient that code replaces (hooks, custom functions), or a fault of this library"
)


class SelfCheck(Companion):
    """Compares the line with an ordinary forward and backward pass on the same data, with the same random numbers.

    Every scheduler carries one. At the first update, after a change of the model's mode or of the weights that move,
    and at every so many updates, the loss must be `phi(0)` and `<gradient, d>` must be `-phi'(0)`, to rounding. If
    not, exact curvature raises `RuntimeError`, or goes on by finite differences under `curvature='auto'`. Those decline
    their updates: the loss at displaced weights is then not the function that training differentiates (a target from
    the same weights behind `detach`, a straight-through or reversed gradient). A check costs one training step. With
    half precision it only warns.

    It also compares `p.grad` with the gradient of the pass, and warns once if they belong to different losses.
    Gradients that were clipped, or come from other random numbers (dropout), are no reason.

    Args:
        every: the number of updates from one check to the next; 0 for the first update and changes only; None for
            never.
    """

    def __init__(self, every: int | None = 0) -> None:
        if not (every is None or (isinstance(every, int) and every >= 0)):
            raise ValueError(f"every must be a whole number of updates, 0 or None, got {every!r}")
        self.every = every
        self.updates = 0
        self.declines = False
        self._model: object = None  # what was checked
        self._warned: set[str] = set()
        self._estimator: Estimator | None = None

    def check(self, optimizer: GenOptimizer, layout: Layout, estimator: Estimator) -> None:
        self._estimator = estimator

    def look(self, seen: Seen, state: State) -> tuple[State, Mapping[str, float]]:
        model = (*_description(seen.line), self._estimator)
        due = self.every is not None and (model != self._model or (self.every and self.updates % self.every == 0))
        if due and _is_finite(seen.measured.parabola):
            self._compare(seen)
            self._model = model
        self.updates += 1
        if self.declines:
            state = seen.before._replace(reason=OTHER_FUNCTION, updated=state.updated)
        return state, {}

    def _compare(self, seen: Seen) -> None:
        parabola, ordinary = seen.measured.parabola, by_backward(seen.line, seen.ranks)
        if ordinary is None:
            logger.debug("an ordinary backward pass cannot be made here, so exact curvature is not checked")
            return
        mean = ordinary.numerator / seen.ranks.size
        if seen.line.layout.forward_communicates and not _differs(parabola.numerator, mean, TOLERANCE):
            ordinary = ordinary._replace(numerator=mean)  # some trainers tell FSDP to add gradients up, not to average
        assert self._estimator is not None
        if self._estimator.differences:
            why = _why_walk_disagrees(seen, ordinary)
            self.declines = why is not None
            if why is not None:
                self._say("declined", f"{why}. Updates are declined and the learning rate stays")
        else:
            self._check_exact(parabola, ordinary)
        self._compare_gradients(parabola, ordinary)

    def _check_exact(self, parabola: Parabola, ordinary: Ordinary) -> None:
        """Raise if jets computed another loss or slope than the ordinary pass."""
        assert self._estimator is not None
        tolerance = 20 * ordinary.rounding
        other_loss = _differs(parabola.loss, ordinary.loss, tolerance)
        other_slope = _differs(parabola.numerator, ordinary.numerator, math.sqrt(tolerance))
        if not (other_loss or other_slope):
            return
        text = (
            f"exact curvature does not agree with an ordinary forward and backward pass on the same data: loss "
            f"{parabola.loss:.9g} and {ordinary.loss:.9g}, slope {-parabola.numerator:.9g} and "
            f"{-ordinary.numerator:.9g}. Likely causes: {CAUSES}. "
        )
        if ordinary.rounding < COARSE and self._estimator.fallback:
            raise NeedsForward(text.strip())
        text += "Use curvature='forward', or companions=[gen_dist.SelfCheck(None)] to go on as it is"
        if ordinary.rounding < COARSE:
            raise RuntimeError(text)
        self._say("exact", text)

    def _compare_gradients(self, parabola: Parabola, ordinary: Ordinary) -> None:
        given, own = parabola.gradient_numerator, ordinary.numerator
        apart = abs(given - own) > 0.5 * max(abs(given), abs(own))
        if not apart or ordinary.draws_random_numbers or ordinary.clipped:
            return
        if ordinary.scale > 1:
            text = (
                f"the gradients are {ordinary.scale:.4g} times those of the loss that scheduler.step got: are they "
                "still scaled? Call scaler.unscale_(optimizer) before scheduler.step. Or is that loss a mean where "
                "backward() got a sum?"
            )
        else:
            text = (
                f"the gradients are not those of the loss that scheduler.step got: along the direction it has the "
                f"slope {-own:.3g}, but they say {-given:.3g}. Give scheduler.step the batch and the loss of backward()"
            )
        self._say("gradients", text)

    def _say(self, what: str, text: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            logger.warning("%s (said once)", text)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "declines": self.declines}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.updates, self.declines = int(state_dict["updates"]), bool(state_dict["declines"])

    def __repr__(self) -> str:
        return f"SelfCheck(every={self.every})"


def _description(line: Line) -> tuple[Any, ...]:
    """What a change of is a reason to check again."""
    return line.layout.model.training, sum(len(group.parameters) for group in line.direction)


def _is_finite(parabola: Parabola) -> bool:
    return math.isfinite(parabola.loss) and math.isfinite(parabola.numerator) and parabola.gradients_finite


def _differs(a: float, b: float, tolerance: float) -> bool:
    return not abs(a - b) <= tolerance * max(abs(a), abs(b))


def _why_walk_disagrees(seen: Seen, ordinary: Ordinary) -> str | None:
    """Why the walked line is not the function that training differentiates; None if loss and slope agree.

    Central differences over ever smaller steps: two that follow each other differ by what the function bends or jumps
    between them. The smallest ones that rise above rounding decide: larger ones may leave the slope behind.
    """
    steps = [seen.probe * 4.0**-k for k in range(SIZES)]
    losses, rounding = walk_over_ranks(seen.line, [0.0, *steps, *(-h for h in steps)], seen.ranks)
    here, ahead, behind = losses[0], losses[1 : SIZES + 1], losses[SIZES + 1 :]
    if _differs(here, ordinary.loss, 20 * max(rounding, ordinary.rounding)):
        return f"at the same weights the loss is {here:.9g} and {ordinary.loss:.9g}. Likely causes: {CAUSES}"
    slopes = [(b - a) / (2 * h) for a, b, h in zip(ahead, behind, steps, strict=True)]
    noise = 2 * max(rounding, ordinary.rounding) * abs(here)
    for wide, near, h in reversed([*zip(slopes, slopes[1:], steps[1:], strict=False)]):
        largest = max(abs(near), abs(ordinary.numerator))
        if noise / h <= TOLERANCE * largest:  # the smallest step that rises above rounding
            uncertain = 2 * abs(wide - near) + noise / h
            if abs(near - ordinary.numerator) > TOLERANCE * largest + uncertain:
                return (
                    "along the direction the loss has another slope than its gradient says, so finite differences "
                    "measure another function than the one trained: a target from the same weights behind detach() or "
                    "no_grad, a reversed or straight-through gradient? Use curvature='exact', which follows what "
                    "autograd does, if the model's operators allow it"
                )
            break
    return None
