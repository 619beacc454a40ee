"""Where derivatives stop: in the program's `no_grad` regions, and at functions with a gradient of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gen_dist.jets.functions import follow, is_known
from gen_dist.jets.jet import Jet, UnsupportedOperation, without_derivatives
from gen_dist.torch_private import (
    backward_hook_function,
    is_called_by_checkpoint,
    set_grad_enabled,
    transform_level,
    transforms_are_active,
)

__all__ = ["Stops", "constant", "leaves"]


class Stops:
    """Follows a program through the regions in which autograd would stop derivatives."""

    def __init__(self) -> None:
        self.inside = False  # whether the program is inside a `no_grad` region of its own
        self._level = 0  # how many transforms of torch.func there were when it entered that region
        self._outer: list[bool] = []
        self._functions: list[type] = []  # autograd.Functions whose forward runs
        self._followed: list[type] = []  # those of them whose gradient will be held to that of the forward code

    @property
    def now(self) -> bool:
        """Whether the program is in a region where derivatives stop."""
        return self.inside or torch.is_inference_mode_enabled()

    def at(self, args: Any, kwargs: Any) -> bool:
        """Whether derivatives stop at a call with these arguments."""
        if torch.is_grad_enabled():
            return torch.is_inference_mode_enabled() or (self.inside and transforms_are_active())
        if self.now:
            return True
        # Neither the program nor a region of it has disabled gradients: an autograd.Function or PyTorch's own code has.
        if not any(isinstance(x, Jet) for x in leaves((args, kwargs))):
            return False
        if not self._functions:
            return True
        self._refuse_custom(self._functions[-1])
        return False

    @property
    def follow(self) -> bool:
        """Whether the forward code of a custom autograd.Function runs, in which nothing stops."""
        return bool(self._followed) and self._functions[-1] is self._followed[-1]

    def _refuse_custom(self, function: type) -> None:
        """Raise, unless the function defines the gradient of its forward code."""
        if not is_known(function) and function not in self._followed:
            name = f"the custom autograd.Function '{function.__name__}'"
            raise UnsupportedOperation(name, "may define another gradient than that of its forward code")

    def switch_gradients(self, enabled: bool) -> Any:
        """Switch gradients on or off, and record that the program enters or leaves `no_grad` or `enable_grad`.

        A switch from enabled to disabled enters a `no_grad` region or leaves an `enable_grad` region. Only switches by
        the program are seen here. PyTorch disables gradients in the forward of an autograd.Function without such a
        switch, and derivatives do not stop there.
        """
        before = torch.is_grad_enabled()
        if not enabled and not self.inside and is_called_by_checkpoint():
            # Gradients stay enabled while it runs the user's code, which may enter `no_grad` regions of its own.
            if before:
                self._outer.pop()
            else:
                self._outer.append(True)
            return set_grad_enabled(not before)
        if enabled and not before:
            self._outer.append(self.inside)
            # a transform of torch.func enables gradients for itself, inside a `no_grad` region too
            self.inside = self.inside and transform_level() > self._level
            if self._functions and not self._outer[-1]:
                self._refuse_custom(self._functions[-1])
        elif before and not enabled:
            if not self.inside:
                self._level = transform_level()
            self.inside = self._outer.pop() if self._outer else True
        return set_grad_enabled(enabled)

    def run_forward(
        self, function: type, forward: Callable[..., Any], args: Any, kwargs: Any, moving: bool, tracked: bool
    ) -> Any:
        """Run the forward of an autograd.Function; refuse one that has another gradient, where jets enter it."""
        if moving and issubclass(function, backward_hook_function):
            why = "may return another gradient than that of the forward code"
            raise UnsupportedOperation("a full backward hook of a module", why)
        stops, custom = self.now, moving and not is_known(function)
        checked = custom and not self.follow  # inside of the forward code of another one, its gradient is not used
        if checked and tracked:  # in a loss that takes gradients
            self._refuse_custom(function)
        self._functions.append(function)
        self._followed += [function] if custom else []
        try:
            result = follow(function, forward, args, kwargs) if checked else forward(*args, **kwargs)
        finally:
            self._functions.pop()
            if custom:
                self._followed.pop()
        return constant(result) if stops else result


def constant(arguments: Any) -> Any:
    """Return the arguments without derivatives."""
    if isinstance(arguments, Tensor):
        return without_derivatives(arguments, transforms_are_active())
    if type(arguments) in (tuple, list):
        return type(arguments)([constant(x) for x in arguments])
    if type(arguments) is dict:
        return {key: constant(x) for key, x in arguments.items()}
    return arguments


def leaves(arguments: Any) -> Iterator[Any]:
    if isinstance(arguments, (tuple, list)):
        for x in arguments:
            yield from leaves(x)
    elif isinstance(arguments, dict):
        yield from leaves(list(arguments.values()))
    else:
        yield arguments
