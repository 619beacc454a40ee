"""The user's own `autograd.Function`s: jets follow the forward code where its derivative is the gradient it defines.

A function may define any gradient: a straight-through estimator, a reversed or clipped one. Training moves along that
gradient, so a function is followed only if the two agree at the point of the measurement, for cotangents of any size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from gen_dist.jets.general import jets_in, with_jets_replaced
from gen_dist.jets.jet import Jet, UnsupportedOperation, derivatives
from gen_dist.jets.verification import random_generators
from gen_dist.torch_private import plain_autograd, plain_values

__all__ = ["follow", "is_known", "trust"]

Function = TypeVar("Function", bound=type)

_trusted: set[type] = set()


def trust(function: Function) -> Function:
    """Take the gradient of an `autograd.Function` to be that of its forward code, without a check; also a decorator.

    >>> import torch
    >>> from gen_dist import jets
    >>> @jets.trust
    ... class Cube(torch.autograd.Function):
    ...     @staticmethod
    ...     def forward(ctx, x):
    ...         return x**3

    Raises:
        TypeError: it is no class derived from `torch.autograd.Function`.
    """
    if not (isinstance(function, type) and issubclass(function, torch.autograd.Function)):
        raise TypeError(f"trust() takes a class derived from torch.autograd.Function, not {function!r}")
    _trusted.add(function)
    return function


def is_known(function: type) -> bool:
    """Whether its gradient is that of its forward code: PyTorch's own functions, and those that the user trusts."""
    own = function.__module__.startswith("torch.") and function.__name__ != "CrossMapLRN2d"  # which writes into `out=`
    return own or function in _trusted


def follow(function: type, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Return what the forward code returns for jets.

    Raises:
        UnsupportedOperation: the function defines another gradient, or one that cannot be compared.
    """
    name = f"the custom autograd.Function '{function.__name__}'"
    generators = random_generators(args, kwargs)
    before = [x.get_state() for x in generators]
    given = args[1:] if args and isinstance(args[0], torch.autograd.function.FunctionCtx) else args
    kept = with_jets_replaced(given, lambda jet: Jet(jet.value.clone(), *jet.current()))  # it may write in place
    try:
        result = forward(*args, **kwargs)
    except UnsupportedOperation:
        raise
    except Exception as error:
        raise UnsupportedOperation(name, f"has forward code that jets cannot run ({error})") from error
    after = [x.get_state() for x in generators]
    try:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)
        agrees = _defines_its_gradient(function, kept, result)
    except Exception as error:
        raise UnsupportedOperation(name, f"has a gradient that could not be compared ({error})") from error
    finally:
        for generator, state in zip(generators, after, strict=True):
            generator.set_state(state)
    if not agrees:
        raise UnsupportedOperation(name, "defines another gradient than that of its forward code")
    return result


# The sizes of the cotangents: a gradient that is clipped is not linear in them.
SIZES = (1e-3, 1.0, 1e3)


def _defines_its_gradient(function: Any, given: Any, result: Any) -> bool:
    """Compare `<u, y'>`, from the forward code, with `<v, x'>`, from the gradient `v` for the cotangent `u`."""
    jets = list(jets_in(given))
    with plain_autograd():
        points = [jet.value.detach().requires_grad_() for jet in jets]
        remaining = iter(points)
        again = function.apply(*with_jets_replaced(given, lambda _: next(remaining).clone()))
        pairs = [
            (y, derivatives(jet)[1]) for y, jet in zip(_tuple(again), _tuple(result), strict=True) if _is_followed(y)
        ]
        if not pairs:  # as autograd has it, the result does not move
            return not any(True for _ in jets_in(result))
        generator = torch.Generator().manual_seed(0)
        outputs, agreed = [y for y, _ in pairs], []
        for size in SIZES:
            cotangents = [
                size * torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, y.dtype)
                for y in outputs
            ]
            gradients = torch.autograd.grad(outputs, points, cotangents, retain_graph=True, allow_unused=True)
            with plain_values():
                forwards = [_inner(u, y) for u, (_, y) in zip(cotangents, pairs, strict=True)]
                backwards = [_inner(v, jet.velocity) for v, jet in zip(gradients, jets, strict=True)]
                agreed.append(_close(forwards, backwards, max(torch.finfo(y.dtype).eps for y in outputs)))
        return all(agreed)  # after all of them: a backward pass may communicate


def _tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def _is_followed(y: Any) -> bool:
    return isinstance(y, Tensor) and y.requires_grad


def _inner(a: Tensor | None, b: Tensor | None) -> tuple[float, float]:
    """Return the inner product and the size of its terms."""
    if a is None or b is None:
        return 0.0, 0.0
    terms = a.double() * b.double()
    return terms.sum().item(), torch.linalg.vector_norm(terms).item()


def _close(a: list[tuple[float, float]], b: list[tuple[float, float]], rounding: float) -> bool:
    size = sum(size for _, size in (*a, *b))
    return abs(sum(x for x, _ in a) - sum(x for x, _ in b)) <= 30 * rounding**0.75 * size
