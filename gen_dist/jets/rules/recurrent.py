"""LSTM and GRU layers as a whole: the inputs of all steps in one product, and a cell on plain tensors.

Run operator by operator, a layer would call some dozen operator rules at every step. Here a jet is the list of its
Taylor coefficients `x, x', x''/2`, with which a product is `(a b)_k = sum a_i b_(k-i)`, without factors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gen_dist.jets.jet import as_jet, derivatives, moves, wants_acceleration
from gen_dist.torch_private import plain_values, recurrent_layers, transforms_are_active

__all__ = ["covered", "recurrent"]

Taylor = list[Tensor]


def covered(function: Callable[..., Any], args: Any) -> bool:
    """Whether `recurrent` computes the function: LSTM and GRU of batches of equal length, without a projection."""
    if function not in recurrent_layers or len(args) != 9 or not isinstance(args[3], bool):
        return False
    x, state, weights, has_biases = args[:4]
    given = [x, *(state if isinstance(state, (list, tuple)) else [state]), *weights]
    followed = any(each.requires_grad for each in given)  # by autograd, in a loss that takes gradients
    autocast = torch.is_autocast_enabled(x.device.type)
    if not any(moves(each) for each in given):
        return False
    per_layer = (4 if has_biases else 2) * (2 if args[7] else 1)
    return not (followed or autocast or transforms_are_active()) and len(weights) == per_layer * args[4]


def recurrent(
    function: Callable[..., Any],
    x: Any,
    state: Any,
    weights: list[Any],
    has_biases: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Any, ...]:
    """Return what the functions that `nn.LSTM` and `nn.GRU` call return."""
    run, states = recurrent_layers[function]
    layer_of = {"lstm": _lstm, "gru": _gru}[run]
    x = x.transpose(0, 1) if batch_first else x
    start = [state] if states == 1 else list(state)
    directions = 2 if bidirectional else 1
    remaining, finals = iter(weights), []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            parameters = list(itertools.islice(remaining, 4 if has_biases else 2))
            given = x.flip(0) if direction else x
            output, *final = layer_of(given, [s[layer * directions + direction] for s in start], *parameters)
            outputs.append(output.flip(0) if direction else output)
            finals.append(final)
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
        if dropout and training and layer < layers - 1:
            x = torch.dropout(x, dropout, True)
    return (x.transpose(0, 1) if batch_first else x), *(torch.stack(each) for each in zip(*finals, strict=True))


def _taylor(x: Any, like: Tensor | None = None) -> Taylor:
    """Return the coefficients of a jet, as many as are wanted; those of its value and velocity inside a first order."""
    value, velocity, acceleration = derivatives(x)
    parts = [value, velocity, None if acceleration is None else acceleration / 2]
    return [torch.zeros_like(value) if part is None else part for part in parts[: 3 if wants_acceleration() else 2]]


def _jet(x: Taylor) -> Any:
    return as_jet(x[0], x[1], 2 * x[2] if len(x) > 2 else None)


def _times(a: Taylor, b: Taylor, added: Taylor | None = None) -> Taylor:
    """Return `a b + added`; what is added is overwritten."""
    total = [a[0] * b[k] if added is None else added[k].addcmul_(a[0], b[k]) for k in range(len(a))]
    for k in range(1, len(a)):
        for i in range(1, k + 1):
            total[k].addcmul_(a[i], b[k - i])
    return total


def _plus(a: Taylor, b: Taylor) -> Taylor:
    return [x + y for x, y in zip(a, b, strict=True)]


def _sigmoid(x: Taylor) -> Taylor:
    s = torch.sigmoid(x[0])
    slope = torch.addcmul(s, s, s, value=-1)
    return [s, *_chain(x, slope, lambda: 0.5 - s)]


def _tanh(x: Taylor) -> Taylor:
    t = torch.tanh(x[0])
    return [t, *_chain(x, 1 - t * t, lambda: -t)]


def _chain(x: Taylor, slope: Tensor, half_bend: Callable[[], Tensor]) -> Taylor:
    """Return the coefficients from the first on; `half_bend` is half of the second derivative over the first."""
    if len(x) == 2:
        return [slope * x[1]]
    return [slope * x[1], torch.addcmul(x[2], half_bend().mul_(x[1]), x[1]).mul_(slope)]


class _Recurrence:
    """`h W'` for the coefficients of `h`, stacked in one matrix, and those of a weight `W`."""

    def __init__(self, weight: Any, order: int, rows: int) -> None:
        self._parts = [None if part is None else part.t() for part in derivatives(weight)]
        if self._parts[2] is not None:
            self._parts[2] = self._parts[2] / 2
        self._order, self._rows = order, rows

    def __call__(self, h: Tensor, added: Tensor) -> Tensor:
        """Return `added + h W'`. Both have `order` times `rows` rows."""
        assert self._parts[0] is not None
        total = torch.addmm(added, h, self._parts[0])
        for k in range(1, self._order):
            part = self._parts[k]
            if part is not None:
                total[k * self._rows :].addmm_(h[: (self._order - k) * self._rows], part)
        return total


def _inputs(x: Any, weight: Any, bias: Any) -> Tensor:
    """Return `x W' + b` of all steps, with the shape `(time, coefficients * batch, gates)`."""
    gates = torch.stack(_taylor(torch.nn.functional.linear(x, weight, bias)), 1)
    return gates.flatten(1, 2)


def _lstm(x: Any, start: list[Any], w_x: Any, w_h: Any, b_x: Any = None, b_h: Any = None) -> tuple[Any, ...]:
    """Return the output of all steps and the last state. `tanh(g) = 2 sigmoid(2 g) - 1`, so all gates are alike."""
    h, c = (_taylor(each) for each in start)
    order, (rows, width) = len(h), h[0].shape
    doubled = torch.ones(4 * width, 1, dtype=x.dtype, device=x.device)
    doubled[2 * width : 3 * width] = 2
    bias = None if b_x is None else (b_x + b_h) * doubled[:, 0]
    gates = _inputs(x, w_x * doubled, bias)
    recurrence, outputs = _Recurrence(w_h * doubled, order, rows), []
    with plain_values():  # no dispatch mode looks at the steps
        stacked = torch.cat(h)
        for step in gates.unbind():
            opened = _sigmoid([*recurrence(stacked, step).view(order, rows, 4 * width).unbind()])
            i, f, g, o = ([each.chunk(4, 1)[k] for each in opened] for k in range(4))
            for each in g:
                each.mul_(2)
            g[0].sub_(1)
            c = _times(i, g, _times(f, c))
            stacked = torch.cat(_times(o, _tanh(c)))
            outputs.append(stacked)
        whole = torch.stack(outputs).view(len(outputs), order, rows, width)
    return _jet([*whole.unbind(1)]), _jet([*whole[-1].unbind()]), _jet(c)


def _gru(x: Any, start: list[Any], w_x: Any, w_h: Any, b_x: Any = None, b_h: Any = None) -> tuple[Any, ...]:
    gates = _inputs(x, w_x, b_x)
    (h,) = (_taylor(each) for each in start)
    order, (rows, width) = len(h), h[0].shape
    recurrence, outputs = _Recurrence(w_h, order, rows), []
    bias = None if b_h is None else _taylor(b_h)
    with plain_values():
        added = torch.zeros_like(gates[0]) if bias is None else torch.cat([b.expand(rows, -1) for b in bias])
        stacked = torch.cat(h)
        for step in gates.unbind():
            x_gates, h_gates = (each.view(order, rows, 3 * width) for each in (step, recurrence(stacked, added)))
            pairs = _sigmoid([*(x_gates[..., : 2 * width] + h_gates[..., : 2 * width]).unbind()])
            reset, update = [p[:, :width] for p in pairs], [p[:, width:] for p in pairs]
            new = _times(reset, [*h_gates[..., 2 * width :].unbind()])
            new = _tanh(_plus(new, [*x_gates[..., 2 * width :].unbind()]))
            h = _plus(new, _times(update, [a - b for a, b in zip(h, new, strict=True)]))
            stacked = torch.cat(h)
            outputs.append(stacked)
        whole = torch.stack(outputs).view(len(outputs), order, rows, width)
    return _jet([*whole.unbind(1)]), _jet(h)
