"""The curves: the loss along the direction and its parabola, in one process and on ranks, changing nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rank_pool import Pool
from test_distributed import BATCH, KINDS, criterion, data, new_model, parallel, slice_here
from torch import Tensor, nn

import gen_dist as gen

RATES = np.array([[0.0, 1e-3], [1e-2, -1e-2]])


def problem(training: bool = True) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(0.3), nn.Linear(7, 3)).double()
    return model.train(training), torch.randn(8, 5).double(), torch.randn(8, 3).double()


def true_losses(model: nn.Module, x: Tensor, y: Tensor, d: list[Tensor]) -> NDArray[Any]:
    random = torch.get_rng_state()

    def at(rate: float) -> float:
        moved = copy.deepcopy(model)
        torch.set_rng_state(random)
        with torch.no_grad():
            for p, v in zip(moved.parameters(), d, strict=True):
                p.sub_(rate * v)
            return F.mse_loss(moved(x), y).item()

    losses = np.vectorize(at)(RATES)
    torch.set_rng_state(random)
    return losses


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    gradients = [p.grad for p in model.parameters()]
    return copy.deepcopy([model.state_dict(), gradients, optimizer.state_dict(), torch.get_rng_state()])


def assert_unchanged(before: Any, after: Any) -> None:
    if isinstance(before, Tensor):
        assert torch.equal(before, after)
    elif isinstance(before, dict):
        assert before.keys() == after.keys()
        for key in before:
            assert_unchanged(before[key], after[key])
    elif isinstance(before, (list, tuple)):
        for b, a in zip(before, after, strict=True):
            assert_unchanged(b, a)
    else:
        assert before == after


@pytest.mark.parametrize("held", ["held", "not held", "plain optimizer"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_curves(training: bool, held: str) -> None:
    model, x, y = problem(training)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=0.3)
    if held != "plain optimizer":
        optimizer = gen.as_gen_optimizer(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        if _ == 0:
            optimizer.step()
    d = reference.direction(model, optimizer)
    if isinstance(optimizer, gen.GenOptimizer) and held == "held":
        optimizer.compute_param_updates()
    before = snapshot(model, optimizer)

    losses = gen.loss_per_learning_rate(model, F.mse_loss, optimizer, x, y, RATES)
    coefficients = gen.second_order_approximation_coeffs(model, F.mse_loss, optimizer, x, y)
    parabola = gen.second_order_approximation(model, F.mse_loss, optimizer, x, y, RATES)

    assert_unchanged(before, snapshot(model, optimizer))
    random = torch.get_rng_state()
    np.testing.assert_allclose(losses, true_losses(model, x, y, d), rtol=1e-9)
    loss, slope, curvature = reference.derivatives(lambda: F.mse_loss(model(x), y), [*model.parameters()], d)
    torch.set_rng_state(random)
    assert [c.item() for c in coefficients] == pytest.approx([loss, -slope, curvature / 2], rel=1e-7)
    np.testing.assert_allclose(parabola, loss - slope * RATES + curvature / 2 * RATES**2, rtol=1e-9)
    given = gen.second_order_approximation_coeffs(model, F.mse_loss, optimizer, x, y, loss=torch.tensor(7.0))
    assert given[0] == 7.0


@pytest.mark.parametrize("rates", [[], [float("nan")]])
def test_a_grid_without_rates_is_refused(rates: list[float]) -> None:
    model, x, y = problem()
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters())
    with pytest.raises(ValueError, match="learning_rates must be finite numbers"):
        gen.loss_per_learning_rate(model, F.mse_loss, optimizer, x, y, rates)


def curves_on_ranks(kind: str) -> tuple[NDArray[Any], list[float]]:
    x, y = data()[0]
    here = slice_here()
    model = parallel(new_model(), kind)
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=0.1)
    # replicas need the global gradient for the global direction; the scheduler averages it
    scheduler = gen.ExactGen(optimizer, model, criterion)
    criterion(model(x[here]), y[here]).backward()
    scheduler.step(x[here], y[here])
    losses = gen.loss_per_learning_rate(model, criterion, optimizer, x[here], y[here], RATES)
    coefficients = gen.second_order_approximation_coeffs(model, criterion, optimizer, x[here], y[here])
    return losses, [c.item() for c in coefficients]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_curves_of_the_global_loss(pool: Callable[[int], Pool], ranks: int, kind: str) -> None:
    x, y = data()[0]
    assert len(x) == BATCH
    model = new_model()
    criterion(model(x), y).backward()
    weights = [*model.parameters()]
    d = [p.grad.clone() for p in weights if p.grad is not None]
    loss, slope, curvature = reference.derivatives(lambda: criterion(model(x), y), weights, d)
    results = pool(ranks).run(curves_on_ranks, kind)
    for losses, coefficients in results:
        assert np.array_equal(losses, results[0][0])
        assert coefficients == pytest.approx([loss, -slope, curvature / 2], rel=1e-9)
        for rate, value in zip(RATES.ravel(), losses.ravel(), strict=True):
            with torch.no_grad():
                moved = new_model()
                for p, v in zip(moved.parameters(), d, strict=True):
                    p.sub_(float(rate) * v)
                assert value == pytest.approx(criterion(moved(x), y).item(), rel=1e-9)
