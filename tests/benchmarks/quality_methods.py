"""The methods of the quality benchmark by name: the grids that are tuned, the rivals, and AutoGen with its variants."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from quality_ablations import ABLATED, WithoutBudget, WithoutReturn
from quality_rivals import ScheduleFreePlus
from quality_tasks import SGD_RATES, TASKS, Task
from quality_training import (
    AVERAGED,
    LAST,
    Constant,
    Decayed,
    Distance,
    DoG,
    GenOptim,
    Polyak,
    Scheduled,
    Switched,
    SwitchedDistance,
    Training,
)
from torch import nn

import gen_dist as gen

__all__ = [
    "AVERAGED",
    "DECAYS",
    "GRID",
    "LAST",
    "METHODS",
    "UNTUNED_METHODS",
    "UNTUNED_RATES",
    "Training",
    "takes_part",
]

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
RULE = {field.name for field in dataclasses.fields(gen.Auto)}
UNTUNED = 1e-3  # PyTorch's default for AdamW and SGD, where a method wants some rate to begin with

Start = Callable[[Task, nn.Module, int], Training]  # from task, model and number of steps

WARM_UP = 0.1  # of the steps, as most scripts have it
UNTUNED_RATES = {"constant": (1e-3, 3e-3, 1e-2), "warmed": (3e-4, 1e-3)}  # of AdamW: rivals on every task
DECAYS: dict[str, Callable[[float], float] | None] = {
    "constant": None,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "warmed": lambda done: min(done / WARM_UP, (1 - done) / (1 - WARM_UP)),  # as scripts have it, then linear
}


def make_adamw(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=rate)


def make_lion(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    from lion_pytorch import Lion

    return Lion(model.parameters(), lr=rate)


def make_muon(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Muon for matrices, and its AdamW for embeddings and vectors."""
    from pytorch_optimizer import Muon

    named = dict(model.named_parameters())
    matrices = [name for name, p in named.items() if p.ndim >= 2 and "emb" not in name]
    groups = [
        {"params": [named[name] for name in matrices], "lr": rate, "use_muon": True},
        {"params": [p for name, p in named.items() if name not in matrices], "lr": rate, "use_muon": False},
    ]
    return gen.make_gen_optimizer(Muon, groups, lr=rate)


def make_sgd(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)


def tuned(make: Callable[[nn.Module, float], torch.optim.Optimizer], rate: float, decay: str) -> Start:
    def start(task: Task, model: nn.Module, steps: int) -> Training:
        optimizer, shape = make(model, rate), DECAYS[decay]
        return Constant(task, model, optimizer) if shape is None else Decayed(task, model, optimizer, shape, steps)

    return start


def schedule_free(rate: float) -> Start:
    def start(task: Task, model: nn.Module, steps: int) -> Training:
        import schedulefree

        return Switched(task, model, schedulefree.AdamWScheduleFree(model.parameters(), lr=rate))

    return start


def schedule_free_plus(warm_up: float = 0.0) -> Start:
    def start(task: Task, model: nn.Module, steps: int) -> Training:
        return Polyak(task, model, ScheduleFreePlus(model.parameters(), warm_up=round(warm_up * steps)))

    return start


def prodigy_plus(task: Task, model: nn.Module, steps: int) -> Training:
    import prodigyplus

    return SwitchedDistance(task, model, prodigyplus.ProdigyPlusScheduleFree(model.parameters()))


def prodigy(task: Task, model: nn.Module, steps: int) -> Training:
    import prodigyopt

    return Distance(task, model, prodigyopt.Prodigy(model.parameters()))


def d_adapt_adam(task: Task, model: nn.Module, steps: int) -> Training:
    import dadaptation

    return Distance(task, model, dadaptation.DAdaptAdam(model.parameters()))


def distance_over_gradients(name: str) -> Start:
    """By the class `name` of the authors' package, with the first distance that they advise."""

    def start(task: Task, model: nn.Module, steps: int) -> Training:
        import dog

        normalised = any(isinstance(module, BATCH_NORMS) for module in model.modules())
        return DoG(task, model, getattr(dog, name)(model.parameters(), reps_rel=1e-4 if normalised else 1e-6))

    return start


def textbook(task: Task, model: nn.Module, steps: int) -> Training:
    optimizer = gen.as_gen_optimizer(task.optimizer(model, UNTUNED))
    return Scheduled(task, gen.ExactGen(optimizer, model, task.loss, lr_max=1.0))


def autogen(
    horizon: bool = False,
    make: Callable[[nn.Module, float], torch.optim.Optimizer] | None = None,
    kind: type[gen.Auto] = gen.Auto,
    **options: Any,
) -> Start:
    """AutoGen with other values of the rule and of its constants (in capitals), or other options of its own.

    With `horizon` it knows the number of steps, `make` makes another optimizer than the task's, and `kind` is another
    rule.
    """
    values = {name: options.pop(name) for name in list(options) if name in RULE}
    constants = {name: options.pop(name) for name in list(options) if name.isupper()}

    def start(task: Task, model: nn.Module, steps: int) -> Training:
        optimizer = gen.as_gen_optimizer((make or task.optimizer)(model, UNTUNED))
        rule = kind(**values, total_steps=steps if horizon else None)
        return Scheduled(task, gen.AutoGen(optimizer, model, task.loss, rule=rule, **options), constants)

    return start


GRID = {
    f"{name}-{decay}-{rate:g}": tuned(make, rate, decay)
    for name, make, rates in [
        ("adamw", make_adamw, sorted({rate for task in TASKS.values() for rate in task.adamw_rates})),
        ("sgd", make_sgd, SGD_RATES),
    ]
    for decay in DECAYS
    for rate in rates
}
UNTUNED_METHODS: dict[str, Start] = {
    "schedule-free-0.001": schedule_free(1e-3),
    "schedule-free": schedule_free(2.5e-3),  # its default
    "schedule-free-0.01": schedule_free(1e-2),
    "schedule-free-plus": schedule_free_plus(),
    "schedule-free-plus-warm-up": schedule_free_plus(WARM_UP),
    "prodigy": prodigy,
    "prodigy-plus": prodigy_plus,
    "d-adapt-adam": d_adapt_adam,
    "dog": distance_over_gradients("DoG"),
    "ldog": distance_over_gradients("LDoG"),
    "gen-optim": lambda task, model, steps: GenOptim(task, model, task.optimizer(model, UNTUNED)),
    "textbook": textbook,
    "autogen": autogen(),
    "autogen-adamw": autogen(make=make_adamw),
    "autogen-lion": autogen(make=make_lion),
    "autogen-muon": autogen(make=make_muon),
    "autogen-horizon": autogen(horizon=True),
    "autogen-optimizers-momentum": autogen(momentum="optimizer"),
    "autogen-both-momenta": autogen(average=gen.Averaging(momentum=0.9, power=1, rate_power=2)),
    "autogen-one-probe": autogen(curvature="forward", probes=1),
    "autogen-two-probes": autogen(curvature="forward", probes=2),
    **{
        f"ablation-{name.lower().replace('_', '-')}-{value:g}": autogen(**{name: value})
        for name, values in ABLATED.items()
        for value in values
    },
    "ablation-without-edge": autogen(edge=1e9, far=math.inf),
    "ablation-without-budget": autogen(kind=WithoutBudget),
    "ablation-without-return": autogen(kind=WithoutReturn),
}
METHODS = GRID | UNTUNED_METHODS


def takes_part(method: str, task: Task) -> bool:
    """Whether a method suits a task.

    SGD is tuned where it is the task's optimizer, AdamW everywhere, each over the rates that suit the task.
    """
    if method not in GRID:
        return task.sgd or method != "autogen-adamw"
    name, decay, rate = method.split("-", 2)
    if name == "sgd":
        return task.sgd
    return float(rate) in task.adamw_rates or float(rate) in UNTUNED_RATES.get(decay, ())
