"""Weights that move along a line while a model runs, also those that a rank holds whole only for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from gen_dist.parallel.placement import local, with_local
from gen_dist.restore import restoring

__all__ = ["Gathering", "Substitute", "moving_weights"]

Substitute: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""`(weight, velocity) -> what stands for the weight in the forward pass`."""


@contextlib.contextmanager
def moving_weights(
    model: nn.Module, gatherings: Sequence[Gathering], velocities: Mapping[Tensor, Tensor], substitute: Substitute
) -> Iterator[dict[int, Tensor]]:
    """Yield the table that `Layout.moving_weights` describes."""
    table: dict[int, Tensor] = {}
    found = {id(p) for gathering in gatherings for p in gathering.parameters}
    for parameter in model.parameters():
        if parameter in velocities and id(parameter) not in found:
            found.add(id(parameter))
            table[id(parameter)] = _stand_in(parameter, velocities[parameter], substitute)
    _refuse_strangers(velocities, found)
    handles: list[Any] = []
    with restoring(lambda: [handle.remove() for handle in handles]):
        for gathering in gatherings:
            handles += gathering.hook(table, substitute)
        yield table
    for gathering in gatherings:
        gathering.check_that_it_ran()


class Gathering:
    """A module that holds weights whole only while it runs: it gathers their velocities for that time.

    `parameters` are what the optimizer sees of those weights, and `velocities` maps such parameters to local parts.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[Tensor], velocities: Mapping[Tensor, Tensor]) -> None:
        self.module = module  # hooks go here: inside of FSDP's own
        self.parameters = parameters
        self.velocities = velocities
        self.has_run = False

    def whole(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The weights as the module uses them, each with its velocity, gathered. Collective."""
        raise NotImplementedError

    def hook(self, table: dict[int, Tensor], substitute: Substitute) -> list[Any]:
        """Keep the weights in the table while the module runs. Returns handles to remove the hooks by."""
        present: list[Tensor] = []  # keeps the gathered weights alive, so that their identities stay theirs

        def gather(*_: Any) -> None:
            release()
            self.has_run = True
            for weight, velocity in self.whole():
                table[id(weight)] = _stand_in(weight, velocity, substitute)
                present.append(weight)

        def release(*_: Any) -> None:
            for weight in present:
                table.pop(id(weight), None)
            present.clear()

        # after FSDP has gathered the weights, and before it lets them go
        before = self.module.register_forward_pre_hook(gather)
        return [before, self.module.register_forward_hook(release, prepend=True)]

    def check_that_it_ran(self) -> None:
        """Raise `ValueError` if the weights should have moved, and the module did not run."""
        if not self.has_run and any(p in self.velocities for p in self.parameters):
            raise ValueError(
                f"the weights of {type(self.module).__name__} have a gradient, but its forward did not run (was it "
                "called by another method?), so exact curvature did not see them move: use curvature='forward'"
            )


def _stand_in(weight: Tensor, velocity: Tensor, substitute: Substitute) -> Tensor:
    """What stands for a weight: of a `DTensor` the local part is replaced."""
    weight = weight.detach()
    return with_local(weight, substitute(local(weight), velocity.to(weight.dtype)))


def _refuse_strangers(velocities: Mapping[Tensor, Tensor], found: set[int]) -> None:
    strangers = [tuple(p.shape) for p in velocities if id(p) not in found]
    if strangers:
        raise ValueError(
            f"{len(strangers)} of the optimizer's parameters are not in the model (the first has shape "
            f"{strangers[0]}): pass the model that they belong to, or use curvature='forward'"
        )
