"""Functional collectives, which DTensors use inside a model: linear, so each derivative is communicated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from gen_dist.jets.jet import Jet, UnsupportedOperation, applied, as_jet
from gen_dist.jets.registry import rule

NAMESPACE = "_c10d_functional::"


@rule(
    *(
        NAMESPACE + name
        for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "broadcast")
    )
)
def _collective(operation: OpOverload, x: Jet, *args: Any) -> Any:
    if any(argument in ("max", "min", "product", "band", "bor", "bxor") for argument in args):
        raise UnsupportedOperation(operation)

    def finished(part: Tensor) -> Tensor:
        result: Tensor = torch.ops._c10d_functional.wait_tensor(operation(part, *args))
        return result

    return as_jet(finished(x.value), *(applied(finished, part) for part in x.current()))


@rule(NAMESPACE + "wait_tensor", NAMESPACE + "_wrap_tensor_autograd")
def _already_finished(_: OpOverload, x: Jet) -> Jet:
    return x
