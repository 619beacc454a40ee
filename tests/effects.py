"""What a call does besides returning a value: collectives, forward passes, and changes to a model's training state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from problems import shard
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class Collectives(TorchDispatchMode):
    """Records every collective, also those of DDP and FSDP, with the number of bytes that come out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation.namespace in ("c10d", "_c10d_functional"):
            name = operation._schema.name.split("::")[1].strip("_")
            tensors = args[0] if isinstance(args[0], list) else [args[0]]
            self.seen.append((name, sum(tensor.nbytes for tensor in tensors)))
        return operation(*args, **(kwargs or {}))


def forward_passes(model: nn.Module, call: Callable[[], object]) -> int:
    """How many forward passes of the model the call makes."""
    passes: list[None] = []
    hook = model.register_forward_hook(lambda *_: passes.append(None))
    try:
        call()
    finally:
        hook.remove()
    return len(passes)


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[Any]:
    """A copy of weights, buffers, gradients, the optimizer's state if given, and the random state."""
    gradients = [p.grad for p in model.parameters()]
    state = optimizer.state_dict() if optimizer is not None else {}
    return copy.deepcopy([model.state_dict(), gradients, state, torch.get_rng_state()])


def local_snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """A copy of this rank's shards of weights and gradients, and of its random state."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = parameters + [p.grad for p in parameters if p.grad is not None]
    return [*(shard(t).detach().clone() for t in tensors), torch.get_rng_state()]


def assert_unchanged(before: Any, after: Any) -> None:
    """Two snapshots are equal, bit for bit."""
    if isinstance(before, Tensor):
        assert torch.equal(before, after)
    elif isinstance(before, dict):
        assert before.keys() == after.keys()
        for key in before:
            assert_unchanged(before[key], after[key])
    elif isinstance(before, (list, tuple)):
        for b, a in zip(before, after, strict=True):
            assert_unchanged(b, a)
    else:
        assert before == after
