"""Containers and objects, saved by the identity of what is in them: each function returns one that restores."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, TypeAlias

__all__ = ["keep_array", "keep_dict", "keep_sequence", "keep_set", "keep_slots", "slots_of"]

Restore: TypeAlias = Callable[[], None]


def keep_dict(kept: dict[Any, Any]) -> Restore:
    items, names, identities = dict(kept), list(kept), list(map(id, kept.values()))

    def restore() -> None:
        if list(map(id, kept.values())) != identities or list(kept) != names:
            kept.update(items)
            if list(kept) != names:
                for name in [name for name in kept if name not in items]:
                    del kept[name]
                for name in names:  # in their order
                    kept[name] = kept.pop(name)

    return restore


def keep_sequence(kept: Any) -> Restore:
    items = list(kept)

    def restore() -> None:
        if len(kept) != len(items) or any(a is not b for a, b in zip(kept, items, strict=True)):
            if isinstance(kept, deque):
                kept.clear()
                kept.extend(items)
            else:
                kept[:] = items

    return restore


def keep_set(kept: set[Any]) -> Restore:
    items = set(kept)

    def restore() -> None:
        if kept != items:
            kept.intersection_update(items)
            kept.update(items)

    return restore


def keep_array(kept: Any) -> Restore:
    items = kept.copy()

    def restore() -> None:
        if kept.flags.writeable:
            kept[...] = items

    return restore


def keep_slots(kept: Any, names: list[str]) -> Restore:
    items = {name: getattr(kept, name) for name in names if hasattr(kept, name)}

    def restore() -> None:
        for name in names:
            if name not in items:
                if hasattr(kept, name):
                    delattr(kept, name)
            elif getattr(kept, name, None) is not items[name]:
                object.__setattr__(kept, name, items[name])

    return restore


def slots_of(value: Any) -> list[str]:
    """The names of an object's slots, filled or not."""
    names: list[str] = []
    for each in type(value).__mro__:
        slots = each.__dict__.get("__slots__", ())
        names += (slots,) if isinstance(slots, str) else slots
    return [name for name in names if not name.startswith("__")]
