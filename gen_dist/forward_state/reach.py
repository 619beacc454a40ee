"""What a criterion or a closure reaches: the modules and random streams that its code names."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gen_dist.forward_state.streams import stream_of

__all__ = ["ATOMS", "OPAQUE", "found_in", "is_of_torch"]

ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, range, slice)
OPAQUE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)


def is_of_torch(of: type) -> bool:
    """Whether PyTorch or Python made the class: the state of such objects is not the model's."""
    return of.__module__.partition(".")[0] in ("torch", "builtins", "numpy", "threading", "logging", "weakref")


def found_in(program: Any, depth: int, seen: set[int]) -> Iterator[Any]:
    """Yield the modules and random streams that a criterion or a closure names."""
    if isinstance(program, ATOMS) or id(program) in seen or depth > 4:
        return
    seen.add(id(program))
    names: list[Any] = []
    if isinstance(program, nn.Module) or stream_of(program) is not None:
        yield program
    elif isinstance(program, functools.partial):
        names = [program.func, *program.args, *program.keywords.values()]
    elif isinstance(program, types.MethodType):
        names = [program.__func__, program.__self__]
    elif isinstance(program, types.FunctionType):
        if not is_of_torch(type(program)) or not program.__module__.startswith("torch."):
            cells = [cell for cell in program.__closure__ or () if _is_filled(cell)]
            named = [program.__globals__[n] for n in program.__code__.co_names if n in program.__globals__]
            names = [*(cell.cell_contents for cell in cells), *named, *(program.__defaults__ or ())]
            names += (program.__kwdefaults__ or {}).values()
    elif type(program) in (list, tuple):
        names = list(program)[:100]
    elif type(program) is dict:
        names = list(program.values())[:100]
    elif not isinstance(program, OPAQUE) and not isinstance(program, Tensor) and not is_of_torch(type(program)):
        names = [*getattr(program, "__dict__", {}).values()]
        if callable(program):
            names.append(type(program).__call__)
    for each in names:
        yield from found_in(each, depth + 1, seen)


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
