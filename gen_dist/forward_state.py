"""A forward pass that changes nothing: restores what modules move while they run, and all random numbers.

Modules keep state in many places: buffers, a teacher's weights, plain attributes, lists, dicts, objects. What is in
reach of the model, of the criterion and of a closure is saved before the pass; a module that nobody knew of is saved
when it begins to run. Names and containers are saved by identity. Contents of tensors are copied, but for parameters
that do not move along the line and outweigh those that do (the base of LoRA): these are copied when they are written.
"""

from __future__ import annotations

import contextlib
import functools
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gen_dist.restore import restoring, torch_function_off
from gen_dist.torch_private import (
    TorchDispatchMode,
    active_dispatch_modes,
    foreach_copy_,
    global_forward_pre_hooks,
    is_compiled,
    is_uninitialized,
    local_part,
    moves_weights,
    own_attributes_of_modules,
    wraps_only,
    written_arguments,
)

__all__ = ["Restart", "forward_state_kept"]

Restart: TypeAlias = Callable[[], bool]
"""Restores what the pass has changed so far; returns whether random numbers were drawn since the last call."""

DEPTH = 12  # of containers and objects in an attribute
ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, range, slice)
OPAQUE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)


@contextlib.contextmanager
def forward_state_kept(
    model: nn.Module, *programs: object, moving: Iterable[Tensor] = (), watching: bool = False
) -> Iterator[Restart]:
    """Restore what forward passes change: state of modules and random numbers. Yields a function to do so in between.

    `programs` are what runs besides the model: a criterion, a closure. `moving` are the parameters that move
    along the line. Their contents are the caller's to restore, but with `watching`: then they are copied and restored
    if the program writes them.
    """
    with torch_function_off():
        state = _State(model, programs, moving, watching)
    with restoring(state.restore), state.noting_modules(), state.noting_writes():
        yield state.restore


class _State:
    def __init__(
        self, model: nn.Module, programs: Iterable[object], moving: Iterable[Tensor], watching: bool = False
    ) -> None:
        self.moving = {id(p): p for p in moving}
        self.seen: dict[int, object] = {}  # objects too, so that identities stay theirs
        self.structures: list[Callable[[], None]] = []
        self.tensors: list[tuple[Tensor, Tensor]] = []  # each with an alias of its memory
        self.contents: list[tuple[Tensor, Tensor]] = []  # memory and a copy
        self.still: list[Tensor] = []  # parameters that do not move along the line
        self.streams = _global_streams(model)
        self.compiled = False
        self.note_module(model)
        for program in programs:
            for found in _found_in(program, 0, set()):
                self.note(found, 0)
        # The late ones are copied: a mode cannot be entered in the middle of a program.
        few = sum(p.nbytes for p in self.still) <= sum(local_part(p).nbytes for p in self.moving.values())
        self.watched = {} if few else _by_memory(self.still)
        if few:
            self.contents += [(memory, memory.clone()) for memory in self.still]
        if watching:
            moved = [memory for tensor, memory in self.tensors if id(tensor) in self.moving]
            self.watched |= _by_memory(moved)
        self.begun = True

    begun = False

    # ------------------------------------------------------------------------------------------------ saving

    def note_module(self, root: nn.Module) -> None:
        if id(root) in self.seen:
            return
        managed: set[nn.Module] = set()
        modules = list(root.modules())
        for module in modules:
            if moves_weights(module):
                managed.update(module.modules())
        for module in modules:
            if id(module) in self.seen:
                continue
            self.seen[id(module)] = module
            self.compiled = self.compiled or is_compiled(module)
            if wraps_only(module):
                continue
            attributes = module.__dict__
            self._keep_dict(attributes)
            parameters = attributes["_parameters"]
            if parameters and module not in managed:
                # FSDP2 puts whole weights in place of its shards while a unit runs
                if not any(p is not None and local_part(p) is not p for p in parameters.values()):
                    self._keep_dict(parameters)
                for parameter in parameters.values():
                    if parameter is not None and id(parameter) not in self.seen:
                        self._note_tensor(parameter, still=id(parameter) not in self.moving)
            if attributes["_modules"]:
                self._keep_dict(attributes["_modules"])
            buffers = attributes["_buffers"]
            self._keep_dict(buffers)
            for buffer in buffers.values():
                if buffer is not None and id(buffer) not in self.seen:
                    self._note_tensor(buffer)
            if len(attributes) > len(own_attributes_of_modules):
                for name, value in attributes.items():
                    if name not in own_attributes_of_modules and not isinstance(value, ATOMS):
                        self.note(value, 0)
            if id(type(module)) not in self.seen:
                self._note_class(type(module))

    def note(self, value: Any, depth: int) -> None:
        """Save a value of an attribute, and what is in it."""
        if isinstance(value, ATOMS) or id(value) in self.seen or depth > DEPTH:
            return
        if isinstance(value, nn.Module):
            self.note_module(value)
            return
        if isinstance(value, OPAQUE):
            return
        self.seen[id(value)] = value
        inside: Iterable[Any] = ()
        if isinstance(value, Tensor):
            if id(value) not in self.moving:  # FSDP1 keeps some in lists
                self._note_tensor(value, still=isinstance(value, nn.Parameter))
        elif stream := _stream_of(value):
            self.streams.append(stream)
        elif isinstance(value, dict):
            self._keep_dict(value)
            inside = value.values()
        elif isinstance(value, (list, deque, bytearray)):
            self._keep_sequence(value)
            inside = () if isinstance(value, bytearray) else value
        elif isinstance(value, set):
            self._keep_set(value)
        elif isinstance(value, tuple):
            inside = value
        elif (numpy := sys.modules.get("numpy")) and isinstance(value, numpy.ndarray):
            self._keep_array(value)
        if not _is_of_torch(type(value)):
            if isinstance(attributes := getattr(value, "__dict__", None), dict):
                self._keep_dict(attributes)
                inside = [*inside, *attributes.values()]
            inside = [*inside, *self._keep_slots(value)]
        for each in list(inside):
            self.note(each, depth + 1)

    def _note_class(self, of_module: type) -> None:
        """Save what instances share: a counter or a cache that is an attribute of the class."""
        for each in of_module.__mro__:
            if each is object or id(each) in self.seen or _is_of_torch(each):
                continue
            self.seen[id(each)] = each
            shared = {
                name: value
                for name, value in vars(each).items()
                if not name.startswith("__") and not callable(value) and not hasattr(type(value), "__get__")
            }
            if not shared:
                continue

            def restore(each: type = each, shared: dict[str, Any] = shared) -> None:
                for name, value in shared.items():
                    if vars(each).get(name) is not value:
                        setattr(each, name, value)

            self.structures.append(restore)
            for value in shared.values():
                self.note(value, 0)

    def _note_tensor(self, tensor: Tensor, still: bool = False) -> None:
        self.seen[id(tensor)] = tensor
        memory = local_part(tensor)
        if not _can_be_restored(memory):
            return
        memory = memory.data  # with a count of writes of its own: a graph that has saved the tensor stays valid
        if memory.untyped_storage().size() == 0:
            return  # FSDP1 has let go of it
        self.tensors.append((local_part(tensor), memory))
        if still and not self.begun:
            self.still.append(memory)
        elif id(tensor) not in self.moving:
            self.contents.append((memory, memory.clone()))

    def _keep_dict(self, kept: dict[Any, Any]) -> None:
        items, names, identities = dict(kept), list(kept), list(map(id, kept.values()))

        def restore() -> None:
            if list(map(id, kept.values())) != identities or list(kept) != names:
                kept.update(items)
                if list(kept) != names:
                    for name in [name for name in kept if name not in items]:
                        del kept[name]
                    for name in names:  # in their order
                        kept[name] = kept.pop(name)

        self.structures.append(restore)

    def _keep_sequence(self, kept: Any) -> None:
        items = list(kept)

        def restore() -> None:
            if len(kept) != len(items) or any(a is not b for a, b in zip(kept, items, strict=True)):
                if isinstance(kept, deque):
                    kept.clear()
                    kept.extend(items)
                else:
                    kept[:] = items

        self.structures.append(restore)

    def _keep_set(self, kept: set[Any]) -> None:
        items = set(kept)

        def restore() -> None:
            if kept != items:
                kept.intersection_update(items)
                kept.update(items)

        self.structures.append(restore)

    def _keep_array(self, kept: Any) -> None:
        items = kept.copy()

        def restore() -> None:
            if kept.flags.writeable:
                kept[...] = items

        self.structures.append(restore)

    def _keep_slots(self, kept: Any) -> list[Any]:
        names = [name for each in type(kept).__mro__ for name in _slots_of(each)]
        if not names:
            return []
        items = {name: getattr(kept, name) for name in names if hasattr(kept, name)}

        def restore() -> None:
            for name in names:
                if name not in items:
                    if hasattr(kept, name):
                        delattr(kept, name)
                elif getattr(kept, name, None) is not items[name]:
                    object.__setattr__(kept, name, items[name])

        self.structures.append(restore)
        return list(items.values())

    # --------------------------------------------------------------------------------------------- restoring

    def restore(self) -> bool:
        """Restore everything; returns whether random numbers were drawn."""
        with torch_function_off():
            drawn = False
            for read, write, before in self.streams:
                if not _same(read(), before):
                    drawn = True
                    write(before)
            for restore in self.structures:
                restore()
            for tensor, memory in self.tensors:
                if tensor.data_ptr() != memory.data_ptr() or tensor.shape != memory.shape:
                    tensor.data = memory
            if self.contents:
                with torch.no_grad():
                    foreach_copy_([memory for memory, _ in self.contents], [copy for _, copy in self.contents])
        return drawn

    # ------------------------------------------------------------------------------------------------- noting

    @contextlib.contextmanager
    def noting_modules(self) -> Iterator[None]:
        """Save modules that are out of reach when they begin to run."""
        if self.compiled:  # compiled code would be compiled again for the hook
            yield
            return
        seen = self.seen

        def note(module: nn.Module, _: Any) -> None:
            if id(module) not in seen:
                with torch_function_off():
                    self.note_module(module)

        def remove() -> None:  # without its handle, which an interrupt can lose
            for key in [key for key, hook in global_forward_pre_hooks.items() if hook is note]:
                del global_forward_pre_hooks[key]

        with restoring(remove):
            nn.modules.module.register_module_forward_pre_hook(note)
            yield

    @contextlib.contextmanager
    def noting_writes(self) -> Iterator[None]:
        """Copy the parameters that were not copied before, when they are written."""
        if not self.watched:
            yield
            return
        mode = _Writes(self.watched, self.contents)
        with restoring(mode.leave), mode:
            yield


class _Writes(TorchDispatchMode):
    """Copies watched memory before an operator writes into it."""

    supports_higher_order_operators = True

    def __init__(self, watched: dict[int, list[Tensor]], contents: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.watched, self.contents = watched, contents

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in written_arguments(operator, args, kwargs or {}):
            for memory in self.watched.pop(_address(tensor), ()):
                self.contents.append((memory, memory.clone()))
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


def _address(tensor: Tensor) -> int:
    tensor = local_part(tensor)
    return tensor.untyped_storage().data_ptr() if _has_memory(tensor) else 0


def _by_memory(tensors: Iterable[Tensor]) -> dict[int, list[Tensor]]:
    found: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(_address(tensor), []).append(tensor)
    return found


def _has_memory(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and tensor.layout == torch.strided and not tensor.is_meta


def _can_be_restored(tensor: Tensor) -> bool:
    if is_uninitialized(tensor) or not _has_memory(tensor) or tensor.is_inference():
        return False
    return 0 not in tensor.stride() or all(n < 2 for n, s in zip(tensor.shape, tensor.stride(), strict=True) if s == 0)


def _is_of_torch(of: type) -> bool:
    """Whether PyTorch or Python made the class: the state of such objects is not the model's."""
    return of.__module__.partition(".")[0] in ("torch", "builtins", "numpy", "threading", "logging", "weakref")


def _slots_of(of: type) -> tuple[str, ...]:
    slots = of.__dict__.get("__slots__", ())
    slots = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in slots if not name.startswith("__"))


# ----------------------------------------------------------------------------------------- what a program reaches


def _found_in(program: Any, depth: int, seen: set[int]) -> Iterator[Any]:
    """Yield the modules and random streams that a criterion or a closure names."""
    if isinstance(program, ATOMS) or id(program) in seen or depth > 4:
        return
    seen.add(id(program))
    names: list[Any] = []
    if isinstance(program, nn.Module) or _stream_of(program) is not None:
        yield program
    elif isinstance(program, functools.partial):
        names = [program.func, *program.args, *program.keywords.values()]
    elif isinstance(program, types.MethodType):
        names = [program.__func__, program.__self__]
    elif isinstance(program, types.FunctionType):
        if not _is_of_torch(type(program)) or not program.__module__.startswith("torch."):
            cells = [cell for cell in program.__closure__ or () if _is_filled(cell)]
            named = [program.__globals__[n] for n in program.__code__.co_names if n in program.__globals__]
            names = [*(cell.cell_contents for cell in cells), *named, *(program.__defaults__ or ())]
            names += (program.__kwdefaults__ or {}).values()
    elif type(program) in (list, tuple):
        names = list(program)[:100]
    elif type(program) is dict:
        names = list(program.values())[:100]
    elif not isinstance(program, OPAQUE) and not isinstance(program, Tensor) and not _is_of_torch(type(program)):
        names = [*getattr(program, "__dict__", {}).values()]
        if callable(program):
            names.append(type(program).__call__)
    for each in names:
        yield from _found_in(each, depth + 1, seen)


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


# ------------------------------------------------------------------------------------------------ random streams

Stream: TypeAlias = tuple[Callable[[], Any], Callable[[Any], Any], Any]
"""How to read a stream of random numbers, how to write it, and where it was."""


def _global_streams(model: nn.Module) -> list[Stream]:
    streams: list[Stream] = [
        (torch.get_rng_state, torch.set_rng_state, torch.get_rng_state()),
        (random.getstate, random.setstate, random.getstate()),
    ]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    for device in devices:
        read = functools.partial(torch.cuda.get_rng_state, device)
        streams.append((read, functools.partial(torch.cuda.set_rng_state, device=device), read()))
    if "numpy.random" in sys.modules:
        of_numpy = sys.modules["numpy.random"]
        streams.append((of_numpy.get_state, of_numpy.set_state, of_numpy.get_state()))
    return streams


def _stream_of(value: Any) -> Stream | None:
    """The stream of a generator; None for anything else."""
    if isinstance(value, torch.Generator):
        return value.get_state, value.set_state, value.get_state()
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return value.getstate, value.setstate, value.getstate()
    if (of_numpy := sys.modules.get("numpy.random")) is not None:
        if isinstance(value, of_numpy.Generator):
            return _stream_of_bits(value.bit_generator)
        if isinstance(value, of_numpy.BitGenerator):
            return _stream_of_bits(value)
        if isinstance(value, of_numpy.RandomState):
            return value.get_state, value.set_state, value.get_state()
    return None


def _stream_of_bits(bits: Any) -> Stream:
    return lambda: bits.state, lambda state: setattr(bits, "state", state), bits.state


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return all(_same(one[key], two[key]) for key in one)
    if hasattr(one, "tobytes"):
        return bool(one.tobytes() == two.tobytes())
    if isinstance(one, tuple) and len(one) < 10:
        return all(map(_same, one, two))
    return bool(one == two)
