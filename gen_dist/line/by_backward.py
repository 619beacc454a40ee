"""The loss and its slope along the direction by an ordinary forward and backward pass, as training computes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gen_dist.line.line import ROUNDINGS_OF_LOSS, Line, noting_precision
from gen_dist.line.measurement import inner_products
from gen_dist.parallel import Ranks, local
from gen_dist.restore import gradients_aside

__all__ = ["Ordinary", "by_backward"]


class Ordinary(NamedTuple):
    """What an ordinary pass computes, over all ranks.

    Attributes:
        loss: the mean loss.
        numerator: `<gradient, d>`.
        rounding: by how much rounding may change the loss, relative to it.
        draws_random_numbers: whether the pass drew random numbers, on any rank.
        clipped: whether `p.grad` is this pass's gradient made smaller, element by element, as clipping does.
        scale: `p.grad` over this pass's gradient where they are parallel, else 0.
    """

    loss: float
    numerator: float
    rounding: float
    draws_random_numbers: bool
    clipped: bool
    scale: float


def by_backward(line: Line, ranks: Ranks) -> Ordinary | None:
    """Run the model forward and backward on the line's data. Collective; changes nothing.

    Costs one training step, the memory of one more gradient, and on plain replicas and DDP one reduction of it. Returns
    None where that cannot be done: a trainer forbids calls of `backward()`, or shards meet in the forward pass and a
    rank has no data.
    """
    layout, data, count = line.layout, line.data, max(len(line.data.micro_batches), 1)
    parameters = [*dict.fromkeys([*(p for p, _ in line.direction.items()), *layout.model.parameters()])]
    total_weight = ranks.sum(torch.tensor(data.weight, dtype=torch.float64)).item()
    share = data.weight * ranks.size / total_weight if total_weight else 0.0  # the ranks' gradients are averaged evenly
    without_data = data.weight == 0 or not data.micro_batches
    if layout.forward_communicates and ranks.any(torch.tensor(without_data)).item():
        return None
    failed = False
    loss, rounding, drawn = torch.zeros(1, dtype=torch.float64), 0.0, False
    with (
        layout.without_wrappers(),
        line.state_kept(watching=True) as restart,
        gradients_aside(parameters) as given,
    ):
        try:
            with torch.enable_grad(), noting_precision(layout) as roundings:
                for each in () if without_data else data.micro_batches:  # the mean of nothing is NaN
                    value = each.loss()
                    if value.requires_grad:  # otherwise it does not depend on the weights
                        (value * (share / count)).backward()
                    loss = loss.to(value.device) + value.detach().double() / count
                    rounding = max(rounding, *roundings, ROUNDINGS_OF_LOSS * torch.finfo(value.dtype).eps)
            drawn = restart()
            layout.reshard()
        except Exception:
            if layout.forward_communicates:  # the others wait for this rank there
                raise
            failed = True
        if ranks.any(torch.tensor(failed)).item():
            return None
        layout.average_local_gradients(parameters, ranks)
        gradient = {p: p.grad for p in parameters if p.grad is not None}
        for parameter, _ in line.direction.items():
            if parameter.grad is None:  # the loss does not depend on it
                parameter.grad = torch.zeros_like(parameter)
        products = inner_products(layout, line.direction, ranks.size, norms=False)
        compared = _compared(gradient, given, data.sign)
    here = {"drawn": float(drawn), "rounding": rounding}
    vectors = {"loss": loss * share, "products": products, "compared": compared}
    total, sums = ranks.sum_by_name(here, vectors)
    outside, dot, square, given_square = sums["compared"]
    lengths = (square * given_square) ** 0.5
    return Ordinary(
        sums["loss"][0] / ranks.size,
        sums["products"][0],
        total["rounding"] / ranks.size,
        total["drawn"] > 0,
        clipped=outside == 0,
        scale=dot / square if lengths and dot > 0.99 * lengths else 0.0,
    )


@torch.no_grad()
def _compared(gradient: Mapping[Tensor, Tensor], given: Mapping[Tensor, Tensor], sign: float) -> Tensor:
    """Elements of `given` outside of zero and `gradient`, and the inner products of the two; sums of this rank."""
    sums: Sequence[Tensor] = [torch.zeros(4, dtype=torch.float64)]
    for parameter in gradient.keys() & given.keys():
        if gradient[parameter].is_sparse or given[parameter].is_sparse:
            continue
        own, was = local(gradient[parameter]).double(), sign * local(given[parameter]).double()
        if own.numel():
            slack = 1e-3 * own.abs().max()
            inside = (was * own >= -slack * slack) & (was.abs() <= own.abs() + slack)
            four = [(~inside).sum().double(), (own * was).sum(), own.square().sum(), was.square().sum()]
            sums = [*sums, torch.stack(four)]
    return torch.stack([each.to(sums[-1].device) for each in sums]).sum(0)
