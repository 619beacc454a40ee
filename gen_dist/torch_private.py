"""Every private name of PyTorch that this library uses, each with its reason.

Checked on torch 2.6.0, 2.13.0 and 2.14.1. A name that a later version changes is mended here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# --- tensors: one call for a whole list. Public optimizers are built on these; the public API has no list form.

foreach_add_ = torch._foreach_add_
foreach_copy_ = torch._foreach_copy_
foreach_div_ = torch._foreach_div_
foreach_lerp_ = torch._foreach_lerp_
foreach_mul = torch._foreach_mul
foreach_mul_ = torch._foreach_mul_
foreach_norm = torch._foreach_norm
foreach_sub = torch._foreach_sub
foreach_sub_ = torch._foreach_sub_

# Without the context manager: it can be undone in a function of its own, when an interrupt has cut the block short.
set_grad_enabled = torch._C._set_grad_enabled


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor as it is. `to_local()` would be recorded."""
    part: Tensor = getattr(tensor, "_local_tensor", tensor)
    return part


# --- modules: a tensor is replaced for a while, under its name


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's own buffers by name; writing here skips `__setattr__`."""
    return module._buffers


def forward_pre_hooks_of(module: nn.Module) -> dict[int, Any]:
    """The module's hooks by key: one whose handle an interrupt has lost can be removed."""
    return module._forward_pre_hooks


# --- optimizers


def patch_step(optimizer: Optimizer) -> None:
    """Give a class its hooks around `step`, as the constructor does; for an object whose class has just changed."""
    optimizer._patch_step_function()
