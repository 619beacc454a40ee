"""What a trainer notes about a loss while it computes it: metrics, counters. A measurement leaves them as they are."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from gen_dist.forward_state.containers import keep_dict, keep_sequence, keep_set

__all__ = ["records_kept"]

DEPTH = 4  # of dicts in dicts


@contextlib.contextmanager
def records_kept(owner: object) -> Iterator[None]:
    """Restore an object's attributes, with the lists, sets and dicts in them, and in the dicts.

    What else is in them, such as the samples of a data set, is not looked at.
    """
    restores = _keep(vars(owner), DEPTH)
    try:
        yield
    finally:
        for restore in restores:
            restore()


def _keep(value: Any, depth: int) -> list[Callable[[], None]]:
    if isinstance(value, dict):
        inside = [restore for each in value.values() for restore in _keep(each, depth - 1)] if depth else []
        return [keep_dict(value), *inside]
    if isinstance(value, (list, deque)):
        return [keep_sequence(value)]
    return [keep_set(value)] if isinstance(value, set) else []
