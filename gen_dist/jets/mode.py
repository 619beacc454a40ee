"""`JetMode`: runs a program on jets in place of its weights, and stops derivatives where autograd stops them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gen_dist.jets.jet import Jet, UnsupportedOperation, values
from gen_dist.torch_private import active_function_modes, autograd_function_of, recurrent_kernels, set_grad_enabled

__all__ = ["JetMode"]

_detach = frozenset({Tensor.detach, torch.detach, Tensor.detach_, Tensor.data.__get__})  # type: ignore[attr-defined]


class JetMode(TorchFunctionMode):
    """Context manager in which functions receive `table[id(tensor)]` in place of each tensor that the table lists.

    Modules are not changed, and weights that the loss uses outside of a module are replaced too. As in autograd,
    `detach` and `torch.no_grad` stop derivatives. The caller need not enable gradients, and autograd records no graph.

    A custom `torch.autograd.Function` raises `UnsupportedOperation`, since its forward code and the gradient that it
    defines may disagree.
    """

    def __init__(self, table: dict[int, Tensor]) -> None:
        super().__init__()
        self.table = table
        self.stopped = False  # whether the program is inside a `no_grad` region of its own
        self._outer: list[bool] = []

    def __enter__(self) -> JetMode:
        # With gradients enabled here, a switch to disabled comes from the program. No tensor requires a gradient, so
        # autograd records nothing.
        self._enabled_before = torch.is_grad_enabled()
        set_grad_enabled(True)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.leave()

    def leave(self) -> None:
        """Exit the mode if it is active."""
        if self in active_function_modes():
            super().__exit__(None, None, None)
            set_grad_enabled(self._enabled_before)

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is set_grad_enabled:
            self._note_grad_mode(args[0])
            return function(*args)
        kind = getattr(function, "__name__", "")
        if kind == "__set__" or (kind == "__get__" and function not in _detach and id(args[0]) not in self.table):
            return function(*args)  # an attribute of the tensor itself, such as `data` or `grad`
        args, kwargs = self._replaced(args), self._replaced(kwargs or {})
        if self.stopped or function in _detach:
            return function(*values(args), **values(kwargs))
        if not torch.is_grad_enabled():
            _refuse_custom_function(args, kwargs)
        if function not in recurrent_kernels:
            return function(*args, **kwargs)
        # A fused recurrent kernel is one operator without an operator rule. Unfused, it is several that have one.
        with torch.backends.mkldnn.flags(enabled=False), torch.backends.cudnn.flags(enabled=False):
            return function(*args, **kwargs)

    def _replaced(self, arguments: Any) -> Any:
        if isinstance(arguments, Tensor):
            found = self.table.get(id(arguments))
            if found is not None:
                return found
            return arguments.detach() if arguments.requires_grad else arguments
        if type(arguments) in (tuple, list):
            return type(arguments)([self._replaced(x) for x in arguments])
        if type(arguments) is dict:
            return {key: self._replaced(x) for key, x in arguments.items()}
        return arguments

    def _note_grad_mode(self, enabled: bool) -> None:
        """Record that the program enters or leaves `no_grad` or `enable_grad`.

        A switch from enabled to disabled enters a `no_grad` region or leaves an `enable_grad` region. Only switches by
        the program are seen here. PyTorch disables gradients in the forward of an autograd.Function without such a
        switch, and derivatives do not stop there.
        """
        before = torch.is_grad_enabled()
        if enabled and not before:
            self._outer.append(self.stopped)
            self.stopped = False
        elif before and not enabled:
            self.stopped = self._outer.pop() if self._outer else True


def _refuse_custom_function(args: Any, kwargs: Any) -> None:
    """Raise if jets have entered a custom autograd.Function: gradients are disabled, but not by the program."""
    if not any(isinstance(x, Jet) for x in _leaves((args, kwargs))):
        return
    for function in _running_functions():
        # PyTorch's own functions, such as those of checkpointing and DTensor, define the gradient of their forward code
        if not function.__module__.startswith("torch."):
            name = f"the custom autograd.Function '{function.__name__}'"
            raise UnsupportedOperation(name, "may define another gradient than that of its forward code")


def _leaves(arguments: Any) -> Iterator[Any]:
    if isinstance(arguments, (tuple, list)):
        for x in arguments:
            yield from _leaves(x)
    elif isinstance(arguments, dict):
        yield from _leaves(list(arguments.values()))
    else:
        yield arguments


def _running_functions() -> Iterator[type]:
    """Yield the autograd.Functions whose forward is running, innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "forward":
            function = autograd_function_of(frame.f_locals.get("ctx"))
            if function is not None:
                yield function
        frame = frame.f_back  # type: ignore[assignment]
