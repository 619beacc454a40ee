"""The methods of the quality benchmark: each is a way to train a model, and says which weights to read out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from quality_tasks import ADAMW_RATES, FINE_TUNING_RATES, SGD_RATES, State, Task, cross_entropy
from torch import Tensor, nn

import gen_dist as gen
from gen_dist.averaging import AveragedWeights, Averaging
from gen_dist.parallel import Layout
from gen_dist.policy.rule import Auto

LAST, AVERAGED = "last", "averaged"
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
UNTUNED = 1e-3  # PyTorch's default for AdamW and SGD, where a method wants some rate to begin with


def copied(model: nn.Module) -> State:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


class Training:
    """A model in training at a rate that stays; the methods differ from it in a line or two.

    `reading_seconds` is the time that went into weights besides the last ones.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.reading_seconds = 0.0

    def step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        loss = cross_entropy(self.model(x), y)
        loss.backward()
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

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(model, optimizer)
        self.average = AveragedWeights(Layout(model), list(model.parameters()), Averaging(power=8, momentum=0))

    def after_step(self) -> None:
        start = time.process_time()
        self.average.update()
        self.reading_seconds += time.process_time() - start

    def readings(self) -> dict[str, State]:
        with self.average.in_place():
            averaged = copied(self.model)
        return {LAST: copied(self.model), AVERAGED: averaged}


class Decayed(Training):
    """The rate falls to zero at the horizon, which has to be known."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, decay: Callable[[float], float], steps: int
    ) -> None:
        super().__init__(model, optimizer)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: decay(step / steps))

    def after_step(self) -> None:
        self.schedule.step()


class ScheduleFree(Training):
    def __init__(self, model: nn.Module, **arguments: float) -> None:
        import schedulefree

        self.schedule_free = schedulefree.AdamWScheduleFree(model.parameters(), **arguments)
        self.schedule_free.train()
        super().__init__(model, self.schedule_free)

    def readings(self) -> dict[str, State]:
        self.schedule_free.eval()
        return super().readings()


class Distance(Training):
    """An optimizer that estimates the distance `d` to the solution, and multiplies its rate by it."""

    def rate(self) -> float:
        return super().rate() * float(self.optimizer.param_groups[0]["d"])


class DoG(Constant):
    """Distance over gradients, averaged: the growing window is the one of its authors' PolynomialDecayAverager."""

    def rate(self) -> float:
        return float(self.optimizer.param_groups[0]["eta"][0])


class GenOptim(Training):
    """The authors' package, at every eighth step, as its documentation says."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        from GeN import lr_parabola

        super().__init__(model, optimizer)
        self.lr_parabola = lr_parabola
        self.steps = 0

    def before_step(self, x: Tensor, y: Tensor, loss: Tensor) -> None:
        self.steps += 1
        if self.steps % 8 == 0:
            self.lr_parabola(
                self.model,
                self.optimizer,
                cross_entropy,
                tr_iter=iter([(x, y)]),
                device="cpu",
                task="image_cls",  # that is: a batch is a pair
                lr_factor=[-1, 0, 1],
            )


class Scheduled(Training):
    """By a scheduler of this package."""

    def __init__(self, scheduler: gen.GenScheduler) -> None:
        super().__init__(scheduler.model, scheduler.optimizer)
        self.scheduler = scheduler

    def before_step(self, x: Tensor, y: Tensor, loss: Tensor) -> None:
        self.scheduler.step(x, y, loss=loss)

    def readings(self) -> dict[str, State]:
        readings = super().readings()
        if self.scheduler.average is not None:
            readings[AVERAGED] = self.scheduler.averaged_state_dict()
        return readings


# ------------------------------------------------------------------------------------------- the table of methods

Start = Callable[[Task, nn.Module, int], Training]  # from task, model and number of steps

UNTUNED_RATES = (1e-3, 3e-3, 1e-2)  # of AdamW: rivals in their own right, on every task
DECAYS: dict[str, Callable[[float], float] | None] = {
    "constant": None,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
}


def make_adamw(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=rate)


def make_sgd(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)


def tuned(make: Callable[[nn.Module, float], torch.optim.Optimizer], rate: float, decay: str) -> Start:
    def start(task: Task, model: nn.Module, steps: int) -> Training:
        optimizer, shape = make(model, rate), DECAYS[decay]
        return Constant(model, optimizer) if shape is None else Decayed(model, optimizer, shape, steps)

    return start


def prodigy(task: Task, model: nn.Module, steps: int) -> Training:
    import prodigyopt

    return Distance(model, prodigyopt.Prodigy(model.parameters()))


def d_adapt_adam(task: Task, model: nn.Module, steps: int) -> Training:
    import dadaptation

    return Distance(model, dadaptation.DAdaptAdam(model.parameters()))


def distance_over_gradients(name: str) -> Start:
    """By the class `name` of the authors' package, with the first distance that they advise."""

    def start(task: Task, model: nn.Module, steps: int) -> Training:
        import dog

        normalised = any(isinstance(module, BATCH_NORMS) for module in model.modules())
        return DoG(model, getattr(dog, name)(model.parameters(), reps_rel=1e-4 if normalised else 1e-6))

    return start


def textbook(task: Task, model: nn.Module, steps: int) -> Training:
    optimizer = gen.as_gen_optimizer(task.optimizer(model, UNTUNED))
    return Scheduled(gen.ExactGen(optimizer, model, cross_entropy, lr_max=1.0))


def autogen(
    horizon: str | None = None,
    make: Callable[[nn.Module, float], torch.optim.Optimizer] | None = None,
    groups: bool | str = False,
    averaging: Averaging | None = None,
    **rule: Any,
) -> Start:
    """AutoGen with other values of the rule, or another averaging.

    `horizon` names a decay to zero at the last step, `make` makes another optimizer than the task's, and with `groups`
    it finds a rate for each group: matrices of the first and of the second half of the network, and vectors.
    """

    def start(task: Task, model: nn.Module, steps: int) -> Training:
        optimizer = gen.as_gen_optimizer((make or task.optimizer)(model, UNTUNED))
        if groups:
            regroup(optimizer, model)
        known = {"total_steps": steps, "decay": horizon} if horizon else {}
        options: dict[str, Any] = {"rule": Auto(**rule, **known), "group_rates": groups, "average": averaging}
        return Scheduled(gen.AutoGen(optimizer, model, cross_entropy, **options))

    return start


def regroup(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Give a new optimizer three groups in place of one."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    half = (len(matrices) + 1) // 2
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer.param_groups[0]["params"] = matrices[:half]
    for parameters in (matrices[half:], vectors):
        optimizer.add_param_group({"params": parameters})


GRID = {
    f"{name}-{decay}-{rate:g}": tuned(make, rate, decay)
    for name, make, rates in [
        ("adamw", make_adamw, sorted({*ADAMW_RATES, *FINE_TUNING_RATES})),
        ("sgd", make_sgd, SGD_RATES),
    ]
    for decay in DECAYS
    for rate in rates
}
UNTUNED_METHODS: dict[str, Start] = {
    "schedule-free": lambda task, model, steps: ScheduleFree(model),
    "schedule-free-0.01": lambda task, model, steps: ScheduleFree(model, lr=0.01),
    "prodigy": prodigy,
    "d-adapt-adam": d_adapt_adam,
    "dog": distance_over_gradients("DoG"),
    "ldog": distance_over_gradients("LDoG"),
    "gen-optim": lambda task, model, steps: GenOptim(model, task.optimizer(model, UNTUNED)),
    "textbook": textbook,
    "autogen": autogen(),
    "autogen-adamw": autogen(make=make_adamw),
    "autogen-groups": autogen(groups=True),
    "autogen-groups-diagonal": autogen(groups="diagonal"),
    "autogen-no-momentum": autogen(averaging=Averaging(power=8, momentum=0)),
    "autogen-unsmoothed": autogen(smoothing=0.0),
    "autogen-unlimited-growth": autogen(growth=math.inf),
    "autogen-never-settling": autogen(settle_after=10**9),
    "autogen-never-shrinking": autogen(shrink=1.0),
    "autogen-no-cap": autogen(cap=math.inf),
    "autogen-large-start": autogen(start=0.1),
    "autogen-linear": autogen(horizon="linear"),
    "autogen-cosine": autogen(horizon="cosine"),
}
METHODS = GRID | UNTUNED_METHODS


def takes_part(method: str, task: Task) -> bool:
    """SGD is tuned where it is the task's optimizer, AdamW everywhere, each over the rates that suit the task."""
    if method not in GRID:
        return task.sgd or method != "autogen-adamw"
    name, decay, rate = method.split("-", 2)
    if name == "sgd":
        return task.sgd
    return float(rate) in task.adamw_rates or (decay == "constant" and float(rate) in UNTUNED_RATES)
