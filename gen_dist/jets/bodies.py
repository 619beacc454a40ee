"""PyTorch's own Python functions, run so that a function mode sees what their code calls.

A function mode is off while it handles a function. Most functions need nothing else, but some stop gradients in their
code: `gumbel_softmax` detaches, `embedding` renormalises without gradients. These run with the mode on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

import torch

__all__ = ["body_of"]

STOPS = frozenset("detach detach_ data no_grad inference_mode set_grad_enabled".split())

# By these, a function asks whether to hand itself over to a mode. Its body must not, since the mode is running it.
CHECKS = dict.fromkeys(
    "has_torch_function has_torch_function_unary has_torch_function_variadic".split(), lambda *_: False
)


@functools.cache
def body_of(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return the function without its check for modes, or None if its code stops no gradient."""
    if function is torch.autograd.grad:  # it may run the user's code, where activations are checkpointed
        return _without_check(function)
    return _without_check(function) if isinstance(function, FunctionType) and _stops_gradients(function) else None


def _without_check(function: Any) -> Callable[..., Any]:
    namespace = {**function.__globals__, **CHECKS}
    body = FunctionType(function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


def _stops_gradients(function: FunctionType) -> bool:
    """Whether the code of the function, or of those of its module that it calls, names what stops a gradient."""
    seen, waiting = {function}, [function]
    while waiting:
        names = set(_names(waiting.pop().__code__))
        if names & STOPS:
            return True
        for name in names:
            called = function.__globals__.get(name)
            if isinstance(called, FunctionType) and called.__module__ == function.__module__ and called not in seen:
                seen.add(called)
                waiting.append(called)
    return False


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
