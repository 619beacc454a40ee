"""`JetMode`: runs a program on jets in place of its weights."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gen_dist.jets.adopted import Adopted
from gen_dist.jets.bodies import body_of
from gen_dist.jets.functions import is_known
from gen_dist.jets.general import jets_in
from gen_dist.jets.jet import Jet, UnsupportedOperation, moves, running_script, values
from gen_dist.jets.questions import ANSWERS, CONSTANTS, REPLACEMENTS
from gen_dist.jets.rules.recurrent import covered, recurrent
from gen_dist.jets.stops import Stops, constant, leaves
from gen_dist.torch_private import (
    active_function_modes,
    is_wrapped_by_a_transform,
    recurrent_kernels,
    replace_what_transforms_wrap,
    set_grad_enabled,
    transforms_are_active,
    watch_autograd_functions,
    watch_backward,
    watch_scripts,
    without_torch_function,
)

__all__ = ["JetMode", "NeedsGraph"]

DETACH = frozenset({Tensor.detach, torch.detach, Tensor.detach_, Tensor.data.__get__})  # type: ignore[attr-defined]
GRAD = Tensor.grad.__get__  # type: ignore[union-attr]
MEMORY = Tensor.data_ptr
SPECIAL = frozenset(
    {
        *DETACH,
        GRAD,
        MEMORY,
        set_grad_enabled,
        torch.autograd.grad,
        *CONSTANTS,
        *ANSWERS,
        *REPLACEMENTS,
        *recurrent_kernels,
    }
)


class NeedsGraph(RuntimeError):
    """The program takes a gradient with respect to something that autograd has not followed.

    Raised by a `JetMode` with `tracks=False`: run the program again with `tracks=True`.
    """


class JetMode(TorchFunctionMode):
    """Context manager in which functions receive `table[id(tensor)]` in place of each tensor that the table lists.

    Modules are not changed, and weights that the loss uses outside of a module are replaced too. As in autograd,
    `detach`, `torch.no_grad` and `torch.inference_mode` stop derivatives. The caller need not enable gradients.

    A program may take gradients itself, by `torch.func` or `torch.autograd.grad`: the result is a jet. Autograd records
    only what depends on tensors that the program itself has marked by `requires_grad_`. A program that needs more
    raises `NeedsGraph`; with `tracks`, autograd records all that depends on weights, which takes the memory of a
    training step.

    What defines another gradient than that of the forward code raises `UnsupportedOperation`: a backward hook, and a
    custom `torch.autograd.Function` whose gradient is found to be another one.
    """

    def __init__(self, table: dict[int, Tensor], tracks: bool = False) -> None:
        super().__init__()
        self.table = table
        self.tracks = tracks
        self._stops = Stops()
        self._adopted = Adopted()
        self._entered: set[Callable[..., Any]] = set()  # functions whose bodies run
        self._has_left = False

    def __enter__(self) -> JetMode:
        # With gradients enabled here, a switch to disabled comes from the program. Autograd records next to nothing,
        # since jets require no gradient.
        _discard_modes_left_behind()
        self._enabled_before = torch.is_grad_enabled()
        set_grad_enabled(True)
        if self.tracks:
            for jet in self.table.values():
                if moves(jet):
                    jet.requires_grad_()
        watch_autograd_functions(self._forward)
        watch_backward(_refuse_backward)
        watch_scripts(self._script)
        replace_what_transforms_wrap(self._replaced)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.leave()

    def leave(self) -> None:
        """Exit the mode if it is active.

        An interrupt inside PyTorch, which sets a mode aside while it handles a function, can bring it back later: then
        it does nothing any more.
        """
        self._has_left = True
        watch_autograd_functions(None)
        watch_backward(None)
        watch_scripts(None)
        replace_what_transforms_wrap(None)
        if self in active_function_modes():
            while self in active_function_modes():  # more than once, if an interrupt has cut a body short
                super().__exit__(None, None, None)
            set_grad_enabled(self._enabled_before)

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._has_left:
            return function(*args, **(kwargs or {}))
        special = function in SPECIAL
        if special and function is set_grad_enabled:
            return self._stops.switch_gradients(args[0])
        kind = getattr(function, "__name__", "")
        if kind == "__set__" or (special and function == GRAD):  # an attribute of the tensor itself
            return function(*(args[0], *values(args[1:])))
        given = args[0] if args else None
        args, kwargs = self._replaced(args), self._replaced(kwargs) if kwargs else {}
        if special:
            if function in CONSTANTS:
                return function(*values(args), **values(kwargs))
            if function in ANSWERS:
                return ANSWERS[function](function, given, *args, **kwargs)
            if function is torch.autograd.grad:
                return self._gradient(*args, **kwargs)
        if (special and function in DETACH and not self._stops.follow) or self._stops.at(args, kwargs):
            return function(*constant(args), **constant(kwargs))
        if special and function is MEMORY:
            return _memory(args[0])
        if (kind[-1:] == "_" and kind[:2] != "__") or kind == "__setitem__" or "out" in kwargs:
            args, kwargs = self._with_moving_targets(args, kwargs)
        if special or type(function) is FunctionType:
            return self._run(REPLACEMENTS.get(function, function), args, kwargs)
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            if "new Tensor subclass" in str(error):  # which `Tensor.__torch_function__` makes of the result
                what = "a tensor of a subclass with a __torch_function__ of its own"
                raise UnsupportedOperation(what, "makes its own class of a jet") from error
            raise

    def _run(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if function in recurrent_kernels:
            if covered(function, args):
                return recurrent(function, *args)
            # A fused recurrent kernel is one operator without an operator rule. Unfused, it is several that have one.
            with torch.backends.mkldnn.flags(enabled=False), torch.backends.cudnn.flags(enabled=False):
                return function(*args, **kwargs)
        body = body_of(function)
        if body is None or function in self._entered:
            return function(*args, **kwargs)
        self._entered.add(function)
        super().__enter__()  # the mode sees what the body calls
        try:
            return body(*args, **kwargs)
        finally:
            super().__exit__(None, None, None)
            self._entered.discard(function)

    # ----------------------------------------------------------------------------------- what stands for a tensor

    def _replaced(self, arguments: Any) -> Any:
        if isinstance(arguments, Tensor):
            return self._stand_in(arguments)
        if type(arguments) in (tuple, list):
            return type(arguments)([self._replaced(x) for x in arguments])
        if type(arguments) is dict:
            return {key: self._replaced(x) for key, x in arguments.items()}
        return arguments

    def _stand_in(self, tensor: Tensor) -> Tensor:
        found = self.table.get(id(tensor))
        if found is not None:
            return found
        kind = type(tensor)
        if kind is Jet:
            return tensor
        if isinstance(tensor, nn.Parameter):
            return tensor.detach() if tensor.requires_grad and not self.tracks else tensor
        if kind is not Tensor and _is_plain_subclass(kind):
            tensor = tensor.as_subclass(Tensor)  # it would turn jets into its own class
        if self._adopted and type(tensor) is Tensor and not is_wrapped_by_a_transform(tensor):
            found = self._adopted.find(tensor)
        return tensor if found is None else found

    def _with_moving_targets(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Let a jet stand for a plain tensor that a moving value is written into."""
        target = kwargs["out"] if "out" in kwargs else args[0] if args else None
        if type(target) is not Tensor or not (target.is_floating_point() or target.is_complex()):
            return args, kwargs
        sources = [x for x in leaves((args, kwargs)) if moves(x)]
        if not sources or transforms_are_active():  # which refuse to write into what they do not wrap
            return args, kwargs
        jet = self._adopted.adopt(target)
        if jet.is_view and any(x.requires_grad for x in sources):
            raise UnsupportedOperation("a write through a view in a loss that takes gradients", "cannot be followed")
        return ((jet, *args[1:]), kwargs) if "out" not in kwargs else (args, {**kwargs, "out": jet})

    # ---------------------------------------------------------------------------- functions with their own gradient

    def _forward(self, function: type, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        moving = False
        if not self._stops.now:
            found = [self._stand_in(x) for x in leaves((args, kwargs)) if isinstance(x, Tensor)]
            moving = any(moves(x) or is_wrapped_by_a_transform(x) for x in found)
        if moving and not is_known(function):
            args, kwargs = self._replaced(args), self._replaced(kwargs)
        with without_torch_function():  # which would answer for autograd
            tracked = any(jet.requires_grad for jet in jets_in((args, kwargs)))
        return self._stops.run_forward(function, forward, args, kwargs, moving, tracked)

    def _script(self, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        args, kwargs = self._replaced(args), self._replaced(kwargs)
        if self._stops.at(args, kwargs):
            return run(*constant(args), **constant(kwargs))
        # where a custom function runs its forward code, gradients are disabled, and nothing stops
        with running_script(stops=torch.is_grad_enabled()) as raised:
            try:
                return run(*args, **kwargs)
            except RuntimeError as error:  # the interpreter makes it of all errors
                if raised:
                    why = f"calls what jets refuse ({raised[0].reason})"
                elif "Cannot access data pointer" in str(error):
                    why = "is compiled for plain tensors, whose memory it asks for"
                else:
                    raise
                raise UnsupportedOperation("a function of TorchScript", why) from error

    # ------------------------------------------------------------------------------- gradients that the loss takes

    def _gradient(self, outputs: Any, inputs: Any, *args: Any, create_graph: bool = False, **kwargs: Any) -> Any:
        follows = all(x.requires_grad for x in leaves((inputs,))) and any(x.requires_grad for x in leaves((outputs,)))
        if not follows and not self.tracks:
            raise NeedsGraph("this loss takes a gradient of its own with respect to weights or activations")
        result = self._run(torch.autograd.grad, (outputs, inputs, *args), {**kwargs, "create_graph": create_graph})
        return result if create_graph and not self._stops.at((), {}) else constant(result)


def _discard_modes_left_behind() -> None:
    while (modes := active_function_modes()) and isinstance(modes[-1], JetMode) and modes[-1]._has_left:
        TorchFunctionMode.__exit__(modes[-1], None, None, None)


def _is_plain_subclass(kind: Any) -> bool:
    """Whether a subclass of Tensor leaves all functions and operators as they are."""
    plain: Any = Tensor
    return (
        getattr(kind.__torch_function__, "__func__", None) is plain.__torch_function__.__func__
        and kind.__torch_dispatch__ is plain.__torch_dispatch__
    )


def _memory(tensor: Tensor) -> int:
    if moves(tensor):
        why = "hands its memory to a kernel that jets cannot follow"
        raise UnsupportedOperation("data_ptr() of a tensor that depends on the parameters", why)
    pointer: int = values(tensor).data_ptr()
    return pointer


def _refuse_backward() -> None:
    raise UnsupportedOperation("backward() inside the loss", "accumulates gradients that jets cannot follow")
