"""The loss as a function of the learning rate, and its parabola: to look at, not to train with.

All three functions are collective where ranks train together: every rank calls them, with its own slice of the data and
the same learning rates, and gets the values of the global loss. They change nothing: parameters, gradients, buffers,
optimizer and random state stay as they are, bit for bit. The optimizer may be any whose step is the learning rate times
a direction, converted by `as_gen_optimizer` or not. If it holds a direction, after `compute_param_updates()` or
`scheduler.step(...)`, they use that one. Otherwise they use the direction of a step with the present gradients,
averaged over plain replicas.

They take the loss as `GenScheduler.step` does: `criterion(model(x), y)`, or of a dict `x` and no criterion
`model(**x).loss`, or with `compute_loss=` `compute_loss(model, x)`; or `closure=`, a function that returns this rank's
loss; or `batches=`, a list of batches and closures, whose losses are averaged. `weight=` is this rank's share where
slices are unequal.

>>> import gen_dist as gen
>>> model = torch.nn.Linear(1, 1, bias=False)
>>> weight, x = torch.nn.init.ones_(model.weight), torch.ones(1, 1)
>>> optimizer = torch.optim.SGD(model.parameters())
>>> closure = lambda: (model(x) - 3.0).square().mean()  # (w - 3)^2, and w = 1
>>> closure().backward()  # d = -4
>>> gen.loss_per_learning_rate(model, None, optimizer, learning_rates=[0.0, 0.25, 0.5], closure=closure)
array([4., 1., 0.])
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from gen_dist.direction import Direction, GenOptimizer, direction_without_trace
from gen_dist.line import (
    BatchLoss,
    Criterion,
    Line,
    Method,
    Slice,
    as_slice,
    check_alike,
    estimator,
    measure,
    walk_over_ranks,
)
from gen_dist.parallel import Layout, Ranks
from gen_dist.restore import gradients_kept, restored_on_exit

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

__all__ = ["loss_per_learning_rate", "second_order_approximation", "second_order_approximation_coeffs"]

LONG = 3.0  # seconds after which a grid of rates is long enough for a progress bar


@restored_on_exit
def second_order_approximation_coeffs(
    model: nn.Module,
    criterion: Criterion | None,
    optimizer: Optimizer,
    x: Any = None,
    y: Any = None,
    loss: Tensor | None = None,
    *,
    closure: Callable[[], Tensor] | None = None,
    batches: Sequence[Any] | None = None,
    weight: float = 1.0,
    process_group: ProcessGroup | None = None,
    compute_loss: BatchLoss | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(phi(0), phi'(0), phi''(0) / 2)` of `phi(a) = L(theta - a d)`, exact: `phi' = -g.d` and `phi'' = d'Hd`.

    Scalars, float64, on the CPU, the same on every rank. `loss` replaces `phi(0)` where it is already known.
    """
    call = "second_order_approximation_coeffs(model, criterion, optimizer, "
    data = as_slice(model, criterion, x, y, closure, batches, weight, call=call, compute_loss=compute_loss)
    line, ranks = _line(model, optimizer, data, process_group)
    method = Method(estimator("exact"), 0.0, False, f"{len(data.micro_batches)} batch(es)")
    parabola = measure(line, ranks, method, finite=True, companions={}).parabola
    value, slope, half_curvature = torch.tensor(
        [parabola.loss, -parabola.numerator, parabola.denominator / 2], dtype=torch.float64
    )
    return (value if loss is None else loss.detach().double().cpu().reshape(()), slope, half_curvature)


def second_order_approximation(
    model: nn.Module,
    criterion: Criterion | None,
    optimizer: Optimizer,
    x: Any = None,
    y: Any = None,
    learning_rates: ArrayLike = (),
    loss: Tensor | None = None,
    *,
    closure: Callable[[], Tensor] | None = None,
    batches: Sequence[Any] | None = None,
    weight: float = 1.0,
    process_group: ProcessGroup | None = None,
    compute_loss: BatchLoss | None = None,
) -> NDArray[np.float64]:
    """The parabola `phi(0) + phi'(0) a + phi''(0)/2 a^2` at each learning rate `a`, as an array of their shape."""
    rates = _rates(learning_rates)
    coefficients = second_order_approximation_coeffs(
        model,
        criterion,
        optimizer,
        x,
        y,
        loss,
        closure=closure,
        batches=batches,
        weight=weight,
        process_group=process_group,
        compute_loss=compute_loss,
    )
    c0, c1, c2 = map(float, coefficients)
    return c0 + c1 * rates + c2 * rates**2


@restored_on_exit
def loss_per_learning_rate(
    model: nn.Module,
    criterion: Criterion | None,
    optimizer: Optimizer,
    x: Any = None,
    y: Any = None,
    learning_rates: ArrayLike = (),
    *,
    closure: Callable[[], Tensor] | None = None,
    batches: Sequence[Any] | None = None,
    weight: float = 1.0,
    process_group: ProcessGroup | None = None,
    compute_loss: BatchLoss | None = None,
    progress: bool | None = None,
) -> NDArray[np.float64]:
    """`phi(a) = L(theta - a d)` itself at each learning rate, one forward pass a point, as an array of their shape.

    `progress` shows a tqdm bar on rank 0: by default if tqdm is installed, standard error is a terminal, and the grid
    has already taken some seconds.
    """
    rates = _rates(learning_rates)
    call = "loss_per_learning_rate(model, criterion, optimizer, "
    data = as_slice(model, criterion, x, y, closure, batches, weight, call=call, compute_loss=compute_loss)
    line, ranks = _line(model, optimizer, data, process_group)
    points = rates.ravel().tolist()
    check_alike(f"learning_rates={points}", ranks)
    losses = walk_over_ranks(line, _with_bar(points, progress, ranks), ranks).losses
    return torch.tensor(losses, dtype=torch.float64).numpy().reshape(rates.shape)


def _line(
    model: nn.Module, optimizer: Optimizer, data: Slice, process_group: ProcessGroup | None
) -> tuple[Line, Ranks]:
    layout = Layout(model)
    ranks = layout.ranks(process_group)
    return Line(layout, _direction(optimizer, layout, ranks, data.weight), data), ranks


def _direction(optimizer: Optimizer, layout: Layout, ranks: Ranks, weight: float) -> Direction:
    """The held direction, or that of a step which leaves no trace. Collective."""
    if isinstance(optimizer, GenOptimizer) and optimizer.direction is not None:
        return optimizer.direction
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    with gradients_kept(layout.needs_averaging(parameters)):
        layout.average_gradients(parameters, ranks, weight)
        direction = direction_without_trace(optimizer)
    if not ranks.any(torch.tensor(bool(direction))).item():
        raise ValueError("the optimizer holds no direction and no gradients: call loss.backward() first")
    return direction


def _rates(learning_rates: ArrayLike) -> NDArray[np.float64]:
    try:
        import numpy as np
    except ImportError as error:
        raise ImportError('these curves are numpy arrays: pip install "gen_dist[plots]"') from error
    rates = np.asarray(learning_rates, dtype=np.float64)
    if rates.size == 0 or not np.isfinite(rates).all():
        raise ValueError(f"learning_rates must be finite numbers, at least one, got {learning_rates!r}")
    return rates


def _with_bar(points: list[float], progress: bool | None, ranks: Ranks) -> Sequence[float]:
    """The points, with a bar that shows how many are done."""
    if ranks.rank != 0 or progress is False or (progress is None and not sys.stderr.isatty()):
        return points
    try:
        from tqdm import tqdm
    except ImportError as error:
        if progress:
            raise ImportError("the progress bar is tqdm's: pip install tqdm, or leave progress out") from error
        return points
    return tqdm(points, desc="loss along the direction", delay=0 if progress else LONG, leave=False)
