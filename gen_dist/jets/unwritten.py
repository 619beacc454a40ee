"""Operators that nobody has written a rule for: three ways through them, of which two are held to differences first.

An operator that PyTorch implements by calling others is run so, as autograd sees it too. Any other operator is
differentiated by autograd, or runs by PyTorch's decomposition in Python where autograd cannot differentiate twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from gen_dist.jets.general import by_autograd, by_autograd_elementwise, jets_in
from gen_dist.jets.jet import UnsupportedOperation, values
from gen_dist.jets.registry import rule
from gen_dist.jets.verification import kind_of_call, verified
from gen_dist.torch_private import Operator, decompositions, is_composite

__all__ = ["through_autograd", "through_unwritten"]

# Parts of names. To verify such an operator, ranks would have to call it equally often.
COMMUNICATING = ("c10d", "symm_mem")

_ways: dict[Any, Callable[..., Any]] = {}  # what has been verified so far, by operator and kind of call


def through_unwritten(operator: Operator, *args: Any, **kwargs: Any) -> Any:
    """Return what the operator does to jets, as an operator rule does.

    Raises:
        UnsupportedOperation: no way is known to be right. The message names this operator, not a step of it.
    """
    if any(jet.value.is_meta for jet in jets_in((args, kwargs))):  # the shape of a result is wanted
        return operator(*values(args), **values(kwargs))
    if is_composite(operator):
        return _stepwise(operator, operator.decompose, *args, **kwargs)
    if any(name in operator.name() for name in COMMUNICATING):
        raise UnsupportedOperation(operator, "communicates, and has no operator rule")
    key = operator, kind_of_call(args, kwargs)
    if key in _ways:
        return _ways[key](*args, **kwargs)
    refusals: list[UnsupportedOperation] = []
    for way in _ways_through(operator, args, kwargs):
        try:
            result = way(*args, **kwargs)
        except UnsupportedOperation as error:
            refusals.append(error)
            continue
        right = verified(operator, way, args, kwargs)
        if right:
            _ways[key] = way
        if right is not False:
            return result
        refusals.append(UnsupportedOperation(operator, "has a derivative that differences do not confirm"))
    raise refusals[0]


def _ways_through(operator: Operator, args: Any, kwargs: Any) -> Iterator[Callable[..., Any]]:
    yield functools.partial(through_autograd, operator)
    yield functools.partial(by_autograd, operator, 0.0)
    steps = decompositions.get(operator)
    if steps is not None and torch.Tag.nondeterministic_seeded not in operator.tags:  # it draws other numbers
        yield functools.partial(_stepwise, operator, steps)


@rule("binary_cross_entropy", "atan2", "polar", "xlogy")
def through_autograd(operator: Operator, *args: Any, **kwargs: Any) -> Any:
    """The general rule, without a check of its own: for operators whose edges the tests hold to double backward."""
    real = not any(jet.is_complex() for jet in jets_in((args, kwargs)))
    if real and torch.Tag.pointwise in operator.tags:
        return by_autograd_elementwise(operator, *args, **kwargs)
    return by_autograd(operator, 1.0, *args, **kwargs)


def _stepwise(operator: Operator, steps: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        result = steps(*args, **kwargs)
    except UnsupportedOperation as error:  # it names a step, which the user may not know
        raise UnsupportedOperation(
            operator, f"calls what has no verified second derivative ({error.reason})"
        ) from error
    if result is NotImplemented:
        raise UnsupportedOperation(operator)
    return result
