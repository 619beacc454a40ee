"""Fused attention."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gen_dist.jets.jet import UnsupportedOperation, as_jet, derivatives, wants_acceleration
from gen_dist.jets.registry import aten, rule
from gen_dist.jets.rules.products import matrix_product
from gen_dist.torch_private import Operator, arguments_by_name, name_of, schema_of

# How many scores are in memory at once, or the scores of one head if that is more. A GPU gets larger parts, since
# each part costs kernel launches.
SCORES, SCORES_ON_CPU = 2**24, 2**17


@rule(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
def _attention(operator: Operator, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    """`softmax(scale q k' + mask) v`, a few heads at a time. Programs only see the first of the results."""
    given = arguments_by_name(operator, query, key, value, *args, **kwargs)
    scale = given.get("scale")
    how = _Settings(
        1 / math.sqrt(query.size(-1)) if scale is None else scale,
        given.get("is_causal", False),
        given.get("attn_mask", given.get("attn_bias")),
        given.get("dropout_p", 0.0),
        query.size(1) // key.size(1),
    )
    batch, heads = query.shape[:2]
    if how.mask is None:
        scores = query.size(2) * key.size(2)  # of one head
        most = SCORES_ON_CPU if query.device.type == "cpu" else SCORES
        batch = max(most // (heads * scores), 1)
        heads = min(how.groups * max(most // (how.groups * scores), 1), heads)
    rows = []
    for q, k, v in zip(*(x.split(batch) for x in (query, key, value)), strict=True):
        of_heads = q.split(heads, 1), k.split(heads // how.groups, 1), v.split(heads // how.groups, 1)
        rows.append(_joined([_mixed(*some, how) for some in zip(*of_heads, strict=True)], 1))
    mixed = _joined(rows, 0)
    order = _order_of_result(operator, _order(query))
    if order != _order(mixed):
        mixed = mixed.permute(order).contiguous().permute([order.index(k) for k in range(4)])
    return (mixed, *(torch.empty(0) for _ in schema_of(operator).returns[1:]))


@rule(
    "_scaled_dot_product_flash_attention_for_cpu_backward",
    "_scaled_dot_product_flash_attention_backward",
    "_scaled_dot_product_efficient_attention_backward",
    "_scaled_dot_product_cudnn_attention_backward",
    "_scaled_dot_product_fused_attention_overrideable_backward",
)
def _gradient(operator: Operator, *args: Any, **kwargs: Any) -> Any:
    """A loss that takes a gradient itself comes here. What the operator keeps for it is not computed."""
    raise UnsupportedOperation(operator, "inside a loss that takes gradients has no operator rule")


def _order(x: Any) -> tuple[int, ...]:
    """Return the dimensions, the largest stride first."""
    return tuple(sorted(range(x.dim()), key=lambda k: -x.stride(k)))


@functools.cache
def _order_of_result(operator: Operator, order: tuple[int, ...]) -> tuple[int, ...]:
    """Return the order in which an operator lays out its result, for a query of this order.

    A program sees it where it draws a mask of dropout, which fills memory one element after another.
    """
    if name_of(operator) == "_scaled_dot_product_efficient_attention":
        return 0, 2, 1, 3
    if name_of(operator) != "_scaled_dot_product_flash_attention_for_cpu":
        return order
    small = torch.zeros(2, 2, 2, 2).permute([order.index(k) for k in range(4)])  # kernels differ between versions
    return _order(operator(small, small, small)[0])


class _Settings(NamedTuple):
    scale: float
    causal: bool
    mask: Any
    dropout: float
    groups: int  # how many heads share a key and a value


def _joined(parts: list[Any], dimension: int) -> Any:
    return torch.cat(parts, dimension) if len(parts) > 1 else parts[0]


def _mixed(q: Any, k: Any, v: Any, how: _Settings) -> Any:
    """Return the attention of some heads. All arguments have the shape `(batch, heads, time, width)`."""
    shape = q.shape[:2]
    if how.groups > 1:
        k, v = k.repeat_interleave(how.groups, 1), v.repeat_interleave(how.groups, 1)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = matrix_product(aten.bmm.default, q, k.transpose(1, 2))
    for part in derivatives(scores):
        if part is not None:
            part.mul_(how.scale)
    if how.causal:
        value = derivatives(scores)[0]
        value.masked_fill_(torch.ones_like(value[0], dtype=torch.bool).triu_(1), -math.inf)
    if how.mask is None:
        weights = _softmax_in_place(*derivatives(scores))
    else:  # the mask may hide all keys from a query, which then gets zero
        weights = aten._safe_softmax(torch.add(scores.unflatten(0, shape), how.mask).flatten(0, 1), -1)
    if how.dropout:
        weights = torch.dropout(weights, how.dropout, True)
    return matrix_product(aten.bmm.default, weights, v).unflatten(0, shape)


def _softmax_in_place(x0: Tensor, x1: Tensor | None, x2: Tensor | None) -> Any:
    """Return the softmax along the last dimension. The derivatives of `x` are overwritten."""
    y = torch.softmax(x0, -1)
    if x1 is not None:
        x1 -= (y * x1).sum(-1, keepdim=True)
        if wants_acceleration():
            x2 = x1 * x1 if x2 is None else x2.addcmul_(x1, x1)
        x1 *= y
    if x2 is not None:
        x2 -= (y * x2).sum(-1, keepdim=True)
        x2 *= y
    return as_jet(y, x1, x2)
