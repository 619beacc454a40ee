"""What modules keep: saved before a forward pass, or when they begin to run, and put back after it."""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gen_dist.forward_state.containers import keep_array, keep_dict, keep_sequence, keep_set, keep_slots, slots_of
from gen_dist.forward_state.reach import ATOMS, OPAQUE, found_in, is_of_torch
from gen_dist.forward_state.streams import global_streams, same, stream_of
from gen_dist.forward_state.writes import Writes, by_memory, can_be_restored
from gen_dist.restore import restoring, torch_function_off
from gen_dist.torch_private import (
    foreach_copy_,
    global_forward_pre_hooks,
    is_compiled,
    is_fsdp1_unit,
    is_scripted,
    local_part,
    own_attributes_of_modules,
    scripted_attributes,
    wraps_only,
)

__all__ = ["Restart", "forward_state_kept"]

Restart: TypeAlias = Callable[[], bool]
"""Restores what the pass has changed so far; returns whether random numbers were drawn since the last call."""

DEPTH = 12  # of containers and objects in an attribute


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
        self.streams = global_streams(model)
        self.compiled = False
        self.note_module(model)
        for program in programs:
            for found in found_in(program, 0, set()):
                self.note(found, 0)
        # The late ones are copied: a mode cannot be entered in the middle of a program.
        few = sum(p.nbytes for p in self.still) <= sum(local_part(p).nbytes for p in self.moving.values())
        self.watched = {} if few else by_memory(self.still)
        if few:
            self.contents += [(memory, memory.clone()) for memory in self.still]
        if watching:
            moved = [memory for tensor, memory in self.tensors if id(tensor) in self.moving]
            self.watched |= by_memory(moved)
        self.begun = True

    begun = False

    # ------------------------------------------------------------------------------------------------ saving

    def note_module(self, root: nn.Module) -> None:
        if id(root) in self.seen:
            return
        managed: set[nn.Module] = set()
        modules = list(root.modules())
        for module in modules:
            if is_fsdp1_unit(module):
                managed.update(module.modules())
        for module in modules:
            if id(module) in self.seen:
                continue
            self.seen[id(module)] = module
            self.compiled = self.compiled or is_compiled(module)
            if wraps_only(module):
                continue
            attributes = module.__dict__
            self.structures.append(keep_dict(attributes))
            if is_scripted(module):
                self._note_script(module)
                continue
            parameters = attributes["_parameters"]
            if parameters and module not in managed:
                # FSDP2 puts whole weights in place of its shards while a unit runs
                if not any(p is not None and local_part(p) is not p for p in parameters.values()):
                    self.structures.append(keep_dict(parameters))
                for parameter in parameters.values():
                    if parameter is not None and id(parameter) not in self.seen:
                        self._note_tensor(parameter, still=id(parameter) not in self.moving)
            if attributes["_modules"]:
                self.structures.append(keep_dict(attributes["_modules"]))
            buffers = attributes["_buffers"]
            self.structures.append(keep_dict(buffers))
            for buffer in buffers.values():
                if buffer is not None and id(buffer) not in self.seen:
                    self._note_tensor(buffer)
            if len(attributes) > len(own_attributes_of_modules):
                for name, value in attributes.items():
                    if name not in own_attributes_of_modules and not isinstance(value, ATOMS):
                        self.note(value, 0)
            if id(type(module)) not in self.seen:
                self._note_class(type(module))

    def _note_script(self, module: nn.Module) -> None:
        for value, put in scripted_attributes(module):
            self.structures.append(partial(put, value))
            if isinstance(value, nn.Parameter) and id(value) not in self.seen:
                self._note_tensor(value, still=id(value) not in self.moving)
            else:
                self.note(value, 0)

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
        elif stream := stream_of(value):
            self.streams.append(stream)
        elif isinstance(value, dict):
            self.structures.append(keep_dict(value))
            inside = value.values()
        elif isinstance(value, (list, deque, bytearray)):
            self.structures.append(keep_sequence(value))
            inside = () if isinstance(value, bytearray) else value
        elif isinstance(value, set):
            self.structures.append(keep_set(value))
        elif isinstance(value, tuple):
            inside = value
        elif (numpy := sys.modules.get("numpy")) and isinstance(value, numpy.ndarray):
            self.structures.append(keep_array(value))
        if not is_of_torch(type(value)):
            if isinstance(attributes := getattr(value, "__dict__", None), dict):
                self.structures.append(keep_dict(attributes))
                inside = [*inside, *attributes.values()]
            if names := slots_of(value):
                self.structures.append(keep_slots(value, names))
                inside = [*inside, *(getattr(value, name) for name in names if hasattr(value, name))]
        for each in list(inside):
            self.note(each, depth + 1)

    def _note_class(self, of_module: type) -> None:
        """Save what instances share: a counter or a cache that is an attribute of the class."""
        for each in of_module.__mro__:
            if each is object or id(each) in self.seen or is_of_torch(each):
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
        if not can_be_restored(memory):
            return
        memory = memory.data  # with a count of writes of its own: a graph that has saved the tensor stays valid
        if memory.untyped_storage().size() == 0:
            return  # FSDP1 has let go of it
        self.tensors.append((local_part(tensor), memory))
        if still and not self.begun:
            self.still.append(memory)
        elif id(tensor) not in self.moving:
            self.contents.append((memory, memory.clone()))

    # --------------------------------------------------------------------------------------------- restoring

    def restore(self) -> bool:
        """Restore everything; returns whether random numbers were drawn."""
        with torch_function_off():
            drawn = False
            for read, write, before in self.streams:
                if not same(read(), before):
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
        mode = Writes(self.watched, self.contents)
        with restoring(mode.leave), mode:
            yield
