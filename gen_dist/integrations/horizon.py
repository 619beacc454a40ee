"""The number of steps of a run, which a trainer knows, for the scheduler that its user has chosen."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import partial
from typing import Any

from gen_dist.integrations.at_step import SchedulerFactory
from gen_dist.policy import Auto
from gen_dist.recipes import AutoGen

__all__ = ["with_horizon"]


def with_horizon(scheduler: SchedulerFactory | None, steps: int | None) -> SchedulerFactory:
    """Return the factory, with `total_steps=steps` where it takes that and its user has not set it.

    The default is `AutoGen`. A rule that was given to `AutoGen` gets the number of steps unless it has one. Write
    `functools.partial(AutoGen, total_steps=None)` for a run without a horizon.
    """
    make: Any = scheduler if scheduler is not None else AutoGen
    given = make.keywords if isinstance(make, partial) else {}
    if steps is None or "total_steps" in given or not _takes(make, "total_steps"):
        return make
    if isinstance(rule := given.get("rule"), Auto):
        return partial(make, rule=replace(rule, total_steps=rule.total_steps or steps))
    return partial(make, total_steps=steps)


def _takes(factory: Any, name: str) -> bool:
    """Whether a function has this parameter, or a class that passes what it does not know on to the class above."""
    of = factory.func if isinstance(factory, partial) else factory
    functions = (
        [vars(each)["__init__"] for each in of.__mro__ if "__init__" in vars(each)] if inspect.isclass(of) else [of]
    )
    for function in functions:
        parameters = inspect.signature(function).parameters
        if name in parameters:
            return True
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
            return False
    return False
