"""What all tests share: one thread, one seed, and pools of ranks that are closed at the end."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import pytest
import rank_pool
import torch
import torchvision_for_cpus  # noqa: F401 - before anything imports transformers

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    if hasattr(torch.cpu.current_stream(), "record_event"):
        return
    skip = pytest.mark.skip(reason=f"torch {torch.__version__} cannot run FSDP2 on the CPU: its first forward fails")
    for item in items:
        if "fsdp2" in item.name or (hasattr(item, "function") and "fsdp2" in inspect.getsource(item.function)):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def float64() -> Iterator[None]:
    """Makes every new tensor in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], rank_pool.Pool]]:
    """`pool(n)` returns a group of `n` ranks, which stays up between tests."""
    yield rank_pool.pool
    rank_pool.close_all()
