"""Loss functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gen_dist.jets.jet import derivatives
from gen_dist.jets.registry import refuse_jets, rule
from gen_dist.jets.rules.terms import mapped
from gen_dist.torch_private import Operator


@rule("nll_loss_forward", "nll_loss2d_forward")
def _nll_loss(operator: Operator, x: Any, *args: Any) -> Any:
    refuse_jets(operator, args)
    value, total_weight = operator(derivatives(x)[0], *args)
    return mapped(value, lambda d: operator(d, *args)[0], x), total_weight


def _reduced(loss: Any, reduction: int) -> Any:
    """Reduce by ATen's code: 0 is none, 1 is mean, 2 is sum."""
    return loss if reduction == 0 else loss.mean() if reduction == 1 else loss.sum()


@rule("multilabel_margin_loss_forward")
def _multilabel_margin(operator: Operator, x: Any, target: Tensor, reduction: int) -> Any:
    """Hinges between each class that is a target and each that is not; a row of targets ends before -1."""
    _, is_target = operator(derivatives(x)[0], target, reduction)
    given = target.reshape(-1, target.size(-1) if target.dim() else 1)
    rows, others = x.reshape(given.shape), is_target.reshape(given.shape) == 0
    wanted = (given >= 0).long().cumprod(1).bool()
    gaps = 1 - rows.gather(1, given.clamp_min(0)).unsqueeze(2) + rows.unsqueeze(1)
    counts = wanted.unsqueeze(2) & others.unsqueeze(1)
    hinges = torch.where(counts, gaps, torch.zeros((), dtype=x.dtype, device=target.device)).clamp_min(0)
    return _reduced((hinges.sum((1, 2)) / given.size(1)).reshape(target.shape[:-1]), reduction), is_target


@rule("mse_loss")
def _mse_loss(_: Operator, x: Any, target: Any, reduction: int = 1) -> Any:
    error = x - target
    return _reduced(error * error, reduction)


@rule("huber_loss")
def _huber_loss(_: Operator, x: Any, target: Any, reduction: int = 1, delta: float = 1.0) -> Any:
    error = x - target
    size = error.abs()
    near = derivatives(size)[0] < delta
    return _reduced(torch.where(near, 0.5 * error * error, delta * size - 0.5 * delta**2), reduction)


@rule("smooth_l1_loss")
def _smooth_l1_loss(_: Operator, x: Any, target: Any, reduction: int = 1, beta: float = 1.0) -> Any:
    error = x - target
    size = error.abs()
    near = derivatives(size)[0] < beta
    parabola = (0.5 / beta) * error * error if beta else size
    return _reduced(torch.where(near, parabola, size - 0.5 * beta), reduction)


@rule("binary_cross_entropy_with_logits")
def _binary_cross_entropy_with_logits(
    _: Operator, x: Any, target: Any, weight: Any = None, pos_weight: Any = None, reduction: int = 1
) -> Any:
    scale = 1 if pos_weight is None else 1 + (pos_weight - 1) * target
    loss = (1 - target) * x - scale * torch.nn.functional.logsigmoid(x)
    return _reduced(loss if weight is None else loss * weight, reduction)
