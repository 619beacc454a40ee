"""Fused attention."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload

from gen_dist.jet_rules.registry import aten, rule


@rule(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
def _attention(operation: OpOverload, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Fused attention, computed from its parts; only the first of the results is what a program sees."""
    names = [argument.name for argument in operation._schema.arguments]
    given = dict(zip(names[3:], args, strict=False)) | kwargs
    result, _ = aten._scaled_dot_product_attention_math(
        query,
        key,
        value,
        given.get("attn_mask", given.get("attn_bias")),
        given.get("dropout_p", 0.0),
        given.get("is_causal", False),
        scale=given.get("scale"),
    )
    unseen = [torch.empty(0) for _ in operation._schema.returns[1:]]
    return (result, *unseen)
