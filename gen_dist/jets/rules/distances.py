"""Distances of all pairs of rows. Autograd cannot differentiate them twice."""

from __future__ import annotations

from typing import Any

import torch

from gen_dist.jets.jet import derivatives
from gen_dist.jets.registry import rule
from gen_dist.torch_private import Operator


@rule("_cdist_forward")
def _between_rows(_: Operator, x: Any, y: Any, p: float, compute_mode: int | None = None) -> Any:
    return torch.linalg.vector_norm(x.unsqueeze(-2) - y.unsqueeze(-3), p, -1)


@rule("_pdist_forward")
def _within_rows(_: Operator, x: Any, p: float = 2) -> Any:
    rows, device = x.size(0), derivatives(x)[0].device
    first, second = torch.triu_indices(rows, rows, 1, device=device)
    return torch.linalg.vector_norm(x[first] - x[second], p, -1)
