"""The loss as a function of the learning rate, and its parabola: to look at, not to train with.

All three functions are collective where ranks train together: every rank calls them, and gets the values of the global
loss. They change nothing: parameters, gradients, buffers, optimizer and random state are as before, bit for bit.
The direction is the one that the optimizer holds, after `compute_param_updates()` or `scheduler.step(...)`; where it
holds none, the one that it would take with the gradients that are there.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from gen_dist.batch import Batch, Criterion
from gen_dist.collectives import Ranks
from gen_dist.line import Line
from gen_dist.optimizer import Direction, GenOptimizer, measure_direction
from gen_dist.sharding import Layout

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

__all__ = ["loss_per_learning_rate", "second_order_approximation", "second_order_approximation_coeffs"]


def second_order_approximation_coeffs(
    model: nn.Module,
    criterion: Criterion,
    optimizer: Optimizer,
    x: Any,
    y: Any,
    loss: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(phi(0), phi'(0), phi''(0) / 2)` of `phi(a) = L(theta - a d)`, exact: `phi' = -g.d` and `phi'' = d'Hd`.

    Scalars, float64, on the CPU, the same on every rank. `loss` replaces `phi(0)` where it is already known.
    """
    line, ranks = _line(model, criterion, optimizer, x, y)
    value, slope, curvature = _mean(ranks, line.jet().mean(0))
    return (value if loss is None else loss.detach().double().cpu().reshape(()), slope, curvature / 2)


def second_order_approximation(
    model: nn.Module,
    criterion: Criterion,
    optimizer: Optimizer,
    x: Any,
    y: Any,
    learning_rates: ArrayLike,
    loss: Tensor | None = None,
) -> NDArray[np.float64]:
    """The parabola `phi(0) + phi'(0) a + phi''(0)/2 a^2` at each learning rate `a`, as an array of their shape."""
    rates = _rates(learning_rates)
    c0, c1, c2 = map(float, second_order_approximation_coeffs(model, criterion, optimizer, x, y, loss))
    return c0 + c1 * rates + c2 * rates**2


def loss_per_learning_rate(
    model: nn.Module,
    criterion: Criterion,
    optimizer: Optimizer,
    x: Any,
    y: Any,
    learning_rates: ArrayLike,
) -> NDArray[np.float64]:
    """`phi(a) = L(theta - a d)` itself at each learning rate, one forward pass a point, as an array of their shape."""
    rates = _rates(learning_rates)
    line, ranks = _line(model, criterion, optimizer, x, y)
    losses = _mean(ranks, line.losses(rates.ravel().tolist()).mean(0))
    return losses.numpy().reshape(rates.shape)


def _line(model: nn.Module, criterion: Criterion, optimizer: Optimizer, x: Any, y: Any) -> tuple[Line, Ranks]:
    layout = Layout(model)
    return Line(layout, _direction(optimizer), [Batch(model, criterion, x, y)]), Ranks(layout.process_group)


def _direction(optimizer: Optimizer) -> Direction:
    """The held direction, or the one of a step that leaves no trace."""
    if isinstance(optimizer, GenOptimizer) and optimizer.direction is not None:
        return optimizer.direction
    state = optimizer.state
    optimizer.state = defaultdict(dict, {p: copy.deepcopy(of_p) for p, of_p in state.items()})
    try:
        return measure_direction(optimizer)
    finally:
        optimizer.state = state


def _mean(ranks: Ranks, values: Tensor) -> Tensor:
    return ranks.sum(values).cpu() / ranks.size


def _rates(learning_rates: ArrayLike | Sequence[float]) -> NDArray[np.float64]:
    try:
        import numpy as np
    except ImportError as error:
        raise ImportError('these curves are numpy arrays: pip install "gen_dist[plots]"') from error
    rates = np.asarray(learning_rates, dtype=np.float64)
    if rates.size == 0 or not np.isfinite(rates).all():
        raise ValueError(f"learning_rates must be finite numbers, at least one, got {learning_rates!r}")
    return rates
