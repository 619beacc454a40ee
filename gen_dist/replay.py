"""What a training step has computed, to compute it again: forward passes of a model, and the loss of their outputs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn

from gen_dist.torch_private import tree_leaves, tree_map_only

__all__ = ["Passes", "repeatable"]

Loss = TypeVar("Loss", bound=Callable[..., Any])

REMEDY = "call rate.collect(batch) for each batch instead, with compute_loss=lambda model, batch: ... of the scheduler"


class Autocast:
    """The autocast settings of the present, to enter again."""

    def __init__(self, devices: set[str]) -> None:
        self.settings = [(d, torch.get_autocast_dtype(d), torch.is_autocast_enabled(d)) for d in sorted(devices)]

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for device, dtype, enabled in self.settings:
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
            yield


class Pass:
    """A forward pass: what went in, and which tensors came out. These are not kept alive."""

    def __init__(self, model: nn.Module, args: Any, kwargs: Any, output: Any, autocast: Autocast) -> None:
        self.model, self.args, self.kwargs, self.autocast = model, args, kwargs, autocast
        self.tensors = [ref(leaf) if isinstance(leaf, Tensor) else None for leaf in tree_leaves(output)]

    def position_of(self, tensor: Tensor) -> int | None:
        """The place of a tensor among those that came out."""
        return next((i for i, own in enumerate(self.tensors) if own is not None and own() is tensor), None)

    def is_over(self) -> bool:
        """Whether nothing that came out is alive, so that no loss can be computed from it any more."""
        return all(own is None or own() is None for own in self.tensors)

    def again(self) -> list[Any]:
        """Run the model on the same input; what comes out, as a flat list."""
        with self.autocast.again():
            return tree_leaves(self.model(*self.args, **self.kwargs))


class Passes:
    """Remembers the forward passes of a model, with gradients, whose outputs are still alive."""

    def __init__(self, model: nn.Module) -> None:
        self.devices = {p.device.type for p in model.parameters()}
        self.remembered: list[Pass] = []
        self.sees = True
        nn.Module.register_forward_hook(model, self._note, with_kwargs=True)  # TorchScript's own method refuses

    def _note(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.sees and torch.is_grad_enabled():
            alive = [each for each in self.remembered if not each.is_over()]
            self.remembered = [*alive, Pass(model, args, kwargs, output, self.autocast())]

    def autocast(self) -> Autocast:
        return Autocast(self.devices)

    def find(self, tensor: Tensor) -> Output | None:
        """Where among the outputs a tensor is."""
        for each in reversed(self.remembered):
            if (position := each.position_of(tensor)) is not None:
                return Output(each, position)
        return None

    @contextlib.contextmanager
    def unseen(self) -> Iterator[None]:
        """Context manager in which the model and the criterion run unnoticed."""
        self.sees, self.remembered = False, []
        try:
            yield
        finally:
            self.sees = True

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model, as for an average of its weights, remembers nothing."""
        return {"devices": self.devices, "remembered": [], "sees": False}


@dataclass(frozen=True, eq=False)
class Output:
    """Stands for a tensor that came out of a forward pass."""

    of: Pass
    position: int


def repeatable(criterion: Loss, passes: Passes, take: Callable[[Callable[[], Tensor]], None]) -> Loss:
    """A criterion that gives `take` a closure of each of its calls, once a backward pass goes through its loss."""

    def note(args: Any, kwargs: Any, loss: Any) -> None:
        if not (passes.sees and torch.is_grad_enabled()):
            return
        if not (isinstance(loss, Tensor) and loss.numel() == 1):
            raise ValueError(
                f"the criterion must return the loss, a tensor with one element, got {loss!r:.80}: {REMEDY}"
            )
        if loss.requires_grad:
            _when_trained_on(loss, take, _closure(criterion, args, kwargs, passes))

    if isinstance(criterion, nn.Module):
        criterion.register_forward_hook(lambda _, args, kwargs, loss: note(args, kwargs, loss), with_kwargs=True)
        return criterion

    @functools.wraps(criterion)
    def noted(*args: Any, **kwargs: Any) -> Any:
        loss = criterion(*args, **kwargs)
        note(args, kwargs, loss)
        return loss

    return noted  # type: ignore[return-value]


def _when_trained_on(loss: Tensor, take: Callable[[Callable[[], Tensor]], None], closure: Callable[[], Tensor]) -> None:
    """Hand over the closure when the first backward pass goes through the loss."""
    left = [closure]

    def hand_over(_: Tensor) -> None:
        if left:
            take(left.pop())

    loss.register_hook(hand_over)


def _closure(criterion: Callable[..., Any], args: Any, kwargs: Any, passes: Passes) -> Callable[[], Tensor]:
    """What computes the loss anew, from the inputs of the model."""
    used = []

    def marked(tensor: Tensor) -> Tensor | Output:
        output = passes.find(tensor)
        if output is not None:
            used.append(output)
            return output
        if tensor.grad_fn is not None:
            raise ValueError(
                f"the criterion got a tensor of shape {tuple(tensor.shape)} that was computed from the output of the "
                f"scheduler's model, or of another model: {REMEDY}"
            )
        return tensor

    arguments, autocast = tree_map_only(Tensor, marked, (args, kwargs)), passes.autocast()
    if not used:
        raise ValueError(f"the criterion got no output of the scheduler's model: {REMEDY}")

    def loss() -> Tensor:
        outputs = {each: each.again() for each in dict.fromkeys(output.of for output in used)}
        own_args, own_kwargs = tree_map_only(Output, lambda output: outputs[output.of][output.position], arguments)
        with autocast.again():
            return criterion(*own_args, **own_kwargs)

    return loss
