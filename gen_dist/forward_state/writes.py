"""Tensors by their memory, and copies of those that a program is about to write."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gen_dist.torch_private import (
    TorchDispatchMode,
    active_dispatch_modes,
    is_uninitialized,
    local_part,
    written_arguments,
)

__all__ = ["Writes", "by_memory", "can_be_restored"]


# TorchScript calls them of constants when it compiles. A dispatch mode gets some as numbers, which they do not take.
OF_CONSTANTS = {torch.ops.aten.equal.default, torch.ops.aten._local_scalar_dense.default}


class Writes(TorchDispatchMode):
    """Copies watched memory before an operator writes into it."""

    supports_higher_order_operators = True

    def __init__(self, watched: dict[int, list[Tensor]], contents: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.watched, self.contents = watched, contents

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in written_arguments(operator, args, kwargs or {}):
            for memory in self.watched.pop(_address(tensor), ()):
                self.contents.append((memory, memory.clone()))
        if operator in OF_CONSTANTS:
            args = [_as_tensor(x) for x in args]
        return operator(*args, **(kwargs or {}))

    def __exit__(self, *exception: Any) -> None:
        self.leave()

    def leave(self) -> None:
        """Exit the mode if it is active."""
        if self in active_dispatch_modes():
            for flags in vars(self).values():  # which PyTorch has popped, if an interrupt has cut its exit short
                if isinstance(flags, deque) and not flags:
                    flags.append(False)
            super().__exit__(None, None, None)


def _as_tensor(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64 if isinstance(x, float) else None)


def by_memory(tensors: Iterable[Tensor]) -> dict[int, list[Tensor]]:
    found: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(_address(tensor), []).append(tensor)
    return found


def _address(tensor: Tensor) -> int:
    tensor = local_part(tensor)
    return tensor.untyped_storage().data_ptr() if _has_memory(tensor) else 0


def _has_memory(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and tensor.layout == torch.strided and not tensor.is_meta


def can_be_restored(tensor: Tensor) -> bool:
    if is_uninitialized(tensor) or not _has_memory(tensor) or tensor.is_inference():
        return False
    return 0 not in tensor.stride() or all(n < 2 for n, s in zip(tensor.shape, tensor.stride(), strict=True) if s == 0)
