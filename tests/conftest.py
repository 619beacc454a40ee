"""Common to all tests: one thread, one seed, pools of ranks that are closed at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import rank_pool
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def float64() -> Iterator[None]:
    """Every new tensor in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], rank_pool.Pool]]:
    """`pool(n)` is a group of n ranks."""
    yield rank_pool.pool
    rank_pool.close_all()
