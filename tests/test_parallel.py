"""`Ranks.sum_by_name`: named numbers and tensors, summed over ranks by one reduction."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from rank_pool import Pool
from torch import Tensor

from gen_dist.parallel import Ranks


class Numbers(TypedDict):
    weight: float
    products: Tensor
    failed: bool
    scalar: Tensor
    counts: Tensor
    empty: Tensor


def numbers(factor: int) -> Numbers:
    return {
        "weight": 0.5 * factor,
        "products": factor * torch.tensor([[1.0, -2.0], [3.0, 0.25]]).t(),
        "failed": factor > 1,
        "scalar": torch.tensor(float(factor), dtype=torch.bfloat16, requires_grad=True),
        "counts": torch.tensor([factor]),
        "empty": torch.zeros(0, 3),
    }


def assert_sums(total: Numbers, factor: int, failed: float) -> None:
    assert list(total) == list(numbers(1))
    for name, seen in total.items():
        one = numbers(1)[name]  # type: ignore[literal-required]
        if name == "failed":
            assert seen == failed
        elif isinstance(one, Tensor):
            assert isinstance(seen, Tensor)
            assert (seen.dtype, seen.device, seen.requires_grad) == (torch.float64, torch.device("cpu"), False)
            assert torch.equal(seen, factor * one.detach().double())
        else:
            assert seen == factor * one
        assert isinstance(seen, Tensor | float)


def test_one_process_is_the_identity() -> None:
    with patch.object(dist, "all_reduce", side_effect=AssertionError("a collective")):
        assert_sums(Ranks().sum_by_name(numbers(1)), 1, 0.0)


def test_the_sums_are_not_the_numbers_themselves() -> None:
    given = torch.ones(2, dtype=torch.float64)
    Ranks().sum_by_name({"given": given})["given"].zero_()
    assert torch.equal(given, torch.ones(2, dtype=torch.float64))


def summed() -> tuple[Numbers, list[int]]:
    """The sums over ranks of multiples 1, 2, ..., and the bytes of each all-reduce."""
    sizes: list[int] = []
    all_reduce = dist.all_reduce

    def counted(values: Tensor, **arguments: object) -> None:
        sizes.append(values.nbytes)
        all_reduce(values, **arguments)

    with patch.object(dist, "all_reduce", counted):
        return Ranks().sum_by_name(numbers(1 + dist.get_rank())), sizes


def test_ranks_are_summed_by_one_reduction(pool: Callable[[int], Pool]) -> None:
    for total, sizes in pool(2).run(summed):
        assert_sums(total, 1 + 2, 1.0)
        assert sizes == [8 * (1 + 4 + 1 + 1 + 1 + 0)]


CASES: dict[str, tuple[dict[str, float | Tensor], list[float]]] = {
    "floats alone": ({"a": 1.5, "b": -2.0}, [3.0, -4.0]),
    "tensors alone": ({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}, [2.0, 4.0, 6.0]),
    "a tensor first": ({"a": torch.tensor([1.0]), "b": 2.0, "c": torch.tensor([3.0])}, [2.0, 4.0, 6.0]),
}


def in_order(given: dict[str, float | Tensor]) -> list[float]:
    sums = Ranks().sum_by_name(given).values()
    return torch.cat([torch.as_tensor(value).flatten().double() for value in sums]).tolist()


@pytest.mark.parametrize(("given", "sums"), CASES.values(), ids=CASES)
def test_the_order_is_that_of_the_mapping(
    pool: Callable[[int], Pool], given: dict[str, float | Tensor], sums: list[float]
) -> None:
    assert pool(2).run(in_order, given) == [sums, sums]
