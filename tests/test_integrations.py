"""Every trainer sets the rates of the plain loop: on any ranks, with its accumulation, clipping, precision, resume."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import integration_trainers as trainers
import pytest
from integration_trainers import STEPS, Rates, Setting
from rank_pool import Pool

PACKAGES = {"accelerate": "accelerate", "fabric": "lightning", "lightning": "lightning", "transformers": "transformers"}
TRAINERS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed"),
    )
    for name, package in PACKAGES.items()
]
pytestmark = [pytest.mark.timeout(90), pytest.mark.filterwarnings("ignore")]
Pools = Callable[[int], Pool]


def train(name: str, setting: Setting) -> Rates:
    with trainers.launched():
        return getattr(trainers, name)(setting)


def on_ranks(pool: Pools, ranks: int, name: str, setting: Setting) -> list[Rates]:
    """The rates of every rank."""
    return [train(name, setting)] if ranks == 1 else pool(ranks).run(train, name, setting)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", TRAINERS)
def test_rates_are_those_of_the_plain_loop(pool: Pools, name: str, ranks: int, accumulate: int) -> None:
    for rates in on_ranks(pool, ranks, name, Setting(accumulate)):
        assert rates == pytest.approx(trainers.plain(), rel=1e-10)


@pytest.mark.parametrize("name", TRAINERS)
def test_bfloat16(name: str) -> None:
    assert train(name, Setting(bfloat16=True)) == pytest.approx(trainers.plain(bfloat16=True), rel=1e-6)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", TRAINERS)
def test_a_run_that_was_cut_goes_on_with_the_same_rates(pool: Pools, name: str, ranks: int, tmp_path: Path) -> None:
    first = on_ranks(pool, ranks, name, Setting(2, directory=str(tmp_path), steps=3))
    second = on_ranks(pool, ranks, name, Setting(2, directory=str(tmp_path), resume=True))
    for before, after in zip(first, second, strict=True):
        assert before + after == pytest.approx(trainers.plain(), rel=1e-10)
        assert len(after) == STEPS - 3
