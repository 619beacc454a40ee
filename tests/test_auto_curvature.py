"""`curvature="auto"`: exact where it can be had, else forward; decided by all ranks together, and never an error."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from problems import parallel
from rank_pool import Pool
from torch import Tensor, nn

import gen_dist as gen
from gen_dist.jets import dispatch, registry


class Cube(torch.autograd.Function):
    """A custom function by NumPy, where jets cannot follow it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return torch.from_numpy(x.numpy() ** 3)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class Cubes(nn.Module):
    """A network through `Cube`, or through the same in PyTorch's own operators."""

    def __init__(self, custom: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inside, self.outside = nn.Linear(4, 8).double(), nn.Linear(8, 2).double()
        self.custom = custom

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inside(x)
        return self.outside(Cube.apply(hidden) if self.custom else hidden**3)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(6, n, dtype=torch.float64, generator=generator) for n in (4, 2))  # type: ignore[return-value]


def scheduled(model: nn.Module, curvature: str = "auto", **options: Any) -> gen.GenScheduler:
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=1e-3)
    return gen.GenScheduler(optimizer, model, F.mse_loss, curvature=curvature, **options)


def train(scheduler: gen.GenScheduler, steps: int = 3, **options: Any) -> list[float]:
    """The rates of some steps."""
    x, y = batch()
    rates = []
    for _ in range(steps):
        scheduler.optimizer.zero_grad()
        F.mse_loss(scheduler.model(x), y).backward()
        scheduler.step(x, y, **options) if not options else scheduler.step(**options)
        scheduler.optimizer.step()
        rates += scheduler.get_last_lr()
    return rates


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The warnings so far."""
    caplog.set_level(logging.WARNING, logger="gen_dist")
    return lambda: [record.getMessage() for record in caplog.records]


def test_it_is_exact_where_the_operators_allow_it(said: Callable[[], list[str]]) -> None:
    auto = scheduled(Cubes(custom=False))
    assert train(auto) == train(scheduled(Cubes(custom=False), "exact"))
    assert (auto.estimator.name, said()) == ("exact", [])


@pytest.mark.parametrize("probes", [1, 2])
def test_an_operator_without_a_rule_makes_it_forward(probes: int, said: Callable[[], list[str]]) -> None:
    auto = scheduled(Cubes(), probes=probes)
    assert train(auto) == train(scheduled(Cubes(), "forward", probes=probes))
    [warning] = said()
    assert "Cube" in warning
    assert "goes on by forward passes" in warning
    assert "use curvature" not in warning, "there is nothing to do"
    with pytest.raises(gen.UnsupportedOperation, match="Cube"):
        train(scheduled(Cubes(), "exact"))


def test_an_error_of_the_model_is_raised_and_decides_nothing() -> None:
    model = Cubes(custom=False)
    auto = scheduled(model)
    optimizer, (x, y) = auto.optimizer, batch()
    F.mse_loss(model(x), y).backward()
    with pytest.raises(RuntimeError, match=r"shape|size"):
        auto.step(x[:, :3], y)
    optimizer.step()
    train(auto)
    assert auto.estimator.name == "exact"


def test_a_wrong_rule_is_noticed_and_forward_goes_on(
    monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
) -> None:
    """A fault of this library: the self-check finds that jets do not compute what the model computes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    twin = copy.deepcopy(model)
    monkeypatch.setitem(registry.RULES, "tanh", lambda operator, x: x)
    monkeypatch.setattr(dispatch, "CHOSEN", {})
    with pytest.raises(RuntimeError, match="does not agree with an ordinary"):
        train(scheduled(copy.deepcopy(model), "exact"))
    rates = train(scheduled(model))
    assert rates == train(scheduled(twin, "forward"))
    assert ["does not agree with an ordinary" in text for text in said()] == [True]


def test_a_loss_that_is_another_at_each_call_is_declined(said: Callable[[], list[str]]) -> None:
    model, (x, y) = Cubes(custom=False), batch()
    auto, calls = scheduled(model), [0]

    def closure() -> Tensor:
        calls[0] += 1
        return F.mse_loss(model(x), y) * calls[0]

    for _ in range(2):
        auto.optimizer.zero_grad()
        closure().backward()
        auto.step(closure=closure)
        auto.optimizer.step()
    assert auto.last is not None
    assert auto.last.reason == "probes see another function than the one trained"
    assert auto.get_last_lr() == [1e-3]
    assert len(said()) == 2  # that it goes on by forward, and that it declines


def test_what_was_decided_is_saved(said: Callable[[], list[str]]) -> None:
    model = Cubes()
    auto = scheduled(model)
    train(auto)
    states = copy.deepcopy((model.state_dict(), auto.optimizer.state_dict(), auto.state_dict()))
    expected, before = train(auto), len(said())
    resumed = scheduled(Cubes())
    for part, state in zip((resumed.model, resumed.optimizer, resumed), states, strict=True):
        part.load_state_dict(state)  # type: ignore[attr-defined]
    assert train(resumed) == expected
    assert len(said()) == before, "it is not tried again"


def test_autogen_and_suggestions_use_it() -> None:
    model, (x, y) = Cubes(), batch()
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters())
    assert gen.AutoGen(optimizer, model).curvature == "auto"
    suggestion = gen.suggest_lr(model, optimizer, F.mse_loss, x, y)
    assert suggestion == gen.suggest_lr(model, optimizer, F.mse_loss, x, y, curvature="forward")


# ------------------------------------------------------------------------------------------------------- ranks


def decided(kind: str, only_on_rank: int | None) -> tuple[list[float], str]:
    """The rates and the estimator, where one rank alone, or all, come to the custom function."""
    custom = only_on_rank is None or dist.get_rank() == only_on_rank
    model = parallel(Cubes(custom), kind)
    auto = scheduled(model)
    rates = train(auto)
    auto.check_in_sync()
    return rates, auto.estimator.name


@pytest.mark.parametrize(
    ("kind", "only_on_rank"),
    [("replica", None), ("replica", 1), ("ddp", None), ("ddp", 0), ("fsdp1", None), ("fsdp2", None)],
)
def test_all_ranks_decide_alike(pool: Callable[[int], Pool], kind: str, only_on_rank: int | None) -> None:
    one, two = pool(2).run(decided, kind, only_on_rank)
    assert one == two
    assert one[1] == "forward"
    torch.testing.assert_close(one[0], train(scheduled(Cubes(), "forward")), rtol=1e-9, atol=0)
