"""How a model is laid out over the ranks: the questions that the rest of this package asks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gen_dist.parallel import gathering, gradients
from gen_dist.parallel.kind import Kind
from gen_dist.parallel.placement import local
from gen_dist.parallel.ranks import Ranks
from gen_dist.parallel.replicas import Replicas
from gen_dist.restore import restoring

__all__ = ["KINDS", "Layout"]

KINDS: tuple[type[Kind], ...] = (Replicas,)
"""The kinds of parallelism. A tensor belongs to the first kind that holds it, in the end to `Replicas`."""

if dist.is_available():
    from gen_dist.parallel.ddp import DDP, wrapper_of
    from gen_dist.parallel.dtensor import DTensors
    from gen_dist.parallel.fsdp1 import FSDP1
    from gen_dist.parallel.fsdp2 import FSDP2

    KINDS = (DTensors, FSDP2, DDP, FSDP1, *KINDS)


class Layout:
    """How a model is laid out over the ranks.

    Made from the model as it is trained: wrap and shard it first. A model may mix kinds of parallelism.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.kinds = [kind(model) for kind in KINDS]

    def _kind_of(self, tensor: Tensor) -> Kind:
        for kind in self.kinds:  # not `next` of a generator: an interrupt while one is closed is lost
            if kind.holds(tensor):
                return kind
        raise AssertionError("replicas hold every tensor")

    def ranks(self, process_group: dist.ProcessGroup | None = None) -> Ranks:
        """The ranks that train together: of the group given here, else of the model's wrapper, else all ranks."""
        groups = [process_group, *(kind.process_group for kind in self.kinds)]
        return Ranks(next((group for group in groups if group is not None), None))

    def with_wrapper(self) -> Layout:
        """The layout of the DDP wrapper around the model, if the model was given without it; else this one."""
        if not dist.is_available() or not dist.is_initialized() or self.backward_communicates:
            return self
        wrapper = wrapper_of(self.model)
        return self if wrapper is None else Layout(wrapper)

    # --------------------------------------------------------------------------------------------- gradients

    def needs_averaging(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Those of the parameters whose gradients no wrapper averages over the ranks: plain replicas."""
        return [p for p in parameters if not self._kind_of(p).averages_gradients]

    def average_gradients(self, parameters: Sequence[Tensor], ranks: Ranks, weight: float = 1.0) -> None:
        """Average those gradients of the parameters that no wrapper averages. Collective.

        `weight` is this rank's share in the mean. A parameter that has a gradient on some ranks only counts as zero on
        the others, and has one on all afterwards.
        """
        if ranks.size > 1:
            gradients.average_gradients(self.needs_averaging(parameters), ranks, weight)

    def average_local_gradients(self, parameters: Sequence[Tensor], ranks: Ranks) -> None:
        """Average the gradients of all replicated parameters, after a backward pass without wrappers. Collective."""
        whole = [p for p in parameters if local(p) is p and self.replicas(p, ranks.size) == ranks.size]
        gradients.average_gradients(whole, ranks)

    def gradients_are_finite(self, parameters: Sequence[Tensor], ranks: Ranks) -> bool:
        """Whether the gradients hold no NaN or infinity, in any shard. Collective where they are sharded."""
        return gradients.gradients_are_finite(parameters, ranks, self.gradient_is_sharded(parameters))

    def gradients_not_finite(self, parameters: Sequence[Tensor], ranks: Ranks) -> Tensor:
        """1 where the gradients hold a NaN or infinity, or their norms overflow float32, else 0.

        A scalar of float32, for which the host does not wait. Collective where the gradients are sharded.
        """
        return gradients.gradients_not_finite(parameters, ranks, self.gradient_is_sharded(parameters))

    def gradient_is_sharded(self, parameters: Sequence[Tensor]) -> bool:
        """Whether ranks hold different parts of the gradient, so that none of them sees all of it."""
        return any(kind.gradient_is_sharded(parameters) for kind in self.kinds)

    # ------------------------------------------------------------------------------------------- who holds what

    def replicas(self, parameter: Tensor, ranks: int) -> int:
        """How many of `ranks` ranks hold the same part of the parameter as this rank does."""
        return self._kind_of(parameter).replicas(parameter, ranks)

    def holders(self, tensor: Tensor, ranks: Ranks) -> tuple[int, ...]:
        """Those ranks, this one among them, in ascending order. The tensor may also be of an optimizer's state."""
        return self._kind_of(tensor).holders(tensor, ranks)

    def holders_counting_steps(self, parameter: Tensor, ranks: Ranks) -> tuple[int, ...]:
        """The ranks whose optimizers count the steps of the parameter alike."""
        return self._kind_of(parameter).holders_counting_steps(parameter, ranks)

    @property
    def shards_have_placement(self) -> bool:
        """Whether every shard tells which part of the whole it is, so that it can be loaded on other ranks."""
        return all(kind.shards_have_placement for kind in self.kinds)

    # ---------------------------------------------------------------------------------------- running the model

    @property
    def forward_communicates(self) -> bool:
        """Whether ranks wait for each other in a forward pass, so that one that fails there must end the job."""
        return any(kind.forward_communicates for kind in self.kinds)

    @property
    def backward_communicates(self) -> bool:
        """Whether ranks wait for each other in a backward pass."""
        return any(kind.backward_communicates for kind in self.kinds)

    def compute_dtypes(self) -> set[torch.dtype]:
        """The floating point dtypes that weights have in a forward pass, their own and those of mixed precision."""
        dtypes = {dtype for kind in self.kinds for dtype in kind.compute_dtypes() if dtype is not None}
        dtypes |= {p.dtype for p in self.model.parameters()}
        return {dtype for dtype in dtypes if dtype.is_floating_point}

    @contextlib.contextmanager
    def without_wrappers(self) -> Iterator[None]:
        """Run the modules inside wrappers directly: a probe has nothing to synchronise and must not disturb them."""
        forwards = {wrapper: forward for kind in self.kinds for wrapper, forward in kind.inner_forwards().items()}

        def rewrap() -> None:
            for wrapper in forwards:
                wrapper.__dict__.pop("forward", None)

        with restoring(rewrap):
            for wrapper, forward in forwards.items():
                wrapper.forward = forward
            yield

    def check_step(self) -> None:
        """Raise `ValueError` where a step of the scheduler cannot work at present, with what to do instead."""
        for kind in self.kinds:
            kind.check_step()

    def reshard(self) -> None:
        """Let go of gathered weights. Needed between a forward pass and the next change of the shards.

        FSDP keeps the weights of its root after a forward pass and uses them again, so it would not see the change.
        """
        for kind in self.kinds:
            kind.reshard()

    def moving_weights(
        self, velocities: Mapping[Tensor, Tensor], substitute: gathering.Substitute
    ) -> AbstractContextManager[dict[int, Tensor]]:
        """A context manager with a table, by identity, of what stands for each weight in a forward pass of the model.

        `velocities` maps the optimizer's parameters to local parts, and `substitute(weight, velocity)` makes what
        stands for a weight. Weights that this rank holds as it uses them are in the table throughout. Those that a unit
        holds whole only while it runs are in the table for that time; their velocities are gathered then.

        Raises `ValueError` for a parameter that is not in the model, and for a unit that should have moved but did not
        run.
        """
        units = [unit for kind in self.kinds for unit in kind.gatherings(velocities)]
        return gathering.moving_weights(self.model, units, velocities, substitute)
