"""`Ranks.sum_by_name`: named numbers and tensors, summed over ranks by one reduction."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from rank_pool import Pool
from torch import Tensor

from gen_dist.parallel import Ranks

Sums = tuple[dict[str, float], dict[str, list[float]]]


def numbers(factor: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    return {"weight": 0.5 * factor, "failed": factor > 1}, {
        "products": factor * torch.tensor([1.0, -2.0, 0.25]),
        "rounded": torch.tensor([float(factor)], dtype=torch.bfloat16, requires_grad=True),
        "counts": torch.tensor([factor]),
        "empty": torch.zeros(0),
    }


def expected(factor: int, failed: float) -> Sums:
    products = [1.0 * factor, -2.0 * factor, 0.25 * factor]
    of_vectors = {"products": products, "rounded": [1.0 * factor], "counts": [1.0 * factor], "empty": []}
    return {"weight": 0.5 * factor, "failed": failed}, of_vectors


def test_one_process_is_the_identity() -> None:
    with patch.object(dist, "all_reduce", side_effect=AssertionError("a collective")):
        assert Ranks().sum_by_name(*numbers(1)) == expected(1, 0.0)


def test_numbers_alone_and_vectors_alone() -> None:
    assert Ranks().sum_by_name({"a": 1}, {}) == ({"a": 1.0}, {})
    assert Ranks().sum_by_name({}, {"b": torch.ones(2)}) == ({}, {"b": [1.0, 1.0]})


def summed() -> tuple[Sums, int]:
    """The sums of `numbers(1)` and `numbers(2)`, and how many all-reduces they took."""
    with patch.object(dist, "all_reduce", side_effect=dist.all_reduce) as all_reduce:
        return Ranks().sum_by_name(*numbers(1 + dist.get_rank())), all_reduce.call_count


@pytest.mark.timeout(60)
def test_ranks_get_the_sums_by_one_reduction(pool: Callable[[int], Pool]) -> None:
    for sums, reductions in pool(2).run(summed):
        assert sums == expected(3, 1.0)
        assert reductions == 1
