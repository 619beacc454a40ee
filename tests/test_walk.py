"""A walk measures what the model computes from `theta - a d`, also where the model writes into its own weights.

The oracle is a copy of the model for each rate, displaced by hand, in float64.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from effects import assert_unchanged, snapshot
from torch import Tensor, nn

import gen_dist as gen
from gen_dist.direction import Direction, GroupDirection
from gen_dist.line import Line, MicroBatch, Slice, one_probe, two_probes
from gen_dist.parallel import Layout

pytestmark = pytest.mark.usefixtures("float64")

RATES = [0.0, 0.3, -0.3, 1.0, 0.02]


def clipped(weight: Tensor) -> Tensor:
    return weight.clamp(-0.2, 0.2)


def scaled_to_one(weight: Tensor) -> Tensor:
    return weight / weight.norm()


def decayed(weight: Tensor) -> Tensor:
    return 0.9 * weight


def in_place(model: Any, new: Tensor) -> None:
    with torch.no_grad():
        model.f[0].weight.copy_(new)


def in_place_through_data(model: Any, new: Tensor) -> None:
    model.f[0].weight.data.copy_(new)


def by_assignment(model: Any, new: Tensor) -> None:
    model.f[0].weight.data = new


class Rewriting(nn.Module):
    """A model that writes a function of one of its trained weights into it, before it uses it."""

    def __init__(self, function: Callable[[Tensor], Tensor], write: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.function, self.write = function, write

    def forward(self, x: Tensor) -> Tensor:
        self.write(self, self.function(self.f[0].weight.detach()))
        return self.f(x)


FAILING = 4.0


class Failing(Rewriting):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.f[2].bias.abs().max() > FAILING:
            raise OSError("as a test has it")
        return y


MODELS = [
    pytest.param(functools.partial(Rewriting, function, write), id=f"{function.__name__} {write.__name__}")
    for function in (clipped, scaled_to_one, decayed)
    for write in (in_place, in_place_through_data, by_assignment)
]


def problem(make: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    model = make()
    return model, torch.randn(6, 4), torch.randn(6, 3), [torch.randn_like(p) for p in model.parameters()]


def line_of(model: nn.Module, x: Tensor, y: Tensor, d: list[Tensor]) -> Line:
    direction = Direction([GroupDirection(0, 1.0, list(model.parameters()), d)])
    return Line(Layout(model), direction, Slice([MicroBatch(model, F.mse_loss, x, y)]))


def loss_at(model: nn.Module, x: Tensor, y: Tensor, d: list[Tensor], rate: float) -> float:
    """The loss of a copy of the model at `theta - rate d`."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for p, update in zip(model.parameters(), d, strict=True):
            p.sub_(update, alpha=rate)
    return F.mse_loss(model(x), y).item()


@pytest.mark.parametrize("make", MODELS)
def test_each_stop_is_the_loss_of_the_model_from_its_own_weights(make: Callable[[], nn.Module]) -> None:
    model, x, y, d = problem(make)
    seen = line_of(model, x, y, d).walk(RATES).losses[0].tolist()
    assert seen == pytest.approx([loss_at(model, x, y, d, rate) for rate in RATES], rel=1e-14)


@pytest.mark.parametrize("make", MODELS)
def test_a_walk_leaves_weights_as_they_were(make: Callable[[], nn.Module]) -> None:
    model, x, y, d = problem(make)
    before, addresses = snapshot(model), [p.data_ptr() for p in model.parameters()]
    line_of(model, x, y, d).walk(RATES)
    assert_unchanged(before, snapshot(model))
    assert [p.data_ptr() for p in model.parameters()] == addresses


@pytest.mark.parametrize("write", [in_place, in_place_through_data, by_assignment])
def test_a_walk_that_fails_leaves_weights_as_they_were(write: Callable[[Any, Tensor], None]) -> None:
    model, x, y, d = problem(lambda: Failing(decayed, write))
    before = snapshot(model)
    with pytest.raises(OSError, match="as a test has it"):
        line_of(model, x, y, d).walk([0.1, 100.0])
    assert_unchanged(before, snapshot(model))


@pytest.mark.parametrize("probes", [one_probe, two_probes])
@pytest.mark.parametrize("make", MODELS)
def test_the_loss_of_the_training_step_counts_only_if_it_is_on_the_line(
    make: Callable[[], nn.Module], probes: Callable[..., Any]
) -> None:
    model, x, y, d = problem(make)
    loss = F.mse_loss(model(x), y)  # writes into the weights, from which the next pass goes on
    h = 0.1
    here, ahead, behind = (loss_at(model, x, y, d, rate) for rate in (0, h, -h))
    seen = probes(line_of(model, x, y, d), h, loss).numbers[0].tolist()
    if probes is one_probe:
        assert seen[:2] == pytest.approx([here, (here - ahead) / h], rel=1e-12)
    else:
        assert seen == pytest.approx([here, (behind - ahead) / (2 * h), (ahead - 2 * here + behind) / h**2], rel=1e-12)


def test_a_scheduler_measures_a_critic_whose_forward_clips_its_weights() -> None:
    """As in a WGAN, where the weights between a step and the next forward pass are out of bounds."""
    model, x, y, _ = problem(lambda: Rewriting(clipped, in_place_through_data))
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=0.05)
    scheduler = gen.GenScheduler(optimizer, model, F.mse_loss, curvature="forward", companions=[gen.SelfCheck(None)])
    for _ in range(4):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        h, d = optimizer.param_groups[0]["lr"], [p.grad for p in model.parameters() if p.grad is not None]
        here, ahead, behind = (loss_at(model, x, y, d, rate) for rate in (0, h, -h))
        scheduler.step(x, y, loss=loss)
        assert scheduler.last is not None
        seen = scheduler.last.numerator, scheduler.last.denominator
        assert seen == pytest.approx(((behind - ahead) / (2 * h), (ahead - 2 * here + behind) / h**2), rel=1e-6)
        optimizer.step()
