"""The scheduler in one process: closed forms, fallbacks, steps between updates, and errors that say what to type."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from effects import assert_unchanged, forward_passes, snapshot
from problems import half_mean_square, perceptron
from torch import Tensor, nn

import gen_dist as gen

CURVATURES: list[dict[str, Any]] = [
    {"curvature": "exact"},
    {"curvature": "gauss-newton"},
    {"curvature": "forward", "probes": 2},
    {"curvature": "forward", "probes": 1},
]


def backward(scheduler: gen.GenScheduler, x: Tensor, y: Tensor) -> None:
    assert scheduler.criterion is not None
    scheduler.optimizer.zero_grad()
    scheduler.criterion(scheduler.model(x), y).backward()


def linear_problem(**arguments: Any) -> tuple[gen.GenScheduler, Tensor, Tensor]:
    model = nn.Linear(5, 3).double()
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=1e-3)
    x, y = torch.randn(8, 5).double(), torch.randn(8, 3).double()
    return gen.GenScheduler(optimizer, model, half_mean_square, **arguments), x, y


# ---------------------------------------------------------------------------------------------- the numbers


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("arguments", CURVATURES, ids=lambda a: "-".join(map(str, a.values())))
@pytest.mark.parametrize("activation", [nn.Identity, nn.ReLU, nn.LeakyReLU])
def test_closed_form_of_one_layer(arguments: dict[str, Any], activation: type[nn.Module]) -> None:
    """One layer, a piecewise linear activation, the loss 1/(2M) sum |e|^2, SGD, M = 1: the rate is 1 / (1 + |x|^2)."""
    model = nn.Sequential(nn.Linear(5, 1), activation())
    nn.init.constant_(model[0].bias, 3.0)  # inside the first linear piece
    x, y = 0.3 * torch.randn(1, 5), torch.zeros(1, 1)
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=1e-3)
    scheduler = gen.GenScheduler(optimizer, model, half_mean_square, lr_max=10.0, **arguments)
    backward(scheduler, x, y)
    scheduler.step(x, y)
    rate = 1 / (1 + x.square().sum().item())
    assert scheduler.get_last_lr() == [pytest.approx(rate, rel=1e-6)]
    optimizer.step()
    assert half_mean_square(model(x), y).item() == pytest.approx(0, abs=1e-9), "one step must solve a quadratic"


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("training", [True, False])
def test_training_equals_the_reference(training: bool) -> None:
    def model() -> nn.Module:
        torch.manual_seed(1)
        # no bias before the normalisation: its gradient is rounding, which Adam would blow up to a direction
        layers = nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(0.2), nn.Linear(7, 3)
        return nn.Sequential(*layers).train(training)

    batches = [(torch.randn(16, 5), torch.randint(0, 3, (16,))) for _ in range(12)]
    twin = model()
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, twin.parameters(), lr=1e-3)
    scheduler = gen.ExactGen(optimizer, twin, F.cross_entropy)
    torch.manual_seed(2)
    rates = []
    for x, y in batches:
        backward(scheduler, x, y)
        random = torch.get_rng_state()
        scheduler.step(x, y)
        assert torch.equal(torch.get_rng_state(), random)
        F.cross_entropy(twin(x), y)  # the reference draws its masks anew too
        optimizer.step()
        rates.append(scheduler.get_last_lr()[0])

    plain = model()
    torch.manual_seed(2)
    run = reference.train(plain, F.cross_entropy, torch.optim.AdamW(plain.parameters(), lr=1e-3), batches)
    assert rates == pytest.approx(run.rates, rel=1e-9)
    for p, q in zip(twin.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("float64")
def test_gauss_newton_is_the_curvature_of_the_linearised_model() -> None:
    model = perceptron(5, 7, 3)
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=1e-3)
    scheduler = gen.GenScheduler(optimizer, model, F.cross_entropy, curvature="gauss-newton", lr_max=100)
    x, y = torch.randn(8, 5), torch.randint(0, 3, (8,))
    backward(scheduler, x, y)
    d = reference.direction(model, torch.optim.SGD(model.parameters(), lr=1.0))
    scheduler.step(x, y)
    loss, slope, curvature = reference.gauss_newton(model, F.cross_entropy, x, y, d)
    assert scheduler.last is not None
    assert scheduler.last.loss == pytest.approx(loss, rel=1e-12)
    assert scheduler.last.numerator == pytest.approx(slope, rel=1e-12)
    assert scheduler.last.denominator == pytest.approx(curvature, rel=1e-12)


@pytest.mark.parametrize("probes", [1, 2])
def test_forward_is_the_finite_difference_at_the_last_rate(probes: int) -> None:
    scheduler, x, y = linear_problem(curvature="forward", probes=probes, lr_max=0.2)
    scheduler.criterion = lambda output, target: half_mean_square(torch.tanh(output), target)
    for _ in range(3):
        h = scheduler.get_last_lr()[0]
        backward(scheduler, x, y)
        d = reference.direction(scheduler.model, torch.optim.SGD(scheduler.model.parameters(), lr=1.0))
        scheduler.step(x, y)
        expected = reference.finite_differences(
            lambda: scheduler.criterion(scheduler.model(x), y), [*scheduler.model.parameters()], d, h, probes
        )
        assert scheduler.last is not None
        assert (scheduler.last.numerator, scheduler.last.denominator) == pytest.approx(expected, rel=1e-6)
        scheduler.optimizer.step()


def test_given_loss_saves_a_pass_and_changes_nothing() -> None:
    passes = []
    results = []
    for give in (False, True):
        torch.manual_seed(0)
        scheduler, x, y = linear_problem(curvature="forward", companions=[gen.SelfCheck(None)])
        scheduler.optimizer.zero_grad()
        loss = half_mean_square(scheduler.model(x), y)
        loss.backward()
        given = loss if give else None
        passes.append(forward_passes(scheduler.model, lambda: scheduler.step(x, y, loss=given)))  # noqa: B023
        results.append(scheduler.last)
    assert passes == [3, 2]
    assert results[0][:4] == pytest.approx(results[1][:4])


def test_given_loss_is_not_trusted_where_the_model_draws_random_numbers() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 3))
    x, y = torch.randn(8, 5), torch.randn(8, 3)
    lasts = []
    for loss in (None, torch.tensor(1e6)):
        optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=1e-2)
        scheduler = gen.ApproxGen(optimizer, model, F.mse_loss)
        torch.manual_seed(3)
        backward(scheduler, x, y)
        scheduler.step(x, y, loss=loss)
        lasts.append(scheduler.last)
    assert lasts[0] == lasts[1]


def test_accumulated_batches_are_one_batch() -> None:
    whole, x, y = linear_problem()
    parts = gen.ExactGen(copy.deepcopy(whole.optimizer), whole.model, whole.criterion)
    parts.optimizer.param_groups[0]["params"] = whole.optimizer.param_groups[0]["params"]
    backward(whole, x, y)
    whole.step(x, y)
    pairs = [(x[:4], y[:4]), lambda: half_mean_square(whole.model(x[4:]), y[4:])]
    parts.step(batches=pairs)
    assert whole.last is not None
    assert parts.last is not None
    assert parts.last[:4] == pytest.approx(whole.last[:4], rel=1e-12)


# -------------------------------------------------------------------------------- what stays as it was


@pytest.mark.parametrize("arguments", CURVATURES, ids=lambda a: "-".join(map(str, a.values())))
def test_an_update_leaves_weights_buffers_and_random_state(arguments: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters())
    scheduler = gen.GenScheduler(optimizer, model, F.mse_loss, **arguments)
    x, y = torch.randn(8, 5), torch.randn(8, 3)
    backward(scheduler, x, y)
    before = snapshot(model)
    scheduler.step(x, y)
    assert_unchanged(before, snapshot(model))
    assert model.training


@pytest.mark.parametrize("arguments", CURVATURES, ids=lambda a: "-".join(map(str, a.values())))
def test_an_error_in_the_loss_leaves_everything_too(arguments: dict[str, Any]) -> None:
    scheduler, x, y = linear_problem(**arguments)
    backward(scheduler, x, y)
    before = snapshot(scheduler.model)

    def fails(output: Tensor, target: Tensor) -> Tensor:
        raise OSError("disk")

    scheduler.criterion = fails
    with pytest.raises(OSError, match="disk"):
        scheduler.step(x, y)
    assert_unchanged(before, snapshot(scheduler.model))


def test_user_rates_and_their_ratios_are_respected() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    groups = [{"params": model[0].parameters(), "lr": 0.01}, {"params": model[1].parameters(), "lr": 0.04}]
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, groups, lr=1.0)
    scheduler = gen.ExactGen(optimizer, model, F.mse_loss, lr_max=10)
    assert scheduler.get_last_lr() == [0.01, 0.04]
    assert scheduler.base_lrs == [0.01, 0.04]
    x, y = torch.randn(8, 5).double(), torch.randn(8, 3).double()
    backward(scheduler, x, y)
    scheduler.step(x, y)
    d = [p.grad * (0.25 if i < 2 else 1.0) for i, p in enumerate(model.parameters())]
    _, slope, curvature = reference.derivatives(lambda: F.mse_loss(model(x), y), [*model.parameters()], d)
    assert scheduler.get_last_lr() == pytest.approx([0.25 * slope / curvature, slope / curvature], rel=1e-9)
    assert scheduler.last is not None
    assert scheduler.last.lr == scheduler.get_last_lr()[1]


def test_frozen_unused_and_tied_weights() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.unused = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight
            self.a.bias.requires_grad_(False)
            self.scale = nn.Parameter(torch.tensor(2.0))
            self.empty = nn.Parameter(torch.empty(0))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).tanh()) * self.scale + self.empty.sum()

    model = Odd().double()
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), weight_decay=0.0)
    scheduler = gen.ExactGen(optimizer, model, F.mse_loss, lr_max=10)
    x, y = torch.randn(8, 3).double(), torch.randn(8, 3).double()
    backward(scheduler, x, y)
    scheduler.step(x, y)
    weights = [p for p in model.parameters() if p.grad is not None]
    d = [optimizer.get_param_update(p) for p in weights]
    expected = reference.derivatives(lambda: F.mse_loss(model(x), y), weights, d)
    assert scheduler.last is not None
    assert (scheduler.last.loss, scheduler.last.numerator, scheduler.last.denominator) == pytest.approx(expected)


def test_a_parameter_that_is_not_the_models_is_refused_by_exact() -> None:
    model, stranger = nn.Linear(2, 2), nn.Parameter(torch.ones(3))
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, [*model.parameters(), stranger], lr=0.1)
    scheduler = gen.ExactGen(optimizer, model, F.mse_loss)
    backward(scheduler, torch.ones(1, 2), torch.zeros(1, 2))
    stranger.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"not in the model.*\(3,\).*curvature='forward'"):
        scheduler.step(torch.ones(1, 2), torch.zeros(1, 2))


# ---------------------------------------------------------------------------------------- the rule at work


def test_the_last_rate_is_kept_where_the_curvature_is_negative() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 0.5)
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=0.03)
    scheduler = gen.ExactGen(optimizer, model, lambda output, target: torch.cos(output).sum())
    x = torch.ones(1, 1)
    backward(scheduler, x, x)
    scheduler.step(x, x)
    assert scheduler.last is not None
    assert scheduler.last.reason == "curvature not positive"
    assert scheduler.last.lr == pytest.approx(0.03)
    assert not scheduler.last.accepted


@pytest.mark.parametrize("arguments", CURVATURES, ids=lambda a: "-".join(map(str, a.values())))
def test_a_gradient_that_is_not_finite_touches_nothing(arguments: dict[str, Any]) -> None:
    scheduler, x, y = linear_problem(**arguments)
    scheduler.optimizer = optimizer = gen.make_gen_optimizer(torch.optim.AdamW, scheduler.model.parameters())
    backward(scheduler, x, y)
    scheduler.step(x, y)
    optimizer.step()
    state, weights = copy.deepcopy(optimizer.state_dict()["state"]), copy.deepcopy(scheduler.model.state_dict())
    rate = scheduler.get_last_lr()
    backward(scheduler, x * float("nan"), y)
    scheduler.step(x * float("nan"), y)
    optimizer.step()
    assert scheduler.last is not None
    assert scheduler.last.reason == "not finite"
    assert scheduler.get_last_lr() == rate
    assert all(torch.equal(v, weights[k]) for k, v in scheduler.model.state_dict().items())
    for old, new in zip(state.values(), optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(old[k], new[k]) for k in old)
    backward(scheduler, x, y)
    scheduler.step(x, y)
    assert scheduler.last.accepted, "training must continue"


def test_a_probe_that_overflows_keeps_the_rate_and_takes_the_step() -> None:
    scheduler, x, y = linear_problem(curvature="forward")
    backward(scheduler, x, y)
    scheduler.criterion = lambda output, target: half_mean_square(output, target) * float("inf")
    before = copy.deepcopy(scheduler.model.state_dict())
    scheduler.step(x, y)
    assert scheduler.last is not None
    assert scheduler.last.reason == "not finite"
    assert scheduler.last.lr == pytest.approx(1e-3)
    scheduler.optimizer.step()
    assert not torch.equal(scheduler.model.weight, before["weight"])


def test_probes_grow_until_they_rise_above_rounding() -> None:
    model = nn.Linear(5, 3)
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=1e-9)
    scheduler = gen.ApproxGen(optimizer, model, half_mean_square)
    x, y = torch.randn(8, 5), torch.randn(8, 3)
    reasons = []
    for _ in range(10):
        backward(scheduler, x, y)
        scheduler.step(x, y)
        assert scheduler.last is not None
        reasons.append(scheduler.last.reason)
    assert reasons[0] == "curvature within rounding"
    assert reasons[-1] == "accepted"


def test_between_updates_nothing_happens() -> None:
    scheduler, x, y = linear_problem(update_every=3, companions=[gen.SelfCheck(None)])
    measured = []
    for _ in range(7):
        backward(scheduler, x, y)
        measured.append(forward_passes(scheduler.model, lambda: scheduler.step(x, y)))
        held = scheduler.optimizer.direction is not None
        assert held == bool(measured[-1]), "a direction must be held only after an update"
        scheduler.optimizer.step()
    assert measured == [1, 0, 0, 1, 0, 0, 1]
    assert scheduler.last_epoch == 7


# ------------------------------------------------------------------------------------------- the ecosystem


def test_it_is_an_lr_scheduler_that_checkpoints_plain_numbers() -> None:
    scheduler, x, y = linear_problem()
    assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
    backward(scheduler, x, y)
    scheduler.step(x, y)
    file = io.BytesIO()
    torch.save(scheduler.state_dict(), file)
    file.seek(0)
    fresh, _, _ = linear_problem()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert fresh.last == scheduler.last
    assert fresh.state_dict() == scheduler.state_dict()
    assert "Linear" not in repr(scheduler)


def plain_optimizer() -> None:
    model = nn.Linear(2, 2)
    gen.ExactGen(torch.optim.SGD(model.parameters()), model)  # type: ignore[arg-type]


MISUSE = {
    "no batch": (lambda s, x, y: s.step(), ValueError, r"scheduler.step\(x, y\)"),
    "two kinds of batch": (lambda s, x, y: s.step(x, y, closure=lambda: x), ValueError, "x and closure"),
    "no target": (lambda s, x, y: s.step(x), ValueError, r"scheduler.step\(x, y\)"),
    "no batches": (lambda s, x, y: s.step(batches=[]), ValueError, "at least one"),
    "not a batch": (lambda s, x, y: s.step(batches=[x]), TypeError, r"pair \(x, y\)"),
    "vector loss": (lambda s, x, y: s.step(closure=lambda: x), TypeError, r"one element.*\(8, 5\)"),
    "number loss": (lambda s, x, y: s.step(closure=lambda: 1.0), TypeError, "one element, got 1.0"),
    "negative weight": (lambda s, x, y: s.step(x, y, weight=-1), ValueError, "weight.*-1"),
    "plain optimizer": (lambda s, x, y: plain_optimizer(), TypeError, r"as_gen_optimizer\(optimizer\)"),
    "clamp": (lambda s, x, y: linear_problem(lr_min=2.0, lr_max=1.0), ValueError, "lr_min=2.0, lr_max=1.0"),
    "negative clamp": (lambda s, x, y: linear_problem(lr_min=-1.0), ValueError, "lr_min=-1.0"),
    "curvature": (lambda s, x, y: linear_problem(curvature="hessian"), ValueError, "'gauss-newton'.*'hessian'"),
    "probes": (lambda s, x, y: linear_problem(curvature="forward", probes=3), ValueError, "1 or 2, got 3"),
    "update_every": (lambda s, x, y: linear_problem(update_every=0), ValueError, "update_every.*0"),
    "gauss-newton of a closure": (
        lambda s, x, y: linear_problem(curvature="gauss-newton")[0].step(closure=lambda: x.sum()),
        ValueError,
        "'gauss-newton' needs",
    ),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_says_what_to_type(case: str) -> None:
    call, error, message = MISUSE[case]
    scheduler, x, y = linear_problem()
    backward(scheduler, x, y)
    with pytest.raises(error, match=message):
        call(scheduler, x, y)


def test_no_criterion() -> None:
    scheduler, x, y = linear_problem()
    backward(scheduler, x, y)
    scheduler.criterion = None
    with pytest.raises(ValueError, match=r"needs the criterion.*closure=fn"):
        scheduler.step(x, y)
    scheduler.step(closure=lambda: half_mean_square(scheduler.model(x), y))
    assert scheduler.last is not None
    assert scheduler.last.accepted


def test_groups_added_later_keep_the_ratio_of_the_rate_they_come_with() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model[0].parameters(), lr=0.1)
    scheduler = gen.ExactGen(optimizer, model, F.mse_loss, lr_max=10)
    x, y = torch.randn(8, 5).double(), torch.randn(8, 3).double()
    backward(scheduler, x, y)
    scheduler.step(x, y)
    optimizer.step()
    optimizer.add_param_group({"params": list(model[1].parameters()), "lr": 0.05})
    for _ in range(2):
        backward(scheduler, x, y)
        scheduler.step(x, y)
        first, second = scheduler.get_last_lr()
        assert second == pytest.approx(first / 2)
        optimizer.step()
    assert scheduler.base_lrs == [0.1, 0.05]


def test_complex_parameters_are_refused_in_words() -> None:
    weight = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, [weight], lr=0.1)
    with pytest.raises(TypeError, match="complex"):
        gen.ExactGen(optimizer, nn.Linear(1, 1))
