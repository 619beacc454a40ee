"""Ways to train a model in the quality benchmark, one class each: what happens around a step, and what is read out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from unittest.mock import patch

import torch
from quality_rivals import ScheduleFreePlus
from quality_tasks import State, Task
from torch import Tensor, nn

import gen_dist as gen
from gen_dist.averaging import AveragedWeights
from gen_dist.parallel import Layout
from gen_dist.policy import auto

LAST, AVERAGED = "last", "averaged"


def copied(model: nn.Module) -> State:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


class Training:
    """A model in training at a rate that stays; the methods differ from it in a line or two.

    `reading_seconds` is the time that went into weights besides the last ones. `shrunk` is the factor by which clipping
    shortened the last gradient.
    """

    def __init__(self, task: Task, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.task, self.model, self.optimizer = task, model, optimizer
        self.reading_seconds = 0.0
        self.shrunk = 1.0

    def step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        loss = self.task.loss(self.model(x), y)
        loss.backward()
        self.shrunk = self.task.clipped(self.model)
        self.before_step(x, y, loss)
        self.optimizer.step()
        self.after_step()

    def before_step(self, x: Tensor, y: Tensor, loss: Tensor) -> None: ...

    def after_step(self) -> None: ...

    def rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def readings(self) -> dict[str, State]:
        """The weights that the method would hand over, by name."""
        return {LAST: copied(self.model)}


class Constant(Training):
    """One rate; and beside it the growing-window average, which changes nothing in the training."""

    def __init__(self, task: Task, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(task, model, optimizer)
        self.average = AveragedWeights(Layout(model), optimizer, gen.Averaging(power=8, momentum=0))

    def after_step(self) -> None:
        start = time.process_time()
        self.average.update()
        self.reading_seconds += time.process_time() - start

    def readings(self) -> dict[str, State]:
        with self.average.in_place():
            averaged = copied(self.model)
        return {LAST: copied(self.model), AVERAGED: averaged}


class Decayed(Training):
    """The rate follows a curve from 0 to 1, the horizon, which has to be known."""

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        decay: Callable[[float], float],
        steps: int,
    ) -> None:
        super().__init__(task, model, optimizer)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: decay(step / steps))

    def after_step(self) -> None:
        self.schedule.step()


class Switched(Training):
    """An optimizer that keeps two sequences of weights: those that it trains, and those to hand over."""

    def __init__(self, task: Task, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(task, model, optimizer)
        self.switch(training=True)

    def switch(self, training: bool) -> None:
        """By the names that all such packages use."""
        getattr(self.optimizer, "train" if training else "eval")()

    def readings(self) -> dict[str, State]:
        self.switch(training=False)
        return super().readings()


class Polyak(Switched):
    """ScheduleFree+, whose step needs the loss, and the gradient's size before it was clipped."""

    optimizer: ScheduleFreePlus

    def before_step(self, x: Tensor, y: Tensor, loss: Tensor) -> None:
        self.optimizer.see(float(loss.detach()), self.shrunk)

    def rate(self) -> float:
        return self.optimizer.rate


class Distance(Training):
    """An optimizer that estimates the distance `d` to the solution, and multiplies its rate by it."""

    def rate(self) -> float:
        return super().rate() * float(self.optimizer.param_groups[0]["d"])


class SwitchedDistance(Switched, Distance):
    """Such an optimizer that keeps two sequences of weights as well."""


class DoG(Constant):
    """Distance over gradients, averaged: the growing window is the one of its authors' PolynomialDecayAverager."""

    def rate(self) -> float:
        return float(self.optimizer.param_groups[0]["eta"][0])


class GenOptim(Training):
    """The authors' package, at every eighth step, as its documentation says."""

    def __init__(self, task: Task, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        from GeN import lr_parabola

        super().__init__(task, model, optimizer)
        self.lr_parabola = lr_parabola
        self.steps = 0

    def before_step(self, x: Tensor, y: Tensor, loss: Tensor) -> None:
        self.steps += 1
        if self.steps % 8 == 0:
            self.lr_parabola(
                self.model,
                self.optimizer,
                self.task.loss,
                tr_iter=iter([(x, y)]),
                device="cpu",
                task="image_cls",  # that is: a batch is a pair
                lr_factor=[-1, 0, 1],
            )


class Scheduled(Training):
    """By a scheduler of this package; with other values of the constants of `gen_dist.policy.auto`."""

    def __init__(self, task: Task, scheduler: gen.GenScheduler, constants: Mapping[str, float] | None = None) -> None:
        super().__init__(task, scheduler.model, scheduler.optimizer)
        self.scheduler = scheduler
        self.constants = constants or {}

    def before_step(self, x: Tensor, y: Tensor, loss: Tensor) -> None:
        with patch.dict(vars(auto), self.constants):
            self.scheduler.step(x, y, loss=loss)

    def readings(self) -> dict[str, State]:
        readings = super().readings()
        if self.scheduler.average is not None:
            readings[AVERAGED] = self.scheduler.averaged_state_dict()
        return readings
