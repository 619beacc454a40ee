"""Streams of random numbers: where they are, and whether a pass drew from them."""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

__all__ = ["Stream", "global_streams", "same", "stream_of"]

Stream: TypeAlias = tuple[Callable[[], Any], Callable[[Any], Any], Any]
"""How to read a stream of random numbers, how to write it, and where it was."""


def global_streams(model: nn.Module) -> list[Stream]:
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


def stream_of(value: Any) -> Stream | None:
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


def same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return all(same(one[key], two[key]) for key in one)
    if hasattr(one, "tobytes"):
        return bool(one.tobytes() == two.tobytes())
    if isinstance(one, tuple) and len(one) < 10:
        return all(map(same, one, two))
    return bool(one == two)
