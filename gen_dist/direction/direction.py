"""The update direction of an optimizer: `d` such that its step is `theta <- theta - lr d`, found by one step."""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from gen_dist.direction.rates import rate_ratios, set_rate
from gen_dist.parallel import local
from gen_dist.restore import contents_aside, restoring
from gen_dist.torch_private import foreach_add_, foreach_div_, foreach_mul, foreach_sub_

__all__ = ["Direction", "GroupDirection", "base_step", "find_direction", "move_along", "on_a_copy_of_the_state"]

# The direction is the difference that a step at a trial rate makes, divided by that rate. A large power of two keeps
# all digits: the division is exact, and the subtraction loses nothing when the step dwarfs the weights.
TRIAL_RATE = 2.0**20
TRIAL_RATE_FLOAT16 = 2.0**8  # its numbers end at 65504


class GroupDirection(NamedTuple):
    """The direction of one parameter group, in this rank's shards: its parameters move by `-a * ratio * update`.

    `group` is its index in `optimizer.param_groups`, `ratio` the group's share of the common rate `a`.
    """

    group: int
    ratio: float
    parameters: list[Tensor]
    updates: list[Tensor]


class Direction(list[GroupDirection]):
    """The update direction of an optimizer, group by group; parameters without a gradient are left out."""

    def items(self) -> list[tuple[Tensor, Tensor]]:
        """`(parameter, update)` of everything that moves."""
        return [pair for group in self for pair in zip(group.parameters, group.updates, strict=True)]


def base_step(optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
    """Run the step of the optimizer's own class, without its hooks: those are for the step that the user sees."""
    step: Any = getattr(optimizer, "base_class", type(optimizer)).step
    while getattr(step, "hooked", False):
        step = step.__wrapped__
    return step(optimizer) if closure is None else step(optimizer, closure)


@torch.no_grad()
def find_direction(optimizer: Optimizer) -> Direction:
    """Step once at a trial rate and return the direction; parameters come back bit for bit, the state advances.

    The step moves copies of the parameters, and the direction is formed in them.
    """
    ratios, groups = rate_ratios(optimizer), optimizer.param_groups
    moving = [[p for p in group["params"] if p.grad is not None] for group in groups]
    shards = [[local(p) for p in parameters] for parameters in moving]
    rates = [group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"] for group in groups]

    @torch.no_grad()
    def restore_rates() -> None:
        for group, rate in zip(groups, rates, strict=True):
            set_rate(group, rate)

    direction = Direction()
    with restoring(restore_rates), contents_aside([shard for group in shards for shard in group]) as own:
        copies = iter([shard.data for group in shards for shard in group])
        for group in groups:
            set_rate(group, _trial_rate(group))
        base_step(optimizer)
        before = iter(own)
        for index, (ratio, parameters, after) in enumerate(zip(ratios, moving, shards, strict=True)):
            if parameters:
                updates = [_moved(next(copies), shard) for shard in after]
                foreach_sub_(updates, [next(before) for _ in after])
                foreach_div_(updates, -_trial_rate(groups[index]))
                direction.append(GroupDirection(index, ratio, parameters, updates))
    return direction


def _moved(copy: Tensor, shard: Tensor) -> Tensor:
    """The shard after the step, to be overwritten: the copy that it was given, or, if replaced, a copy of the new one.

    The optimizer may keep the memory that it has put there.
    """
    return copy if shard.data_ptr() == copy.data_ptr() else shard.data.clone()


@torch.no_grad()
def move_along(direction: Direction, groups: list[dict[str, Any]]) -> None:
    """`theta -= lr d` at each group's own rate, in the precision of the parameters."""
    for index, _, parameters, updates in direction:
        shards, rate = [local(p) for p in parameters], groups[index]["lr"]
        if isinstance(rate, Tensor):
            foreach_sub_(shards, foreach_mul(updates, rate.to(shards[0].device)))
        else:
            foreach_add_(shards, updates, alpha=-rate)


@contextlib.contextmanager
def on_a_copy_of_the_state(optimizer: Optimizer) -> Iterator[None]:
    """Let an optimizer step on copies of its state and its groups' settings, some of which count steps too."""
    state, settings = optimizer.state, [dict(group) for group in optimizer.param_groups]

    def restore() -> None:
        optimizer.state = state
        for group, before in zip(optimizer.param_groups, settings, strict=True):
            group.clear()
            group.update(before)

    devices = {p.device for group in settings for p in group["params"] if p.device.type == "cuda"}
    with torch.random.fork_rng(devices), restoring(restore):
        optimizer.state = defaultdict(dict, {p: copy.deepcopy(of_p) for p, of_p in state.items()})
        for group in optimizer.param_groups:
            group.update({key: copy.deepcopy(value) for key, value in group.items() if key != "params"})
        yield


def _trial_rate(group: Mapping[str, Any]) -> float:
    has_float16 = any(p.dtype == torch.float16 for p in group["params"])
    return TRIAL_RATE_FLOAT16 if has_float16 else TRIAL_RATE
