"""AutoGen: no rate, no schedule, no horizon; averaged weights; the same on N ranks as in one process."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from problems import BATCH, KINDS, Model, criterion, new_model, parallel, slice_here, whole
from rank_pool import Pool
from torch import Tensor, nn

import gen_dist as gen
from gen_dist import Auto, Averaging

STEPS = 20


def data(steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 11, (steps, BATCH, 6), generator=generator)
    return [(t[:, :-1], t[:, 1:]) for t in tokens]


Trace = tuple[list[float], dict[str, Tensor], dict[str, Tensor]]


def train(kind: str, lr: float = 1e-3, total_steps: int | None = None) -> Trace:
    """Rates, final weights and averaged weights."""
    inner = new_model()
    model = parallel(inner, kind)
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), lr=lr)
    average = True if total_steps else None
    scheduler = gen.AutoGen(optimizer, model, criterion, update_every=4, total_steps=total_steps, average=average)
    here = slice_here()
    rates = []
    for x, y in data():
        optimizer.zero_grad()
        criterion(model(x[here]), y[here]).backward()
        scheduler.step(x[here], y[here])
        optimizer.step()
        rates += scheduler.get_last_lr()
    weights = {name: whole(p) for name, p in inner.named_parameters()}
    with scheduler.averaged():
        averages = {name: whole(p) for name, p in inner.named_parameters()}
    return rates, weights, averages


@pytest.mark.parametrize("total_steps", [None, STEPS])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_same_on_ranks_as_in_one_process(
    pool: Callable[[int], Pool], ranks: int, kind: str, total_steps: int | None
) -> None:
    rates, weights, averages = train("replica", total_steps=total_steps)
    results = pool(ranks).run(train, kind, 1e-3, total_steps)
    for seen_rates, seen_weights, seen_averages in results:
        assert seen_rates == results[0][0], "bitwise equal on all ranks"
        assert seen_rates == pytest.approx(rates, rel=1e-10)
        for name in weights:
            torch.testing.assert_close(seen_weights[name], weights[name], rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(seen_averages[name], averages[name], rtol=1e-9, atol=1e-10)


def test_the_initial_rate_plays_no_part() -> None:
    small, large = train("replica", 1e-6), train("replica", 1e-1)
    assert small[0] == large[0]
    assert all(torch.equal(small[1][name], large[1][name]) for name in small[1])


def test_rates_follow_the_recipe_written_out() -> None:
    """Beside the rule as QUALITY states it, on derivatives by double backward."""
    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rates, numerator, denominator, settled, rate = [], 0.0, 0.0, 0, 0.0
    for step, (x, y) in enumerate(data()):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        if step % (4 if settled < 3 else 8) == 0:
            d = reference.direction(model, optimizer)
            weights = [*model.parameters()]
            _, slope, curvature = reference.derivatives(lambda x=x, y=y: criterion(model(x), y), weights, d)
            size = (sum(p.square().sum() for p in weights) / sum(v.square().sum() for v in d)).sqrt().item()  # type: ignore[union-attr]
            rate = rate or 5e-4 * size
            limit = rate * (1.09 ** (4 if step else 1) if settled < 3 else 1)
            if curvature > 0:
                numerator, denominator = 0.9 * numerator + 0.1 * slope, 0.9 * denominator + 0.1 * curvature
                target = min(numerator / denominator, 0.1 * size)
                settled += target < limit
                rate = min(target, limit)
            else:
                rate = min(limit, 0.1 * size)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        rates.append(rate)
        weights = [p.detach() for p in model.parameters()]
        if not step:
            averages = [w.clone() for w in weights]
        for weight, average in zip(weights, averages, strict=True):
            move = 13 / (step + 13) * (weight - average)
            average += move
            weight += 0.3 * move
    assert train("replica")[0] == pytest.approx(rates, rel=1e-9)


def test_a_known_horizon_decays_at_every_step() -> None:
    constant, decayed = train("replica")[0], train("replica", total_steps=STEPS)[0]
    assert decayed[:4] == pytest.approx([constant[0] * (1 - step / STEPS) for step in range(4)])
    assert decayed[-1] < 0.2 * max(decayed)


# ----------------------------------------------------------------------------------------- averaged weights


def small_problem(average: Averaging | None = None, **options: Any) -> tuple[gen.AutoGen, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=0.1, momentum=0.9)
    scheduler = gen.AutoGen(optimizer, model, F.cross_entropy, average=average, **options)
    return scheduler, torch.randn(16, 4).double(), torch.randint(0, 3, (16,))


def steps(scheduler: gen.AutoGen, x: Tensor, y: Tensor, count: int) -> list[list[Tensor]]:
    """Weights after each step."""
    seen = []
    for _ in range(count):
        scheduler.optimizer.zero_grad()
        F.cross_entropy(scheduler.model(x), y).backward()
        scheduler.step(x, y)
        scheduler.optimizer.step()
        seen.append([p.detach().clone() for p in scheduler.model.parameters()])
    return seen


def test_the_average_is_over_a_growing_window() -> None:
    scheduler, x, y = small_problem(Averaging(momentum=0))
    seen = steps(scheduler, x, y, 12)
    average = seen[0]
    for t, weights in enumerate(seen[1:], start=2):
        average = [a + 13 / (t + 12) * (w - a) for a, w in zip(average, weights, strict=True)]
    for _ in range(2):  # looking twice takes nothing twice
        with scheduler.averaged():
            for p, a in zip(scheduler.model.parameters(), average, strict=True):
                torch.testing.assert_close(p, a, rtol=1e-12, atol=1e-12)
    for p, w in zip(scheduler.model.parameters(), seen[-1], strict=True):
        assert torch.equal(p, w)


def test_momentum_is_the_interpolation_of_schedule_free() -> None:
    """`y = (1 - b) z + b x`, gradients at `y`, `z` makes `1 / (1 - b)` times the step, and `x` is the mean of `z`."""
    b = 0.75
    averaging = Averaging(power=3, momentum=b)  # (1 - b) (power + 1) = 1: all z weigh the same
    scheduler, x, y = small_problem(averaging, update_every=1, rule=Auto(settled_stride=1))  # always a direction
    steps(scheduler, x, y, 1)
    weights = [*scheduler.model.parameters()]
    ahead, mean = [p.detach().clone() for p in weights], [p.detach().clone() for p in weights]
    for step in range(2, 12):
        scheduler.optimizer.zero_grad()
        F.cross_entropy(scheduler.model(x), y).backward()
        scheduler.step(x, y)
        updates = [scheduler.optimizer.get_param_update(p).clone() for p in weights]
        scheduler.optimizer.step()
        for i, update in enumerate(updates):
            ahead[i] -= scheduler.get_last_lr()[0] / (1 - b) * update
            mean[i] += (ahead[i] - mean[i]) / (step + 3)
            torch.testing.assert_close(weights[i].detach(), (1 - b) * ahead[i] + b * mean[i], rtol=1e-10, atol=1e-10)
    with scheduler.averaged():
        for p, m in zip(scheduler.model.parameters(), mean, strict=True):
            torch.testing.assert_close(p, m, rtol=1e-10, atol=1e-10)


def test_training_weights_come_back_after_an_error() -> None:
    scheduler, x, y = small_problem()
    steps(scheduler, x, y, 5)
    before = copy.deepcopy(scheduler.model.state_dict())
    with pytest.raises(OSError, match="disk"), scheduler.averaged([x]):
        raise OSError("disk")
    assert all(torch.equal(v, before[k]) for k, v in scheduler.model.state_dict().items())


def test_looking_at_the_average_does_not_change_training() -> None:
    one, x, y = small_problem()
    two, _, _ = small_problem()
    steps(one, x, y, 10)
    for _ in range(10):
        steps(two, x, y, 1)
        with two.averaged([x]):
            two.model(x)
    assert all(torch.equal(p, q) for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True))


def test_batch_norm_statistics_are_made_anew_for_the_average() -> None:
    scheduler, x, y = small_problem()
    steps(scheduler, x, y, 8)
    with scheduler.averaged([x]):
        features = scheduler.model[0](x)
        torch.testing.assert_close(scheduler.model[1].running_mean, features.mean(0).detach())
        torch.testing.assert_close(scheduler.model[1].running_var, features.var(0).detach())


def test_the_average_is_in_the_checkpoint_and_can_be_exported() -> None:
    scheduler, x, y = small_problem()
    steps(scheduler, x, y, 7)
    file = io.BytesIO()
    torch.save([scheduler.state_dict(), scheduler.model.state_dict(), scheduler.optimizer.state_dict()], file)
    file.seek(0)
    state, weights, optimizer_state = torch.load(file, weights_only=True)
    fresh, _, _ = small_problem()
    fresh.load_state_dict(state)
    fresh.model.load_state_dict(weights)
    fresh.optimizer.load_state_dict(optimizer_state)
    for one, two in zip(steps(scheduler, x, y, 6), steps(fresh, x, y, 6), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(one, two, strict=True))
    one, two = scheduler.averaged_state_dict(), fresh.averaged_state_dict()
    assert one.keys() == scheduler.model.state_dict().keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_averages_that_are_not_there_say_so() -> None:
    scheduler, _, _ = small_problem()
    with pytest.raises(ValueError, match="no averaged weights yet"), scheduler.averaged():
        pass
    plain = gen.ExactGen(scheduler.optimizer, scheduler.model)
    with pytest.raises(ValueError, match="average=True"), plain.averaged():
        pass


def test_a_scheduler_with_averages_goes_as_soon_as_nobody_holds_it() -> None:
    """A cycle would keep a DDP model beyond its process group, and processes have aborted at their end for it."""
    scheduler, x, y = small_problem()
    steps(scheduler, x, y, 3)
    there = weakref.ref(scheduler)
    gc.disable()
    try:
        del scheduler
        assert there() is None
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------- uncertainty from ranks


def errors(kind: str) -> tuple[float | None, float | None]:
    model = parallel(new_model(), kind)
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=1e-2)
    scheduler = gen.ExactGen(optimizer, model, criterion)
    x, y = data()[0]
    here = slice_here()
    criterion(model(x[here]), y[here]).backward()
    scheduler.step(x[here], y[here])
    assert scheduler.last is not None
    return scheduler.last.numerator_error, scheduler.last.denominator_error


@pytest.mark.parametrize("kind", KINDS)
def test_standard_errors_come_from_how_the_slices_differ(pool: Callable[[int], Pool], kind: str) -> None:
    model: Model = new_model()
    x, y = data()[0]
    criterion(model(x), y).backward()
    weights = [*model.parameters()]
    d = [p.grad.clone() for p in weights if p.grad is not None]
    parts = [
        reference.derivatives(lambda a=a, b=b: criterion(model(a), b), weights, d)[1:]
        for a, b in zip(x.chunk(4), y.chunk(4), strict=True)
    ]
    expected: Any = torch.tensor(parts, dtype=torch.float64).std(0).div(2).tolist()  # a mean of four
    for seen in pool(4).run(errors, kind):
        assert seen == pytest.approx(expected, rel=1e-8)
    assert pool(1).run(errors, kind) == [(None, None)]


# ------------------------------------------------------------------------------------------- starts and clamps


def from_zero_weights(lr: float) -> tuple[list[float], list[str], float, float]:
    """Rates, reasons, and the first and the last loss of logistic regression that starts at zero weights."""
    torch.manual_seed(3)
    model = nn.Linear(6, 3).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=lr)
    scheduler = gen.AutoGen(optimizer, model, F.cross_entropy)
    x = torch.randn(64, 6).double()
    y = (x @ torch.randn(6, 3).double()).argmax(1)
    rates, reasons, losses = [], [], []
    for _ in range(200):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        scheduler.step(x, y)
        optimizer.step()
        rates += scheduler.get_last_lr()
        losses.append(loss.item())
        assert scheduler.last is not None
        reasons.append(scheduler.last.reason)
    return rates, reasons, losses[0], losses[-1]


def test_weights_that_are_zero_train_whatever_the_initial_rate_was() -> None:
    rates, reasons, first, last = from_zero_weights(1e-6)
    assert from_zero_weights(10.0)[0] == rates
    assert "not finite" not in reasons
    assert last < 0.5 * first


@pytest.mark.parametrize("lr", [0.3, 1e-9])
def test_a_first_measurement_that_is_not_finite_keeps_the_rate_inside_the_clamp(lr: float) -> None:
    model = nn.Linear(3, 1)
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=lr)
    scheduler = gen.AutoGen(optimizer, model, F.mse_loss, lr_min=1e-3, lr_max=0.1)
    x, y = torch.ones(4, 3), torch.zeros(4, 1)
    F.mse_loss(model(x), y).backward()
    x[0, 0] = torch.inf  # of the measurement alone: gradients are finite
    scheduler.step(x, y)
    assert scheduler.last is not None
    assert scheduler.last.reason == "not finite"
    assert optimizer.param_groups[0]["lr"] == scheduler.last.lr == min(max(lr, 1e-3), 0.1)
