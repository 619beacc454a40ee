"""Which weights a trainer evaluates, saves and hands over: the averaged ones, where its scheduler keeps averages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from gen_dist.averaging import AveragedWeights
from gen_dist.integrations.at_step import RateAtStep
from gen_dist.scheduler import GenScheduler

__all__ = ["RateAndAverages"]


TRAINING_WEIGHTS = "training_weights"  # in the state of a scheduler


class RateAndAverages(RateAtStep):
    """A `RateAtStep` for a trainer that evaluates the model while it trains it, and saves and hands over the result.

    The result is the averaged weights, so the trainer evaluates and saves the model within `result_in_place()`, and
    calls `end()` when training ends. The weights in training stand in `state_dict()`, and come back when a scheduler is
    attached: a resumed run goes on with them, bit for bit. A checkpoint so has the trained weights three times: the
    averages as the model, and in their own precision, and the weights in training. Statistics of batch norms stay those
    of the training.

    Averages of a sharded model are not in checkpoints (see `RateAtStep`), and neither are its weights in training: a
    resumed run begins both anew from the checkpoint's model.
    """

    _resumed: list[Tensor] | None = None  # weights in training to put in place once there is a scheduler
    _aside: list[Tensor] | None = None  # weights in training while others are in the model
    _ended = False

    @property
    def averages(self) -> AveragedWeights | None:
        """The averages of the run that goes on, if there are some yet."""
        average = self.scheduler.average if self.attached and not self._ended else None
        return average if average is not None and average.count else None

    @contextlib.contextmanager
    def result_in_place(self) -> Iterator[None]:
        """Put the averaged weights, if there are any, in the model for the block, which may stand in another such."""
        averages = self.averages
        if averages is None or self._aside is not None:
            yield
            return
        with averages.in_place() as self._aside:
            try:
                yield
            finally:
                self._aside = None

    @contextlib.contextmanager
    def checkpointed(self) -> Iterator[None]:
        """Put in the model what a checkpoint saves besides the model that is handed over, to resume from.

        The weights in training, but of a sharded model the averages, since `state_dict()` has no place for either.
        """
        averages = self.averages
        sharded = averages is not None and averages.layout.gradient_is_sharded(averages.parameters)
        with self.result_in_place() if sharded else contextlib.nullcontext():
            yield

    def end(self, hand_over: bool = True) -> None:
        """End the run; the averaged weights stay in the model unless something else, such as a better one, is in it."""
        if (averages := self.averages) is not None:
            self._aside = averages.weights()  # a checkpoint may yet be saved
            if hand_over:
                averages.put_in_place()
        self._ended = True

    def attach(self, scheduler: GenScheduler, stepped: Optimizer | None = None) -> None:
        super().attach(scheduler, stepped)
        self._aside, self._ended = None, False
        self._resume()

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if not self.attached:
            return state
        weights = self._aside
        if weights is None and self.averages is not None:
            weights = self.averages.weights()
        return state | {TRAINING_WEIGHTS: weights if state["average"] is not None else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict.get(TRAINING_WEIGHTS)
        super().load_state_dict(state_dict)
        self._resume()

    def _resume(self) -> None:
        if self.attached and self._resumed and (average := self.scheduler.average) is not None:
            average.put(self._resumed)
            self._resumed = None
