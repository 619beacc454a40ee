"""What decides the next rate, as one value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["State", "state_from_dict", "state_to_dict"]

VERSION = 3  # of a saved state; the first form had no number

KEPT_SINCE_FIRST = ("started", "age", "settled", "from_zero")  # of what `Auto` remembers; it was another rule then


class State(NamedTuple):
    """What decides the next rate: equal on all ranks, and all that a run needs to continue with the same rates.

    One update is a function `State, Parabola -> State`; undoing one is keeping the state before it.

    Attributes:
        rate: the common learning rate, before a known horizon's decay; a group's own is a ratio of it.
        reason: why the rate is what it is; empty before the first update.
        probe: the rate at which finite differences look at the line next.
        step: how many steps there have been.
        updated: the number of the step that made the last update, counted from 1; 0 before the first.
        memory: what the rule remembers, a NamedTuple of its own; None where it remembers nothing.
    """

    rate: float
    reason: str = ""
    probe: float = 0.0
    step: int = 0
    updated: int = 0
    memory: Any = None


def state_to_dict(state: State) -> dict[str, Any]:
    """The fields of a state and a version number: plain numbers, text, dicts and lists."""
    return {"version": VERSION, **state._asdict(), "memory": state.memory and state.memory._asdict()}


def state_from_dict(saved: Mapping[str, Any], like: State) -> State:
    """The state that was saved; `like`, one of the same scheduler, tells what its rule remembers.

    Reads states of all versions. Raises `ValueError` for one from a version that is not known yet, of another rule, or
    with rates of its own for each group, which left the library.
    """
    version = saved.get("version", 1)
    if version > VERSION:
        raise ValueError(f"the state has version {version}, this gen_dist knows up to {VERSION}: update gen_dist")
    fields = dict(_from_first_version(saved)) if version == 1 else {name: saved[name] for name in State._fields}
    if saved.get("groups") is not None:
        raise ValueError("the state has a rate for each group (group_rates), which gen_dist no longer computes")
    memory = fields["memory"]
    if version < 3 and memory is not None:
        memory = {name: value for name, value in memory.items() if name in KEPT_SINCE_FIRST}
        memory["settled"] = bool(memory["settled"])
    if like.memory is not None:
        kind = type(like.memory)
        if memory is None or not memory.keys() <= set(kind._fields):
            raise ValueError(f"the state is that of another rule than {kind.__module__}: load it into the same recipe")
        fields["memory"] = kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in memory.items()})
    else:
        fields["memory"] = None
    return State(**fields)


def _from_first_version(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields, out of a state of 0.1.0, which kept them as tuples under other names."""
    names = "rate numerator denominator settled started age reach first_loss promised promise".split()
    history = dict(zip(names, saved["history"], strict=True))
    last = saved["last"]
    return {
        "rate": history.pop("rate") * saved["shortened"],  # by a verification, which kept its factor apart
        "reason": last[4] if last else "",
        "probe": saved["probe"],
        "step": saved["last_epoch"],
        "updated": saved["updated_at"],
        "memory": history,
    }
