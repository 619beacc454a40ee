"""This rank's data and how to get its loss, however the user's script has it."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from types import FunctionType, MethodType
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

__all__ = ["BatchLoss", "Criterion", "MicroBatch", "Slice", "as_slice", "batches_of", "check_losses"]

Criterion: TypeAlias = Callable[..., Tensor]
"""`criterion(model(x), y)` is the loss."""

BatchLoss: TypeAlias = Callable[[nn.Module, Any], Tensor]
"""`compute_loss(model, batch)` is the loss."""

TRAINERS = (
    ". A trainer that steps schedulers itself needs its integration: gen_dist.integrations.transformers.GenTrainer, "
    "lightning.GenCallback, accelerate.AcceleratedGen or torchtitan.GenMixin; for others see gen_dist.RateAtStep"
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
        """Whether a function computes a loss as a whole, so that model and criterion cannot be told apart."""
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
    compute_loss: BatchLoss | None = None,
) -> Slice:
    """The slice that a call describes: a batch, a closure, or a list of such; nothing only where `weight` is 0.

    A batch is a pair `(x, y)`, whose loss is `criterion(model(x), y)`, or a mapping, whose loss the model returns:
    `model(**batch).loss`. With `compute_loss` it may be anything, and its loss is `compute_loss(model, batch)`.

    `call` is how the call begins, for error messages. Raises `ValueError` or `TypeError` that says what to type.
    """
    check_losses(criterion, compute_loss)
    weight = _checked_weight(weight)
    if weight == 0 and x is None and closure is None and batches is None:
        return Slice([], weight, loss, sign)
    if isinstance(x, Tensor) and y is None and compute_loss is None:
        raise ValueError(f"{call}x) without a target: type {call}x, y) or {call}closure=fn)")
    batches = batches_of(x, y, closure, batches, call)
    _check_bound([batch for batch in batches if callable(batch)], call)
    if loss is not None:
        loss = sign * loss.detach()
    return Slice(
        [_as_micro_batch(model, criterion, compute_loss, batch, call, sign) for batch in batches], weight, loss, sign
    )


def batches_of(
    x: Any = None,
    y: Any = None,
    closure: Callable[[], Tensor] | None = None,
    batches: Sequence[Any] | None = None,
    call: str = "scheduler.step(",
) -> Sequence[Any]:
    """The batches of a call: the pair `(x, y)`, `x` itself where there is no `y`, a closure, or a list of such."""
    given = [name for name, value in (("x", x), ("closure", closure), ("batches", batches)) if value is not None]
    if len(given) != 1:
        trainers = "" if given or "scheduler" not in call else TRAINERS
        raise ValueError(
            f"{call.partition('(')[0]} got {' and '.join(given) or 'no batch'}; type one of {call}x, y), {call}batch), "
            f"{call}closure=fn), {call}batches=[(x, y), ...]){trainers}"
        )
    if batches is None:
        return [closure if closure is not None else x if y is None else (x, y)]
    if not batches:
        raise ValueError(f"{call}batches=[]): at least one batch is needed")
    return batches


def check_losses(criterion: Any, compute_loss: Any) -> None:
    """Raise `TypeError` or `ValueError` where these cannot be what computes the loss."""
    if criterion is not None and not callable(criterion):
        raise TypeError(f"criterion must be callable as criterion(model(x), y), got {criterion!r}")
    if compute_loss is None:
        return
    if not callable(compute_loss):
        raise TypeError(f"compute_loss must be callable as compute_loss(model, batch), got {compute_loss!r}")
    if isinstance(compute_loss, nn.Module):
        name = type(compute_loss).__name__
        raise TypeError(f"compute_loss is called as compute_loss(model, batch): pass {name} as criterion=")
    if criterion is not None:
        raise ValueError("criterion and compute_loss both say what the loss is: pass one of them")


def _as_micro_batch(
    model: nn.Module,
    criterion: Criterion | None,
    compute_loss: BatchLoss | None,
    batch: Any,
    call: str,
    sign: float,
) -> MicroBatch:
    if callable(batch):
        return MicroBatch(model, closure=batch, sign=sign)
    if compute_loss is not None:
        return MicroBatch(model, closure=partial(compute_loss, model, batch), sign=sign)
    if isinstance(batch, Mapping):
        if criterion is not None:
            raise ValueError(
                f"{call}batch) with a dict takes the loss from the model, model(**batch).loss, and a criterion was "
                f"given, too: leave it out, or type {call}x, y), or pass compute_loss=lambda model, batch: ... instead"
            )
        return MicroBatch(model, closure=partial(_loss_of_model, model, batch), sign=sign)
    x, y = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
    if y is None:
        raise TypeError(
            "a batch is a pair (x, y), a dict whose loss is model(**batch).loss, or a closure that returns the loss, "
            f"got {batch!r:.80}: for other batches pass compute_loss=lambda model, batch: ..."
        )
    if criterion is None:
        raise ValueError(
            f"{call}x, y) needs the criterion, which was not given: pass criterion=, or "
            f"compute_loss=lambda model, batch: ..., or type {call}closure=fn) with a function that returns the loss"
        )
    return MicroBatch(model, criterion, x, y, sign=sign)


def _loss_of_model(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """The loss that the model returns, alone or in its output."""
    output = model(**batch)
    if isinstance(output, Tensor):
        return output
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise TypeError(
            f"model(**batch) returned {type(output).__name__} without a loss: does the batch hold the labels? Or pass "
            "compute_loss=lambda model, batch: ..., which returns the loss"
        )
    return loss


def _check_bound(closures: list[Any], call: str) -> None:
    """Raise `ValueError` where two closures are one function over the same variables: they see the same batch."""
    if len({_identity(closure) for closure in closures}) < len(closures):
        raise ValueError(
            f"the closures given to {call.partition('(')[0]} are one function over the same variables, so each would "
            "see the last batch of the loop. Give the batches themselves: "
            f"{call}batches=[batch1, batch2]) or [(x1, y1), (x2, y2)]. Or bind the batch: "
            "lambda x=x, y=y: criterion(model(x), y)"
        )


def _identity(closure: Any) -> Hashable:
    """The same for functions that compute the same: of one code, with the same variables and defaults."""
    function = closure.__func__ if isinstance(closure, MethodType) else closure
    if not isinstance(function, FunctionType):
        return id(closure)
    owner = closure.__self__ if isinstance(closure, MethodType) else None
    bound = [owner, *(function.__closure__ or ()), *(function.__defaults__ or ())]
    named = sorted((function.__kwdefaults__ or {}).items())
    values = (*map(id, bound), *((name, id(value)) for name, value in named))
    return (id(function.__code__), id(function.__globals__), values)


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
