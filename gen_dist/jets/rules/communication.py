"""Functional collectives, which DTensors call inside a model. They are linear: each derivative is communicated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gen_dist.jets.jet import Jet, UnsupportedOperation
from gen_dist.jets.registry import rule
from gen_dist.jets.rules.terms import mapped
from gen_dist.torch_private import Operator

NAMESPACE = "_c10d_functional::"


@rule(
    *(
        NAMESPACE + name
        for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "broadcast")
    )
)
def _collective(operator: Operator, x: Jet, *args: Any) -> Any:
    if any(argument in ("max", "min", "product", "band", "bor", "bxor") for argument in args):
        raise UnsupportedOperation(operator)

    def finished(part: Tensor) -> Tensor:
        result: Tensor = torch.ops._c10d_functional.wait_tensor(operator(part, *args))
        return result

    return mapped(finished(x.value), finished, x)


@rule(NAMESPACE + "wait_tensor", NAMESPACE + "_wrap_tensor_autograd")
def _already_finished(_: Operator, x: Jet) -> Jet:
    return x
