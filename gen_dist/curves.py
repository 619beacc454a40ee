"""The loss as a function of the learning rate, and its parabola: to look at, not to train with.

All three functions are collective where ranks train together: every rank calls them, with its own slice of the data and
the same learning rates, and gets the values of the global loss. They change nothing: parameters, gradients, buffers,
optimizer and random state are as before, bit for bit. The optimizer may be any whose step is the learning rate times a
direction, converted by `as_gen_optimizer` or not. The direction is the one that it holds, after
`compute_param_updates()` or `scheduler.step(...)`; where it holds none, the one that it would take with the gradients
that are there, averaged over plain replicas.

What the loss is follows `GenScheduler.step`: `criterion(model(x), y)`, or `closure=`, a function that returns this
rank's loss, or `batches=`, a list of pairs and closures, whose losses are averaged; `weight=` is this rank's share
where slices are unequal.

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

from gen_dist.direction.optimizer import Direction, GenOptimizer, direction_without_trace
from gen_dist.line.data import Batch, Criterion, as_batches
from gen_dist.line.estimators import Exact
from gen_dist.line.line import Line
from gen_dist.line.measure import Request, check_alike, losses_together, reduce
from gen_dist.parallel import Layout, Ranks
from gen_dist.restore import gradients_kept, whole

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

__all__ = ["loss_per_learning_rate", "second_order_approximation", "second_order_approximation_coeffs"]

LONG = 3.0  # seconds after which a grid of rates is long enough for a progress bar


@whole
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
) -> tuple[Tensor, Tensor, Tensor]:
    """`(phi(0), phi'(0), phi''(0) / 2)` of `phi(a) = L(theta - a d)`, exact: `phi' = -g.d` and `phi'' = d'Hd`.

    Scalars, float64, on the CPU, the same on every rank. `loss` replaces `phi(0)` where it is already known.
    """
    call = "second_order_approximation_coeffs(model, criterion, optimizer, "
    slices = as_batches(model, criterion, x, y, closure, batches, weight == 0, call)
    line, ranks = _line(model, optimizer, slices, weight, process_group)
    request = Request(Exact(), 0.0, None, weight, True, False, f"{len(slices)} batch(es)")
    value, slope, curvature = torch.tensor(
        reduce([line], ranks, request, torch.zeros(0, dtype=torch.float64)).means[0], dtype=torch.float64
    )
    return (value if loss is None else loss.detach().double().cpu().reshape(()), slope, curvature / 2)


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
    )
    c0, c1, c2 = map(float, coefficients)
    return c0 + c1 * rates + c2 * rates**2


@whole
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
    progress: bool | None = None,
) -> NDArray[np.float64]:
    """`phi(a) = L(theta - a d)` itself at each learning rate, one forward pass a point, as an array of their shape.

    `progress` shows a bar on rank 0, with tqdm: by default where that is installed, standard error is a terminal, and
    the grid has taken some seconds already.
    """
    rates = _rates(learning_rates)
    call = "loss_per_learning_rate(model, criterion, optimizer, "
    slices = as_batches(model, criterion, x, y, closure, batches, weight == 0, call)
    line, ranks = _line(model, optimizer, slices, weight, process_group)
    points = rates.ravel().tolist()
    check_alike(f"learning_rates={points}", ranks)
    losses = losses_together(line, _with_bar(points, progress, ranks), ranks, weight)
    return torch.tensor(losses, dtype=torch.float64).numpy().reshape(rates.shape)


def _line(
    model: nn.Module, optimizer: Optimizer, slices: Sequence[Batch], weight: float, process_group: ProcessGroup | None
) -> tuple[Line, Ranks]:
    layout = Layout(model)
    ranks = layout.ranks(process_group)
    return Line(layout, _direction(optimizer, layout, ranks, weight), slices), ranks


def _direction(optimizer: Optimizer, layout: Layout, ranks: Ranks, weight: float) -> Direction:
    """The held direction, or the one of a step that leaves no trace. Collective."""
    if isinstance(optimizer, GenOptimizer) and optimizer.direction is not None:
        return optimizer.direction
    replicas = layout.needs_averaging([p for group in optimizer.param_groups for p in group["params"]])
    with gradients_kept(replicas):
        layout.average_gradients(replicas, ranks, weight)
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
    """The points, which show how many of them are done as one goes through them."""
    if ranks.rank != 0 or progress is False or (progress is None and not sys.stderr.isatty()):
        return points
    try:
        from tqdm import tqdm
    except ImportError as error:
        if progress:
            raise ImportError("the progress bar is tqdm's: pip install tqdm, or leave progress out") from error
        return points
    return tqdm(points, desc="loss along the direction", delay=0 if progress else LONG, leave=False)
