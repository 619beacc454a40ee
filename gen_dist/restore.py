"""What a step displaces comes back, also after an interrupt in the very moment of putting it back.

`with put_back(restore):` runs `restore` at its end, as `try ... finally` does. An interrupt (Ctrl-C, SIGTERM) can come
at any instruction, in that `finally` too; then `restore` runs where an outer block ends, at the latest that of `whole`,
which stands around a whole step.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ["gradients_kept", "put_back", "whole"]

P = ParamSpec("P")
R = TypeVar("R")


class _Pending(threading.local):
    def __init__(self) -> None:
        self.restores: list[Callable[[], object]] = []


_pending = _Pending()


@contextlib.contextmanager
def put_back(restore: Callable[[], object]) -> Iterator[None]:
    """Run `restore` at the end, or a little later if an interrupt keeps it from that. It may run twice."""
    depth = len(_pending.restores)
    _pending.restores.append(restore)
    try:
        yield
    finally:
        if restore in _pending.restores:  # otherwise it has run, and this is what an interrupt left of the block
            _run_down_to(depth)


@contextlib.contextmanager
def gradients_kept(parameters: Sequence[Tensor]) -> Iterator[None]:
    """The gradients are as they were afterwards: the same tensors, which may be views of DDP's buckets, bit for bit."""
    gradients = [p.grad for p in parameters]
    contents = [None if g is None else g.detach().clone() for g in gradients]

    @torch.no_grad()
    def restore() -> None:
        for parameter, gradient, content in zip(parameters, gradients, contents, strict=True):
            parameter.grad = gradient
            if gradient is not None and content is not None:
                gradient.copy_(content)

    with put_back(restore):
        yield


def whole(step: Callable[P, R]) -> Callable[P, R]:
    """Let a step that ends early leave nothing displaced."""

    @functools.wraps(step)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        enabled, depth = torch.is_grad_enabled(), len(_pending.restores)
        try:
            return step(*args, **kwargs)
        finally:
            _run_down_to(depth)
            torch._C._set_grad_enabled(enabled)

    return guarded


def _run_down_to(depth: int) -> None:
    while len(_pending.restores) > depth:
        _pending.restores[-1]()
        _pending.restores.pop()
