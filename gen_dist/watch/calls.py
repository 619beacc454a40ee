"""How a script calls: in which order, how often, and whether something else sets the learning rate too."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from torch import Tensor

from gen_dist.direction import GenOptimizer

__all__ = ["Calls"]

logger = logging.getLogger("gen_dist")

ORDER = "type loss.backward(), then scheduler.step(x, y), then optimizer.step(), then optimizer.zero_grad()"


class Calls:
    """Checks the calls of a script, from one `scheduler.step` to the next.

    A call that cannot be meant raises `ValueError`. One that may be meant is warned of once, with the remedy.
    """

    def __init__(self, optimizer: GenOptimizer) -> None:
        self.optimizer = optimizer
        self.steps: int | None = None  # of the optimizer, at the last update whose step should have come since
        self.rates: Sequence[float] = ()  # that were set last
        self._said: set[str] = set()

    def check_unused(self, wrapped: bool) -> None:
        """Check that no step has used the gradients, before they are averaged.

        With a model that is `wrapped` this only warns: its wrapper may write gradients without a trace.
        """
        if self.optimizer.has_used_gradients():
            said = f"optimizer.step() has already used these gradients, so this call is too late: {ORDER}"
            if not wrapped:
                raise ValueError(said)
            self._say(said)

    def check_gradients(self, parameters: Sequence[Tensor], wrapped: bool) -> None:
        """Check that there are gradients, after they are averaged.

        With a model that is `wrapped` this only warns: a rank may hold empty shards.
        """
        if not any(p.grad is not None for p in parameters):
            said = f"no parameter has a gradient: {ORDER}"
            if not wrapped:
                raise ValueError(said)
            self._say(said)

    def check_repeated(self, repeated: bool) -> None:
        """Check that the losses of several closures, or of batches with their own loss, differ."""
        if repeated:
            self._say(
                "the micro-batches given to scheduler.step have bitwise equal losses: a closure that a loop makes sees "
                "the last batch of the loop. Give the batches themselves, scheduler.step(batches=[batch1, batch2]), or "
                "bind them: lambda x=x, y=y: criterion(model(x), y)"
            )

    def check_since_last(self) -> None:
        """Check what happened since the last call."""
        if self.steps is not None and self.optimizer.steps == self.steps:
            self._say(
                "scheduler.step was called again without optimizer.step() in between, and each call advances the "
                "optimizer's state. For several micro-batches call it once, before optimizer.step(): "
                "scheduler.step(batches=[(x1, y1), ...])"
            )
        groups = self.optimizer.param_groups[: len(self.rates)]
        for group, rate in zip(groups, self.rates, strict=False):
            present = group["lr"]
            on_the_host = not isinstance(present, Tensor) or present.device.type == "cpu"
            if on_the_host and not math.isclose(float(present), rate, rel_tol=1e-5):
                self._say(
                    f"something else set the learning rate to {float(present):.3g}, after this scheduler had set it to "
                    f"{rate:.3g}: a schedule that is left in the script? Remove it: two cannot set the same rate"
                )

    def note(self, rates: Sequence[float], expects_step: bool) -> None:
        """Note the rates that were set, and whether a step of the optimizer should follow."""
        self.rates = rates
        self.steps = self.optimizer.steps if expects_step else None

    def forget(self) -> None:
        """Forget the last call: another state was loaded."""
        self.rates, self.steps = (), None

    def _say(self, text: str) -> None:
        kind = text[:20]
        if kind not in self._said:
            self._said.add(kind)
            logger.warning("%s (said once)", text)
