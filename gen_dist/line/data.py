"""This rank's data and how to get its loss, however the user's script has it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

__all__ = ["Criterion", "MicroBatch", "Slice", "as_slice"]

Criterion: TypeAlias = Callable[..., Tensor]

TRAINERS = (
    ". A trainer that steps schedulers itself needs its integration: gen_dist.integrations.transformers.GenTrainer, "
    "lightning.GenCallback, accelerate.AcceleratedGen or torchtitan.GenMixin"
)


class MicroBatch:
    """Data that goes through the model at once: its loss is `criterion(model(x), y)`, or what a closure returns.

    `sign` multiplies the loss: -1 where the optimizer maximizes it.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion | None = None,
        x: Any = None,
        y: Any = None,
        closure: Callable[[], Tensor] | None = None,
        sign: float = 1.0,
    ) -> None:
        self.model, self.criterion, self.x, self.y, self.closure = model, criterion, x, y, closure
        self.sign = sign

    def output(self) -> Any:
        """The model's output."""
        return self.model(self.x)

    def loss(self) -> Tensor:
        """The loss, a scalar. Raises `TypeError` if it is no real tensor with one element."""
        if self.closure is not None:
            return self._signed(self.closure())
        return self.loss_of(self.output())

    def loss_of(self, output: Any) -> Tensor:
        """The loss of an output of the model."""
        assert self.criterion is not None
        return self._signed(self.criterion(output, self.y))

    def _signed(self, loss: Any) -> Tensor:
        scalar = _scalar(loss)
        return scalar if self.sign == 1 else self.sign * scalar


class Slice(NamedTuple):
    """This rank's part of a batch: micro-batches, whose losses are averaged, and its weight among the ranks' slices.

    `loss` holds losses that the training step has already computed, one for each micro-batch. `sign` is -1 where the
    optimizer maximizes the loss: then all losses here are the negative ones.
    """

    micro_batches: list[MicroBatch]
    weight: float = 1.0
    loss: Tensor | None = None
    sign: float = 1.0

    @property
    def programs(self) -> list[object]:
        """What runs besides the model: criteria and closures."""
        return [each.criterion if each.closure is None else each.closure for each in self.micro_batches]

    @property
    def has_closures(self) -> bool:
        """Whether a closure computes a loss, so that model and criterion cannot be told apart."""
        return any(each.closure is not None for each in self.micro_batches)


def as_slice(
    model: nn.Module,
    criterion: Criterion | None,
    x: Any = None,
    y: Any = None,
    closure: Callable[[], Tensor] | None = None,
    batches: Sequence[Any] | None = None,
    weight: float = 1.0,
    loss: Tensor | None = None,
    call: str = "scheduler.step(",
    sign: float = 1.0,
) -> Slice:
    """The slice that a call describes: `(x, y)`, a closure, or a list of such; nothing only where `weight` is 0.

    `call` is how the call begins, for error messages. Raises `ValueError` or `TypeError` that says what to type.
    """
    weight = _checked_weight(weight)
    given = [name for name, value in (("x", x), ("closure", closure), ("batches", batches)) if value is not None]
    if not given and weight == 0:
        return Slice([], weight, loss, sign)
    if len(given) != 1:
        raise ValueError(
            f"{call.partition('(')[0]} got {' and '.join(given) or 'no batch'}; type one of {call}x, y), "
            f"{call}closure=fn), {call}batches=[(x, y), ...])" + TRAINERS * (not given and "scheduler" in call)
        )
    if batches is None:
        batches = [closure if closure is not None else (x, y)]
    elif not batches:
        raise ValueError(f"{call}batches=[]): at least one batch is needed")
    if loss is not None:
        loss = sign * loss.detach()
    return Slice([_as_micro_batch(model, criterion, batch, call, sign) for batch in batches], weight, loss, sign)


def _as_micro_batch(model: nn.Module, criterion: Criterion | None, batch: Any, call: str, sign: float) -> MicroBatch:
    if callable(batch):
        return MicroBatch(model, closure=batch, sign=sign)
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        raise TypeError(f"a batch is a pair (x, y) or a closure that returns the loss, got {batch!r:.80}")
    x, y = batch
    if y is None:
        raise ValueError(f"{call}x) without a target: type {call}x, y) or {call}closure=fn)")
    if criterion is None:
        raise ValueError(
            f"{call}x, y) needs the criterion, which was not given: pass criterion=, or type {call}closure=fn) with a "
            "function that returns the loss"
        )
    return MicroBatch(model, criterion, x, y, sign=sign)


def _checked_weight(weight: Any) -> float:
    number = float(weight)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"weight must be a number >= 0, this rank's share of the batch, got {weight!r}")
    return number


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise TypeError(f"the loss must be a real tensor with one element, got {what}: return the mean over the batch")
    return loss.reshape(())
