"""Embeddings and losses."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload

from gen_dist.jets.jet import Jet, UnsupportedOperation, as_jet, derivatives
from gen_dist.jets.registry import rule


@rule("_embedding_bag", "_embedding_bag_forward_only")
def _embedding_bag(operation: OpOverload, weight: Any, *args: Any, **kwargs: Any) -> Any:
    names = [argument.name for argument in operation._schema.arguments]
    given = dict(zip(names[1:], args, strict=False)) | kwargs
    if given.get("mode", 0) == 2 or isinstance(given.get("per_sample_weights"), Jet):
        raise UnsupportedOperation(operation, "with mode 'max' or moving weights has no verified derivative")
    w0, w1, w2 = derivatives(weight)
    value, *rest = operation(w0, *args, **kwargs)
    moved = (None if d is None else operation(d, *args, **kwargs)[0] for d in (w1, w2))
    return as_jet(value, *moved), *rest


@rule("nll_loss_forward", "nll_loss2d_forward")
def _nll_loss(operation: OpOverload, x: Any, *args: Any) -> Any:
    if any(isinstance(argument, Jet) for argument in args):
        raise UnsupportedOperation(operation, "has a moving argument besides its first one")
    x0, x1, x2 = derivatives(x)
    value, total_weight = operation(x0, *args)
    return as_jet(value, *(None if d is None else operation(d, *args)[0] for d in (x1, x2))), total_weight


def _reduced(loss: Any, reduction: int) -> Any:
    """ATen's codes: 0 none, 1 mean, 2 sum."""
    return loss if reduction == 0 else loss.mean() if reduction == 1 else loss.sum()


@rule("mse_loss")
def _mse_loss(_: OpOverload, x: Any, target: Any, reduction: int = 1) -> Any:
    error = x - target
    return _reduced(error * error, reduction)


@rule("huber_loss")
def _huber_loss(_: OpOverload, x: Any, target: Any, reduction: int = 1, delta: float = 1.0) -> Any:
    error = x - target
    size = error.abs()
    near = derivatives(size)[0] <= delta
    return _reduced(torch.where(near, 0.5 * error * error, delta * size - 0.5 * delta**2), reduction)


@rule("smooth_l1_loss")
def _smooth_l1_loss(operation: OpOverload, x: Any, target: Any, reduction: int = 1, beta: float = 1.0) -> Any:
    error = x - target
    size = error.abs()
    near = derivatives(size)[0] < beta
    bowl = (0.5 / beta) * error * error if beta else size
    return _reduced(torch.where(near, bowl, size - 0.5 * beta), reduction)


@rule("binary_cross_entropy")
def _binary_cross_entropy(_: OpOverload, x: Any, target: Any, weight: Any = None, reduction: int = 1) -> Any:
    loss = -(target * torch.log(x).clamp_min(-100) + (1 - target) * torch.log(1 - x).clamp_min(-100))
    return _reduced(loss if weight is None else loss * weight, reduction)


@rule("binary_cross_entropy_with_logits")
def _binary_cross_entropy_with_logits(
    _: OpOverload, x: Any, target: Any, weight: Any = None, pos_weight: Any = None, reduction: int = 1
) -> Any:
    scale = 1 if pos_weight is None else 1 + (pos_weight - 1) * target
    loss = (1 - target) * x - scale * torch.nn.functional.logsigmoid(x)
    return _reduced(loss if weight is None else loss * weight, reduction)


@rule("xlogy")
def _xlogy(_: OpOverload, x: Any, y: Any) -> Any:
    zero = derivatives(x)[0] == 0
    y = torch.where(torch.as_tensor(zero), torch.ones_like(derivatives(y)[0]), y)
    return x * torch.log(y)
