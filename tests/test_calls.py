"""Calls that cannot be meant are refused with what to type; those that may be meant are warned of once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import reference
import torch
import torch.distributed as dist
import torch.nn.functional as F
from effects import Collectives
from problems import criterion, data, new_model, slice_here
from rank_pool import Pool
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gen_dist as gen

CURVATURES = ["exact", "forward"]
ORDER = r"type loss.backward\(\), then scheduler.step\(x, y\), then optimizer.step\(\)"


class Loop:
    """A regression in training, one call at a time."""

    def __init__(self, curvature: str = "exact", **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        self.x, self.y = torch.randn(6, 4).double(), torch.randn(6, 3).double()
        self.optimizer = gen.make_gen_optimizer(torch.optim.AdamW, self.model.parameters(), lr=0.01)
        make = options.pop("make", gen.GenScheduler)
        self.scheduler = make(self.optimizer, self.model, F.mse_loss, curvature=curvature, **options)

    def backward(self) -> None:
        F.mse_loss(self.model(self.x), self.y).backward()

    def update(self, **arguments: Any) -> None:
        self.scheduler.step(self.x, self.y, **arguments)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.backward()
            self.update()
            self.optimizer.step()


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The warnings so far."""
    caplog.set_level(logging.WARNING, logger="gen_dist")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("make", [gen.GenScheduler, gen.AutoGen])
def test_the_right_order_says_nothing(make: Any, curvature: str, said: Callable[[], list[str]]) -> None:
    Loop(curvature, make=make).train(12)
    assert said() == []


# ------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_the_optimizer_first(curvature: str, set_to_none: bool) -> None:
    loop = Loop(curvature)
    for _ in range(2):
        loop.optimizer.zero_grad(set_to_none=set_to_none)
        loop.backward()
        loop.optimizer.step()
        with pytest.raises(ValueError, match=f"already used these gradients.*{ORDER}"):
            loop.update()


@pytest.mark.parametrize("curvature", CURVATURES)
def test_gradients_cleared_before_the_update(curvature: str) -> None:
    loop = Loop(curvature)
    loop.backward()
    loop.optimizer.step()
    loop.optimizer.zero_grad()
    with pytest.raises(ValueError, match=f"no parameter has a gradient: {ORDER}"):
        loop.update()


def test_other_gradients_may_come_after_a_step_without_the_scheduler() -> None:
    """Some steps of a warm-up by hand, gradients accumulated in place or scaled after the step."""
    loop = Loop()
    for _ in range(3):
        loop.optimizer.zero_grad(set_to_none=False)
        loop.backward()
        loop.optimizer.step()
    loop.backward()  # onto the old ones, in place
    loop.update()
    assert loop.scheduler.last is not None


def backward_closure(loop: Loop, clears: bool) -> Callable[[], Tensor]:
    """As LBFGS and Lightning's optimizers want it."""

    def closure() -> Tensor:
        if clears:
            loop.optimizer.zero_grad()
        loss = F.mse_loss(loop.model(loop.x), loop.y)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("clears", [True, False])
def test_a_closure_that_calls_backward_is_refused_by_exact(clears: bool) -> None:
    loop = Loop()
    closure = backward_closure(loop, clears)
    closure()
    with pytest.raises(ValueError, match=r"calls backward.*returns the loss alone"):
        loop.scheduler.step(closure=closure)


@pytest.mark.parametrize("clears", [True, False])
def test_a_closure_that_calls_backward_changes_nothing_under_forward(clears: bool) -> None:
    loop, twin = Loop("forward"), Loop("forward")
    closure = backward_closure(loop, clears)
    closure()
    gradients = [p.grad.clone() for p in loop.model.parameters() if p.grad is not None]
    loop.scheduler.step(closure=closure)
    twin.backward()
    twin.update()
    assert loop.scheduler.last == twin.scheduler.last
    assert all(torch.equal(p.grad, g) for p, g in zip(loop.model.parameters(), gradients, strict=True))  # type: ignore[arg-type]


def test_a_step_without_arguments_names_the_integrations() -> None:
    loop = Loop()
    loop.backward()
    with pytest.raises(ValueError, match=r"GenTrainer.*GenCallback.*AcceleratedGen"):
        loop.scheduler.step()


def test_groups_that_maximize_and_others_that_do_not() -> None:
    one, two = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    groups = [{"params": [one], "maximize": True}, {"params": [two]}]
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, groups, lr=0.1)
    scheduler = gen.ExactGen(optimizer, nn.ParameterList([one, two]))
    (one.sum() + two.sum()).backward()
    with pytest.raises(ValueError, match="an optimizer for each"):
        scheduler.step(closure=lambda: one.square().sum() + two.sum())


# ------------------------------------------------------------------------------------------------ supported


@pytest.mark.parametrize(("curvature", "probes"), [("exact", 2), ("gauss-newton", 2), ("forward", 2), ("forward", 1)])
def test_an_optimizer_that_maximizes_is_one_that_minimizes_the_negative_loss(curvature: str, probes: int) -> None:
    runs = []
    for maximize in (True, False):
        sign = -1.0 if maximize else 1.0
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=0.01, maximize=maximize)
        loss = lambda output, target, sign=sign: sign * F.mse_loss(output, target)  # noqa: E731
        scheduler = gen.GenScheduler(optimizer, model, loss, curvature=curvature, probes=probes)
        x, y = torch.randn(6, 4).double(), torch.randn(6, 3).double()
        for _ in range(5):
            optimizer.zero_grad()
            value = loss(model(x), y)
            value.backward()
            scheduler.step(x, y, loss=value)
            optimizer.step()
            assert scheduler.last is not None
            runs.append((maximize, scheduler.last.lr, scheduler.last.numerator, sign * scheduler.last.loss))
    ascent = [run[1:] for run in runs if run[0]]
    descent = [run[1:] for run in runs if not run[0]]
    for up, down in zip(ascent, descent, strict=True):
        assert up == pytest.approx(down, rel=1e-9)
    assert all(numerator > 0 for _, numerator, _ in ascent)


# --------------------------------------------------------------------------------------------- warned of once


@pytest.mark.parametrize("curvature", CURVATURES)
def test_an_update_at_every_micro_batch(curvature: str, said: Callable[[], list[str]]) -> None:
    loop = Loop(curvature)
    for _ in range(2):
        loop.optimizer.zero_grad()
        for _ in range(4):
            loop.backward()
            loop.update()
        loop.optimizer.step()
    [warning] = [text for text in said() if "called again" in text]
    assert "scheduler.step(batches=[(x1, y1), ...])" in warning


@pytest.mark.parametrize("after_the_step", [True, False])
@pytest.mark.parametrize("tensor", [False, True])
def test_a_schedule_that_was_left_in(after_the_step: bool, tensor: bool, said: Callable[[], list[str]]) -> None:
    loop = Loop(make=gen.AutoGen)
    if tensor:
        loop.optimizer.param_groups[0]["lr"] = torch.tensor(0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(loop.optimizer, lambda step: 1e-6)
    for _ in range(10):
        loop.optimizer.zero_grad()
        loop.backward()
        loop.update()
        if after_the_step:
            loop.optimizer.step()
            schedule.step()
        else:
            schedule.step()
            loop.optimizer.step()
    [warning] = said()
    assert "something else set the learning rate to 1e-08" in warning
    assert "Remove it" in warning


@pytest.mark.parametrize("late", [False, True])
def test_closures_that_bind_late_where_nobody_can_see_it(late: bool, said: Callable[[], list[str]]) -> None:
    """Behind a decorator the functions differ. Those that can be told are refused: see test_batches.py."""
    loop = Loop()
    for _ in range(3):
        loop.optimizer.zero_grad()
        closures: list[Callable[[], Tensor]] = []
        for _ in range(4):
            x = torch.randn(6, 4).double()
            (F.mse_loss(loop.model(x), loop.y) / 4).backward()
            own = (lambda: F.mse_loss(loop.model(x), loop.y)) if late else partial(of_batch, loop, x)  # noqa: B023
            closures.append(partial(of_closure, own))
        loop.scheduler.step(batches=closures)
        loop.optimizer.step()
    assert len([text for text in said() if "bitwise equal" in text and "batches=[batch1, batch2]" in text]) == late


def of_batch(loop: Loop, x: Tensor) -> Tensor:
    return F.mse_loss(loop.model(x), loop.y)


def of_closure(closure: Callable[[], Tensor]) -> Tensor:
    return closure()


@pytest.mark.parametrize(
    ("loss", "reason", "remedy"),
    [
        (lambda model, x, y: torch.zeros((), dtype=torch.float64), "does not change along", "depend on the optimizer"),
        (lambda model, x, y: F.mse_loss(model(x), y) * torch.nan, "not finite", "overflow or are NaN"),
        (lambda model, x, y: -F.mse_loss(model(x), y), "does not descend", "the one that you call backward"),
    ],
    ids=["independent of the weights", "not finite", "another loss"],
)
@pytest.mark.parametrize("make", [gen.GenScheduler, gen.AutoGen])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_updates_that_come_to_nothing(
    curvature: str, make: Any, loss: Any, reason: str, remedy: str, said: Callable[[], list[str]]
) -> None:
    loop = Loop(curvature, make=make, update_every=1)
    for _ in range(12):
        loop.optimizer.zero_grad()
        loop.backward()
        loop.scheduler.step(closure=lambda: loss(loop.model, loop.x, loop.y))
        loop.optimizer.step()
    [warning] = [text for text in said() if "in a row" in text]
    assert reason in warning
    assert remedy in warning


@pytest.mark.parametrize("curvature", CURVATURES)
def test_gradients_that_are_all_zero_are_not_called_infinite(curvature: str) -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, [weight], lr=0.1)
    scheduler = gen.AutoGen(optimizer, nn.ParameterList([weight]), curvature=curvature)
    (weight * 0).sum().backward()
    scheduler.step(closure=lambda: (weight * 0).sum())
    assert scheduler.last is not None
    assert scheduler.last.reason == "the loss does not change along the direction"


# ----------------------------------------------------------------------------------------------------- ranks


def joins() -> str:
    model = DistributedDataParallel(new_model())
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters())
    scheduler = gen.ExactGen(optimizer, model, criterion)
    try:
        with model.join():
            for x, y in data()[: 2 + dist.get_rank()]:
                optimizer.zero_grad()
                criterion(model(x), y).backward()
                scheduler.step(x, y)
                optimizer.step()
    except ValueError as error:
        return str(error)
    return "nothing"


def test_a_step_inside_join_is_refused(pool: Callable[[int], Pool]) -> None:
    for text in pool(2).run(joins):
        assert "join()" in text
        assert "scheduler.step(weight=0)" in text


def runs_out_of_data() -> list[float]:
    """What the message says to do instead: rank 0 has one batch less."""
    model = DistributedDataParallel(new_model())
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=1e-2)
    scheduler = gen.ExactGen(optimizer, model, criterion)
    x, y = data()[0]
    if dist.get_rank() == 0:
        (model(x) * 0).sum().backward()
        scheduler.step(weight=0)
    else:
        (2 * criterion(model(x), y)).backward()  # its share of two ranks
        scheduler.step(x, y, weight=1)
    assert scheduler.last is not None
    return list(scheduler.last[1:4])


def test_a_rank_without_data_in_ddp(pool: Callable[[int], Pool]) -> None:
    model = new_model()
    x, y = data()[0]
    criterion(model(x), y).backward()
    weights = [*model.parameters()]
    d = [p.grad.clone() for p in weights if p.grad is not None]
    loss, slope, curvature = reference.derivatives(lambda: criterion(model(x), y), weights, d)
    for seen in pool(2).run(runs_out_of_data):
        assert seen == pytest.approx([slope, curvature, loss], rel=1e-9)


def bare_inside_ddp(bare: bool) -> tuple[list[tuple[str, int]], list[float], int]:
    """The reductions of an update, the rates of three steps, and how many warnings."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("gen_dist").addHandler(handler)
    inner = new_model()
    model = DistributedDataParallel(inner)
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), lr=1e-3)
    scheduler = gen.ExactGen(optimizer, inner if bare else model, criterion)
    here, rates, seen = slice_here(), [], []
    for x, y in data()[:3]:
        optimizer.zero_grad()
        criterion(model(x[here]), y[here]).backward()
        with Collectives() as collectives:
            scheduler.step(x[here], y[here])
        seen = collectives.seen
        optimizer.step()
        rates += scheduler.get_last_lr()
    logging.getLogger("gen_dist").removeHandler(handler)
    return seen, rates, len(records)


def test_a_model_given_without_its_wrapper_is_not_averaged_again(pool: Callable[[int], Pool]) -> None:
    wrapped, bare = (pool(2).run(bare_inside_ddp, bare)[0] for bare in (False, True))
    assert bare[:2] == wrapped[:2]
    assert bare[0] == [("allreduce", 128)]
    assert (wrapped[2], bare[2]) == (0, 1)


def unfrozen_later() -> tuple[list[float], list[float]]:
    """Rates and weights of training whose embedding is unfrozen after two steps."""
    inner = new_model()
    inner.embedding.weight.requires_grad_(False)
    model = DistributedDataParallel(inner) if dist.is_initialized() else inner
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, inner.parameters(), lr=1e-2)
    scheduler = gen.ExactGen(optimizer, model, criterion)
    here, rates = slice_here(), []
    for number, (x, y) in enumerate(data()[:4]):
        if number == 2:
            inner.embedding.weight.requires_grad_(True)
        optimizer.zero_grad()
        criterion(model(x[here]), y[here]).backward()
        scheduler.step(x[here], y[here])
        optimizer.step()
        rates += scheduler.get_last_lr()
    return rates, torch.cat([p.detach().flatten() for p in inner.parameters()]).tolist()


def test_layers_that_are_unfrozen_after_ddp_has_wrapped_them_are_averaged(pool: Callable[[int], Pool]) -> None:
    rates, weights = unfrozen_later()
    for seen_rates, seen_weights in pool(2).run(unfrozen_later):
        assert seen_rates == pytest.approx(rates, rel=1e-9)
        assert seen_weights == pytest.approx(weights, rel=1e-9, abs=1e-12)
