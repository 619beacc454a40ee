"""Running a program on jets: what stands for its weights, and where its gradient is stopped."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from gen_dist.jets.jet import Jet, UnsupportedOperation

__all__ = ["JetMode"]

_set_grad_enabled = torch._C._set_grad_enabled
_detach = frozenset({Tensor.detach, torch.detach, Tensor.detach_, Tensor.data.__get__})  # type: ignore[attr-defined]
_recurrent = frozenset({torch._VF.lstm, torch._VF.gru, torch._VF.rnn_tanh, torch._VF.rnn_relu})


class JetMode(TorchFunctionMode):
    """Within it, functions see what `table` lists, by identity of a tensor, in its place.

    The modules themselves stay as they are, and weights that a loss uses outside of them are found too. As in
    autograd, `detach` and `torch.no_grad` stop derivatives. Gradients need not be enabled by the caller, and nothing
    is recorded.

    A custom `torch.autograd.Function` is refused: its forward code need not agree with the gradient that it declares.
    """

    def __init__(self, table: dict[int, Tensor]) -> None:
        super().__init__()
        self.table = table
        self.stopped = False  # inside a no_grad region of the program's own
        self._outer: list[bool] = []

    def __enter__(self) -> JetMode:
        # With gradients enabled, the program's own no_grad regions can be told. None is required, so none is kept.
        self._enabled_before = torch.is_grad_enabled()
        _set_grad_enabled(True)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.leave()

    def leave(self) -> None:
        """End it, if it has begun and not ended yet."""
        if self in _get_current_function_mode_stack():
            super().__exit__(None, None, None)
            _set_grad_enabled(self._enabled_before)

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is _set_grad_enabled:
            self._note_grad_mode(args[0])
            return function(*args)
        kind = getattr(function, "__name__", "")
        if kind == "__set__" or (kind == "__get__" and function not in _detach and id(args[0]) not in self.table):
            return function(*args)  # an attribute of this very tensor, such as `data` or `grad`
        args, kwargs = self._replaced(args), self._replaced(kwargs or {})
        if self.stopped or function in _detach:
            return function(*_values(args), **_values(kwargs))
        if not torch.is_grad_enabled():
            _refuse_custom_function(args, kwargs)
        if function not in _recurrent:
            return function(*args, **kwargs)
        # Fused recurrent kernels are one operator without a second derivative; unfused, they are elementary ones.
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
        """Follow the program in and out of `no_grad` and `enable_grad`.

        A switch from on to off opens a `no_grad` region, or closes an `enable_grad` one; only the program's own count.
        In the forward of an autograd.Function gradients are off already, which is no stop.
        """
        before = torch.is_grad_enabled()
        if enabled and not before:
            self._outer.append(self.stopped)
            self.stopped = False
        elif before and not enabled:
            self.stopped = self._outer.pop() if self._outer else True


def _values(arguments: Any) -> Any:
    if isinstance(arguments, Jet):
        return arguments.value
    if type(arguments) in (tuple, list):
        return type(arguments)([_values(x) for x in arguments])
    if type(arguments) is dict:
        return {key: _values(x) for key, x in arguments.items()}
    return arguments


def _refuse_custom_function(args: Any, kwargs: Any) -> None:
    """Gradients are off although the program did not stop them: this is the forward of an autograd.Function."""
    if not any(isinstance(x, Jet) for x in _leaves((args, kwargs))):
        return
    for function in _running_functions():
        # PyTorch's own, such as reentrant checkpointing and the moves of DTensors, declare the gradient of what they do
        if not function.__module__.startswith("torch."):
            name = f"the custom autograd.Function '{function.__name__}'"
            raise UnsupportedOperation(name, "may declare another gradient than that of its forward code")


def _leaves(arguments: Any) -> Iterator[Any]:
    if isinstance(arguments, (tuple, list)):
        for x in arguments:
            yield from _leaves(x)
    elif isinstance(arguments, dict):
        yield from _leaves(list(arguments.values()))
    else:
        yield arguments


def _running_functions() -> Iterator[type]:
    """The autograd.Functions whose forward is on the stack, innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        context = frame.f_locals.get("ctx")
        if frame.f_code.co_name == "forward" and isinstance(context, torch.autograd.function.BackwardCFunction):
            yield type(context)._forward_cls  # type: ignore[attr-defined]
        frame = frame.f_back  # type: ignore[assignment]
