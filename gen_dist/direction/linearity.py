"""Which optimizers have a direction: those whose step is the rate times something that does not depend on it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gen_dist.direction.trial import Group, Trial

__all__ = ["check_linearity", "refuse_by_name"]

REFUSED = {
    "LBFGS": "searches along its direction itself",
    "Rprop": "sets a step size for each weight from signs alone, not from lr",
    "ASGD": "averages and decays with a rate of its own",
    "Adafactor": "takes the smaller of lr and 1/sqrt(step)",
}
INSTEAD = "use SGD, Adam, AdamW, RMSprop, Adagrad, NAdam, RAdam or Muon"

KNOWN = [
    getattr(torch.optim, name, None)
    for name in "Adadelta Adagrad Adam AdamW Adamax Muon NAdam RAdam RMSprop SGD SparseAdam".split()
]

LEAST_STEPS = 26  # beyond rectification, and the periods of lookahead in use
FEW_STEPS = 6  # of the optimizers that the tests of this library try at length
MOST_STEPS = 101  # beyond the period that a setting may be

_verdicts: dict[Any, str | None] = {}  # what an earlier trial found, by class and settings


def refuse_by_name(kind: type[Optimizer]) -> None:
    """Raise `TypeError` for an optimizer of torch that is known to have no direction, and for its subclasses."""
    for ancestor in kind.__mro__:
        if ancestor.__module__.startswith("torch.optim") and ancestor.__name__ in REFUSED:
            raise TypeError(
                f"{kind.__name__} {REFUSED[ancestor.__name__]}, so its step is not lr times a direction: {INSTEAD}"
            )


def check_linearity(kind: Any, optimizer: Optimizer) -> None:
    """Raise `TypeError` unless steps along held directions do what the optimizer's own steps do.

    A held direction is found by a step at a huge rate, from weights that come back. So neither the direction nor what
    the optimizer keeps may depend on the rate, or on the weights after the step. Both ways are tried side by side on
    weights of their own, with the groups' settings. `kind` is the class to try, with the defaults of `optimizer`.
    """
    if not all("lr" in group for group in getattr(optimizer, "param_groups", [{}])):
        raise TypeError(f"{kind.__name__} has no parameter groups with a learning rate lr to set: {INSTEAD}")
    arguments, groups = _arguments(kind, optimizer), _groups(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    device = next((p.device for p in parameters if p.device.type != "meta"), torch.device("cpu"))
    dtypes = sorted({p.dtype for p in parameters if p.dtype.is_floating_point} or {torch.float32}, key=str)
    key: Any = (kind, kind.step, repr(arguments), repr(groups), tuple(dtypes), device.type)
    if key not in _verdicts or not _is_plain([arguments, *groups]):
        _verdicts[key] = _verdict(kind, arguments, groups, dtypes, device)
    if (verdict := _verdicts[key]) is not None:
        raise TypeError(verdict)


def _verdict(
    kind: Any, arguments: dict[str, Any], groups: list[Group], dtypes: list[torch.dtype], device: torch.device
) -> str | None:
    """The message with which an optimizer is refused, or None."""

    def make(groups: list[dict[str, Any]]) -> Optimizer:
        made: Optimizer = kind(groups, **{name: _copied(value) for name, value in arguments.items()})
        return made

    sparse = issubclass(kind, torch.optim.SparseAdam)
    trial = Trial(make, groups, device, sparse)
    known = kind in KNOWN
    # float64 tells small differences from rounding; the others show what an optimizer does in low precision only
    for dtype in dtypes if known else dict.fromkeys([torch.float64, *dtypes]):
        try:
            difference = _difference(trial, dtype, FEW_STEPS if known else _steps(arguments, groups))
        except Exception as error:
            if dtype not in dtypes:  # some optimizers do not know float64
                continue
            return (
                f"{kind.__name__} could not be tried on a small problem ({type(error).__name__}: {error}), so it is "
                f"not known whether its step is lr times a direction: {INSTEAD}"
            )
        if difference is not None:
            return f"{kind.__name__}'s step is not lr times a direction ({difference}): {INSTEAD}"
    return None


def _difference(trial: Trial, dtype: torch.dtype, steps: int) -> str | None:
    try:
        return trial.difference(dtype, steps, complete=False)
    except Exception:  # an optimizer may need all gradients; training gives them, then
        return trial.difference(dtype, steps, complete=True)


def _steps(arguments: dict[str, Any], groups: list[Group]) -> int:
    """How long to try: twice any whole number among the settings, which may be a period, as far as is quick."""
    settings = [*arguments.values(), *(value for group in groups for value in group.settings.values())]
    numbers = [2 * n + 1 for n in settings if isinstance(n, int) and 2 * n + 1 <= MOST_STEPS]
    return max([LEAST_STEPS, *numbers])


def _arguments(kind: Any, optimizer: Optimizer) -> dict[str, Any]:
    """The defaults of an optimizer, as far as its constructor takes them, and what it keeps under the names of others.

    >>> sorted(_arguments(torch.optim.SGD, torch.optim.SGD([torch.zeros(1)], lr=0.1)))[:3]
    ['dampening', 'differentiable', 'foreach']
    """
    signature = inspect.signature(kind.__init__).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.values())
    kept = {name: vars(optimizer)[name] for name in [*signature][2:] if name in vars(optimizer)}
    return {
        **kept,
        **{name: value for name, value in optimizer.defaults.items() if takes_any or name in signature},
    }


def _groups(optimizer: Optimizer) -> list[Group]:
    """The optimizer's groups, those with the same settings once."""
    groups: dict[str, Group] = {}
    for group in optimizer.param_groups:
        # numbers that are no defaults are counters of the optimizer's own
        settings = {name: _copied(v) for name, v in group.items() if name in optimizer.defaults or _is_flag(name, v)}
        settings["lr"] = torch.ones_like(group["lr"]) if isinstance(group["lr"], Tensor) else 1.0
        settings.pop("initial_lr", None)
        dimensions = {p.ndim for p in group["params"]}
        seen = groups.setdefault(repr(settings), Group(settings, ()))
        groups[repr(settings)] = Group(settings, tuple(sorted({*seen.dimensions, *dimensions})))
    return list(groups.values())


def _is_flag(name: str, value: Any) -> bool:
    return isinstance(value, bool | str) and name not in ("params", "param_names")


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _is_plain(value: Any) -> bool:
    """Whether the text of a value tells all of it."""
    return all(
        isinstance(leaf, int | float | complex | str | torch.dtype | None)
        or (isinstance(leaf, Tensor) and leaf.ndim == 0)
        for leaf in _leaves(value)
    )


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _leaves(each)
    else:
        yield value
