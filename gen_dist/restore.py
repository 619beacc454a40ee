"""Restores everything that a step moves, even if an interrupt arrives during the restore.

`with restoring(restore):` calls `restore` at its end, as `try ... finally` does. An interrupt (Ctrl-C, SIGTERM) can
arrive at any instruction, in that `finally` too. Then `restore` runs at the end of an outer block, at the latest that
of `everything_restored`, which stands around every public call that moves anything.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from gen_dist.torch_private import foreach_copy_, parametrization_cache, set_grad_enabled, without_torch_function

__all__ = [
    "contents_aside",
    "contents_kept",
    "everything_restored",
    "gradients_aside",
    "gradients_kept",
    "parametrizations_anew",
    "restored_on_exit",
    "restoring",
    "torch_function_off",
]

P = ParamSpec("P")
R = TypeVar("R")


class _Pending(threading.local):
    def __init__(self) -> None:
        self.restores: list[Callable[[], object]] = []


_pending = _Pending()


@contextlib.contextmanager
def restoring(restore: Callable[[], object]) -> Iterator[None]:
    """Call `restore` at the end of the block, or a little later if an interrupt prevents it. It may be called twice."""
    depth = len(_pending.restores)
    _pending.restores.append(restore)
    try:
        yield
    finally:
        if restore in _pending.restores:  # otherwise an outer block has called it after an interrupt
            _restore_down_to(depth)


def restored_on_exit(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function restore everything it moved when it ends, however it ends."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        with everything_restored():
            return function(*args, **kwargs)

    return guarded


@contextlib.contextmanager
def everything_restored() -> Iterator[None]:
    """The outermost block: what an interrupt kept an inner block from restoring is restored here."""
    enabled, depth = torch.is_grad_enabled(), len(_pending.restores)
    try:
        yield
    finally:
        _restore_down_to(depth)
        set_grad_enabled(enabled)


def _restore_down_to(depth: int) -> None:
    while len(_pending.restores) > depth:
        _pending.restores[-1]()
        _pending.restores.pop()


@contextlib.contextmanager
def torch_function_off() -> Iterator[None]:
    """Let tensors be what they are, whatever function mode is active; its own exit would be lost to an interrupt."""
    guard = without_torch_function()
    with restoring(lambda: guard.__exit__(None, None, None)):
        guard.__enter__()
        yield


# ------------------------------------------------------------------------------------------- what is restored


@contextlib.contextmanager
def contents_kept(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Restore the contents of plain tensors bit for bit; yields the copies."""
    tensors = list(tensors)
    copies = [tensor.detach().clone() for tensor in tensors]

    @torch.no_grad()
    def restore() -> None:
        if tensors:
            foreach_copy_(tensors, copies)

    with restoring(restore):
        yield copies


@contextlib.contextmanager
def contents_aside(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Give plain tensors copies of their memory for the block, and their own back afterwards; yields their own.

    Unlike `contents_kept`, it writes nothing back, and the caller may keep the copies.
    """
    tensors = list(tensors)
    own = [tensor.data for tensor in tensors]

    def restore() -> None:
        for tensor, memory in zip(tensors, own, strict=True):
            tensor.data = memory

    with restoring(restore):
        for tensor in tensors:
            tensor.data = tensor.data.clone()
        yield own


@contextlib.contextmanager
def gradients_aside(parameters: Sequence[Tensor]) -> Iterator[dict[Tensor, Tensor]]:
    """Clear the gradients for the block and restore them afterwards, the same tensors; yields them by parameter."""
    gradients = {p: p.grad for p in parameters}

    def restore() -> None:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient

    with restoring(restore):
        for parameter in gradients:
            parameter.grad = None
        yield {p: gradient for p, gradient in gradients.items() if gradient is not None}


@contextlib.contextmanager
def gradients_kept(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Restore the gradients bit for bit, as the same tensors: they may be views of DDP's buckets."""
    gradients = [p.grad for p in parameters]
    contents = [None if g is None else g.detach().clone() for g in gradients]

    @torch.no_grad()
    def restore() -> None:
        for parameter, gradient, content in zip(parameters, gradients, contents, strict=True):
            parameter.grad = gradient
            if gradient is not None and content is not None:
                gradient.copy_(content)

    with restoring(restore):
        yield


@contextlib.contextmanager
def parametrizations_anew() -> Iterator[Callable[[], None]]:
    """Recompute weights that `parametrize.cached()` keeps; yields a function that forgets them again."""
    cached = dict(parametrization_cache())

    def forget() -> None:
        parametrization_cache().clear()

    def restore() -> None:
        forget()
        parametrization_cache().update(cached)

    with restoring(restore):
        forget()
        yield forget
