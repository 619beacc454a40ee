"""A slice of data and how to get its loss, however the user's script has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

__all__ = ["Batch", "Criterion", "as_batches"]

Criterion: TypeAlias = Callable[..., Tensor]


class Batch:
    """One slice of data: `criterion(model(x), y)` is its loss, or what a closure returns."""

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion | None = None,
        x: Any = None,
        y: Any = None,
        closure: Callable[[], Tensor] | None = None,
    ) -> None:
        self.model, self.criterion, self.x, self.y, self.closure = model, criterion, x, y, closure

    def output(self) -> Any:
        return self.model(self.x)

    def loss(self) -> Tensor:
        if self.closure is not None:
            return _scalar(self.closure())
        return self.loss_of(self.output())

    def loss_of(self, output: Any) -> Tensor:
        assert self.criterion is not None
        return _scalar(self.criterion(output, self.y))


def as_batches(
    model: nn.Module,
    criterion: Criterion | None,
    x: Any = None,
    y: Any = None,
    closure: Callable[[], Tensor] | None = None,
    batches: Sequence[Any] | None = None,
    may_be_none: bool = False,
    call: str = "scheduler.step(",
) -> list[Batch]:
    """The batches of a call: `(x, y)`, a closure, or a list of such; none at all only where `may_be_none`.

    `call` is how the call begins, for errors. Raises `ValueError` or `TypeError` that says what to type.
    """
    given = [name for name, value in (("x", x), ("closure", closure), ("batches", batches)) if value is not None]
    if not given and may_be_none:
        return []
    if len(given) != 1:
        raise ValueError(
            f"{_name(call)} got {' and '.join(given) or 'no batch'}; type one of {call}x, y), "
            f"{call}closure=fn), {call}batches=[(x, y), ...])"
        )
    if batches is None:
        return [_as_batch(model, criterion, closure if closure is not None else (x, y), call)]
    if not batches:
        raise ValueError(f"{call}batches=[]): at least one batch is needed")
    return [_as_batch(model, criterion, batch, call) for batch in batches]


def _as_batch(model: nn.Module, criterion: Criterion | None, batch: Any, call: str) -> Batch:
    if callable(batch):
        return Batch(model, closure=batch)
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
    return Batch(model, criterion, x, y)


def _name(call: str) -> str:
    return call.partition("(")[0]


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise TypeError(f"the loss must be a real tensor with one element, got {what}: return the mean over the batch")
    return loss.reshape(())
