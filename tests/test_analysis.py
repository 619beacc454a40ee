"""The curves: the loss along the direction and its parabola, in one process and on ranks. They change nothing."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
import torch.distributed as dist
import torch.nn.functional as F
from effects import assert_unchanged, forward_passes, local_snapshot, snapshot
from numpy.typing import NDArray
from problems import (
    BATCH,
    KINDS,
    OfDict,
    criterion,
    data,
    new_model,
    noisy_regression,
    parallel,
    perceptron,
    slice_here,
)
from rank_pool import Pool
from torch import Tensor, nn

import gen_dist as gen

RATES = np.array([[0.0, 1e-3], [1e-2, -1e-2]])


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


@pytest.mark.parametrize("held", ["held", "not held", "plain optimizer"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_curves(training: bool, held: str) -> None:
    model, x, y = noisy_regression(training)
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


FORMS = ["closure", "dict", "batches"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_batch(form: str) -> None:
    """Two micro-batches of four samples give the curves of the batch of eight."""
    _, x, y = noisy_regression()
    inner = perceptron(5, 7, 3).double()
    model = OfDict(inner)
    criterion: Any = F.mse_loss
    calls: dict[str, dict[str, Any]] = {
        "closure": {"closure": lambda: F.mse_loss(model({"input": x}), y)},
        "dict": {"x": {"input": x}, "y": y},
        "batches": {"batches": [({"input": x[:4]}, y[:4]), lambda: F.mse_loss(inner(x[4:]), y[4:])]},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3)
    F.mse_loss(inner(x), y).backward()
    d = reference.direction(model, optimizer)
    loss, slope, curvature = reference.derivatives(lambda: F.mse_loss(inner(x), y), [*model.parameters()], d)
    criterion = None if form == "closure" else F.mse_loss

    coefficients = gen.second_order_approximation_coeffs(model, criterion, optimizer, **calls[form])
    parabola = gen.second_order_approximation(model, criterion, optimizer, **calls[form], learning_rates=RATES)
    losses = gen.loss_per_learning_rate(model, criterion, optimizer, **calls[form], learning_rates=RATES)

    assert [c.item() for c in coefficients] == pytest.approx([loss, -slope, curvature / 2], rel=1e-9)
    np.testing.assert_allclose(parabola, loss - slope * RATES + curvature / 2 * RATES**2, rtol=1e-9)
    np.testing.assert_allclose(losses, true_losses(inner, x, y, d), rtol=1e-9)


def test_one_forward_pass_a_point_and_one_for_the_parabola() -> None:
    model, x, y = noisy_regression()
    optimizer = torch.optim.SGD(model.parameters())
    F.mse_loss(model(x), y).backward()
    arguments = model, F.mse_loss, optimizer, x, y, np.linspace(0, 1, 11)
    assert forward_passes(model, lambda: gen.loss_per_learning_rate(*arguments)) == 11
    assert forward_passes(model, lambda: gen.second_order_approximation(*arguments)) == 1


@pytest.mark.parametrize("progress", [True, None, False])
def test_a_progress_bar_on_a_terminal_or_on_demand(
    progress: bool | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, y = noisy_regression()
    optimizer = torch.optim.SGD(model.parameters())
    F.mse_loss(model(x), y).backward()
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        monkeypatch.setattr("gen_dist.curves.LONG", 0.0)
        gen.loss_per_learning_rate(model, F.mse_loss, optimizer, x, y, RATES, progress=progress)
        shown = capsys.readouterr().err
        assert ("/4" in shown) == (progress is True or (progress is None and terminal))


def test_a_short_grid_has_no_progress_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = noisy_regression()
    optimizer = torch.optim.SGD(model.parameters())
    F.mse_loss(model(x), y).backward()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    gen.loss_per_learning_rate(model, F.mse_loss, optimizer, x, y, RATES)
    assert capsys.readouterr().err == ""


class Counting(torch.optim.SGD):
    """Counts its steps in its groups, and draws a random number in each."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
        torch.rand(1)
        return super().step(closure)


def test_an_optimizer_that_counts_its_steps_in_its_groups_is_left_as_it_was() -> None:
    model, x, y = noisy_regression()
    optimizer = Counting(model.parameters(), lr=torch.tensor(0.1), momentum=0.9)
    rate = optimizer.param_groups[0]["lr"]
    F.mse_loss(model(x), y).backward()
    optimizer.step()
    before = snapshot(model, optimizer)
    gen.loss_per_learning_rate(model, F.mse_loss, optimizer, x, y, RATES)
    assert_unchanged(before, snapshot(model, optimizer))
    assert optimizer.param_groups[0]["lr"] is rate


def test_its_count_agrees_with_its_weights_where_a_closure_fails() -> None:
    """The direction that was found is kept: the next step of the optimizer is the one that was counted."""
    model, x, y = noisy_regression()
    optimizer = gen.make_gen_optimizer(Counting, model.parameters(), lr=0.1, momentum=0.9)
    scheduler = gen.ExactGen(optimizer, model)
    F.mse_loss(model(x), y).backward()
    expected = [p.detach() - 0.1 * p.grad for p in model.parameters() if p.grad is not None]

    def fails() -> Tensor:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        scheduler.step(closure=fails)
    optimizer.step()
    assert optimizer.param_groups[0]["count"] == 1
    for p, e in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), e)


def test_without_a_direction_or_with_an_optimizer_that_has_none() -> None:
    model, x, y = noisy_regression()
    with pytest.raises(ValueError, match=r"call loss\.backward\(\) first"):
        gen.loss_per_learning_rate(model, F.mse_loss, torch.optim.SGD(model.parameters()), x, y, RATES)
    F.mse_loss(model(x), y).backward()
    with pytest.raises(TypeError, match="LBFGS searches along its direction itself"):
        gen.loss_per_learning_rate(model, F.mse_loss, torch.optim.LBFGS(model.parameters()), x, y, RATES)
    with pytest.raises(ValueError, match=r"loss_per_learning_rate got no batch; type one of"):
        gen.loss_per_learning_rate(model, F.mse_loss, torch.optim.SGD(model.parameters()), learning_rates=RATES)


@pytest.mark.parametrize("rates", [[], [float("nan")]])
def test_a_grid_without_rates_is_refused(rates: list[float]) -> None:
    model, x, y = noisy_regression()
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
            assert value == pytest.approx(at_rate(float(rate), d), rel=1e-9)


def curves_of_unequal_slices(kind: str) -> tuple[bool, NDArray[Any], list[float]]:
    """With a plain optimizer, which holds no direction, with closures, and with an explicit process group."""
    x, y = data()[0]
    here = slice_here("unequal")
    model = parallel(new_model(), kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    x, y = x[here], y[here]
    loss = criterion(model(x), y)
    (loss if kind == "replica" else loss * len(x) / BATCH * dist.get_world_size()).backward()
    before = local_snapshot(model, optimizer)
    how: Any = {"closure": lambda: criterion(model(x), y), "weight": len(x), "process_group": dist.group.WORLD}
    losses = gen.loss_per_learning_rate(model, None, optimizer, learning_rates=RATES, **how)
    coefficients = gen.second_order_approximation_coeffs(model, None, optimizer, **how)
    unchanged = all(torch.equal(b, a) for b, a in zip(before, local_snapshot(model, optimizer), strict=True))
    return unchanged, losses, [c.item() for c in coefficients]


@pytest.mark.parametrize("kind", KINDS)
def test_curves_of_unequal_slices(pool: Callable[[int], Pool], kind: str) -> None:
    x, y = data()[0]
    model = new_model()
    criterion(model(x), y).backward()
    d = reference.direction(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    weights = [*model.parameters()]
    loss, slope, curvature = reference.derivatives(lambda: criterion(model(x), y), weights, d)
    for unchanged, losses, coefficients in pool(2).run(curves_of_unequal_slices, kind):
        assert unchanged
        assert coefficients == pytest.approx([loss, -slope, curvature / 2], rel=1e-7)
        for rate, value in zip(RATES.ravel(), losses.ravel(), strict=True):
            assert value == pytest.approx(at_rate(float(rate), d), rel=1e-9)


def at_rate(rate: float, d: list[Tensor]) -> float:
    x, y = data()[0]
    moved = new_model()
    with torch.no_grad():
        for p, v in zip(moved.parameters(), d, strict=True):
            p.sub_(rate * v)
        return criterion(moved(x), y).item()


def other_rates_on_each_rank() -> str:
    model = new_model()
    x, y = data()[0]
    criterion(model(x), y).backward()
    rates = np.arange(1 + dist.get_rank())
    try:
        gen.loss_per_learning_rate(model, criterion, torch.optim.SGD(model.parameters()), x, y, rates)
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_with_other_rates_are_told(pool: Callable[[int], Pool]) -> None:
    for told in pool(2).run(other_rates_on_each_rank):
        assert told.startswith("the ranks disagree on settings")
