"""Which optimizers have a direction: those whose step is the rate times something that does not depend on it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gen_dist.direction.rates import set_rate

__all__ = ["check_linearity", "refuse_by_name"]

REFUSED = {
    "LBFGS": "searches along its direction itself",
    "Rprop": "sets a step size for each weight from signs alone, not from lr",
    "ASGD": "averages and decays with a rate of its own",
    "Adafactor": "takes the smaller of lr and 1/sqrt(step)",
}
INSTEAD = "use SGD, Adam, AdamW, RMSprop, Adagrad, NAdam, RAdam or Muon"


def refuse_by_name(kind: type[Optimizer]) -> None:
    """Raise `TypeError` for an optimizer of torch that is known to have no direction, and for its subclasses."""
    for ancestor in kind.__mro__:
        if ancestor.__module__.startswith("torch.optim") and ancestor.__name__ in REFUSED:
            raise TypeError(
                f"{kind.__name__} {REFUSED[ancestor.__name__]}, so its step is not lr times a direction: {INSTEAD}"
            )


def check_linearity(kind: Any, optimizer: Optimizer) -> None:
    """Raise `TypeError` unless steps are lr times a direction and the state does not depend on lr.

    Tried once, on twelve weights of its own: along one path of weights and gradients, two very different sequences of
    rates must give the same directions. `kind` is the class to try, with the defaults of `optimizer`.
    """
    try:
        slow, fast = (
            _trial_directions(kind, optimizer, rates) for rates in ((1.0, 2.0, 0.5, 1.0), (0.25, 128.0, 16.0, 0.5))
        )
    except Exception as error:
        raise TypeError(
            f"{kind.__name__} could not be tried on a small problem ({type(error).__name__}: {error}), so it is not "
            "known whether its step is lr times a direction: use one of torch.optim's, or SGD with your own gradients"
        ) from error
    if not torch.allclose(slow, fast, rtol=1e-5, atol=1e-9):
        raise TypeError(
            f"{kind.__name__}'s step is not lr times a direction (tried at two rates), so no rate can be chosen for "
            f"it: {INSTEAD}"
        )


def _trial_directions(kind: Any, optimizer: Optimizer, rates: tuple[float, ...]) -> Tensor:
    device = next((p.device for group in optimizer.param_groups for p in group["params"]), torch.device("cpu"))
    weights = torch.linspace(-1.0, 1.0, 12, dtype=torch.float32, device=device).view(4, 3)
    parameter = torch.nn.Parameter(weights.clone())
    trial: Any = kind([parameter], **_arguments(kind, optimizer))
    directions = []
    for step, rate in enumerate(rates):
        gradient = torch.sin(weights * (5 + step)) + 0.1
        parameter.grad = gradient.to_sparse() if isinstance(optimizer, torch.optim.SparseAdam) else gradient
        for group in trial.param_groups:
            set_rate(group, rate * 2**14)
        with torch.no_grad():
            parameter.copy_(weights)
        trial.step()
        directions.append((weights - parameter.detach()) / (rate * 2**14))
        weights = weights - 0.05 * gradient  # the path goes downhill, as training does
    return torch.stack(directions)


def _arguments(kind: Any, optimizer: Optimizer) -> dict[str, Any]:
    """The defaults of an optimizer, as far as its constructor takes them."""
    signature = inspect.signature(kind.__init__).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.values())
    return {
        key: value.clone() if isinstance(value, Tensor) else value
        for key, value in optimizer.defaults.items()
        if takes_any or key in signature
    }
