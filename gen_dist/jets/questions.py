"""What a program asks about a moving tensor, answered as autograd would, so that it takes the branches of training."""

from __future__ import annotations

import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gen_dist.jets.jet import UnsupportedOperation, moves
from gen_dist.torch_private import pad_packed_sequence, pad_sequence, transforms_are_active

__all__ = ["ANSWERS", "CONSTANTS", "REPLACEMENTS"]

CONSTANTS = frozenset({Tensor.tolist, Tensor.numpy, torch.tensor})
"""Functions whose result is a constant to autograd. Their C++ code needs the memory of a plain tensor."""


def _requires_grad(function: Callable[..., Any], given: Tensor, tensor: Tensor) -> bool:
    if moves(tensor) and not _is_answered_by_torch():
        return True
    return bool(function(given))


def _is_leaf(function: Callable[..., Any], given: Tensor, tensor: Tensor) -> bool:
    return isinstance(given, nn.Parameter) or (not moves(tensor) and bool(function(given)))


def _grad_fn(function: Callable[..., Any], given: Tensor, tensor: Tensor) -> Any:
    node = function(given)
    if node is None and moves(tensor) and not isinstance(given, nn.Parameter) and not _is_answered_by_torch():
        return _Node()
    return node


def _is_answered_by_torch() -> bool:
    """Whether autograd's own answer is wanted: by FSDP, which prepares a backward pass, and by `torch.func`."""
    asking = sys._getframe(3).f_globals.get("__name__", "")
    return asking.startswith("torch.distributed.") or transforms_are_active()


class _Node:
    """Stands for a node of the graph that autograd would have recorded."""

    next_functions = ()
    metadata: ClassVar[dict[Any, Any]] = {}

    def name(self) -> str:
        return "JetBackward"

    def register_hook(self, hook: Any) -> Any:
        _refuse_hook("a hook of a node of the graph")

    register_prehook = register_hook


def _refuse_hook(what: str) -> None:
    raise UnsupportedOperation(what, "may return another gradient than that of the forward code")


def _register_hook(function: Callable[..., Any], given: Tensor, tensor: Tensor, *hook: Any, **kwargs: Any) -> Any:
    if not moves(tensor):
        return function(given, *hook, **kwargs)
    # A hook of a parameter changes the gradient that the optimizer gets, not the loss.
    if isinstance(given, nn.Parameter) or _only_checks(*hook, **kwargs):
        return torch.utils.hooks.RemovableHandle(OrderedDict())
    _refuse_hook("a hook that tensor.register_hook adds to an activation")


def _only_checks(hook: Any) -> bool:
    """Whether a hook is Lightning Fabric's, which checks how `backward()` is called and returns nothing."""
    function = hook.func if isinstance(hook, functools.partial) else hook
    return str(getattr(function, "__module__", "")).startswith(("lightning.fabric.", "lightning_fabric."))


def _unchanged(function: Callable[..., Any], given: Tensor, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    return given if moves(tensor) else function(given, *args, **kwargs)


def _nothing(function: Callable[..., Any], given: Tensor, tensor: Tensor) -> Any:
    return None if moves(tensor) else function(given)


ANSWERS: dict[Callable[..., Any], Callable[..., Any]] = {
    Tensor.requires_grad.__get__: _requires_grad,  # type: ignore[attr-defined]
    Tensor.is_leaf.__get__: _is_leaf,  # type: ignore[attr-defined]
    Tensor.grad_fn.__get__: _grad_fn,  # type: ignore[union-attr]
    Tensor.requires_grad_: _unchanged,
    Tensor.retain_grad: _nothing,
    Tensor.register_hook: _register_hook,
}
"""`answer(function, given, tensor, ...)`, where `tensor` stands for the `given` one, by function."""


def _pad_packed(data: Any, sizes: Tensor, batch_first: bool, padding: float, length: int) -> tuple[Any, Tensor]:
    """As the C++ function, without a write in place: rows of `data` are ordered by time, then by sequence."""
    sizes = sizes.to(data.device)
    sequence = torch.arange(int(sizes[0]), device=data.device)
    present = sequence < sizes[:, None]
    first = sizes.cumsum(0) - sizes
    rows = torch.where(present, first[:, None] + sequence, 0)
    padded = data[rows].masked_fill(~present.view(*present.shape, *(1 for _ in data.shape[1:])), padding)
    missing = length - padded.size(0)
    if missing > 0:
        filler = torch.full((missing, *padded.shape[1:]), padding, dtype=data.dtype, device=data.device)
        padded = torch.cat([padded, filler])
    return padded.transpose(0, 1) if batch_first else padded, present.sum(0).cpu()


def _pad(sequences: Sequence[Tensor], batch_first: bool = False, padding: float = 0.0, side: str = "right") -> Any:
    """As the C++ function, without a write in place."""
    longest = max(map(len, sequences))
    ends = [(0, longest - len(x)) if side == "right" else (longest - len(x), 0) for x in sequences]
    rows = [
        nn.functional.pad(x, (*(0, 0) * (x.dim() - 1), *end), value=padding)
        for x, end in zip(sequences, ends, strict=True)
    ]
    return torch.stack(rows, 0 if batch_first else 1)


REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {pad_packed_sequence: _pad_packed, pad_sequence: _pad}
"""What runs in place of a function whose C++ code writes a moving value into a tensor that it makes."""
