"""What an update knows beside its rate: a try of the step, errors of its numbers, the share of signal in the slope."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
import torch.distributed as dist
from problems import KINDS, criterion, data, new_model, parallel, slice_here, whole
from rank_pool import Pool
from torch import Tensor, nn

import gen_dist as gen

# ------------------------------------------------------------------------------------------ a try of the step


def bowl(power: float, start: float, verify: int = 1, lr: float = 1.0) -> tuple[gen.GenScheduler, nn.Parameter, Any]:
    """`|theta|^power / power` in one weight, by gradient descent."""
    weight = nn.Parameter(torch.tensor([start], dtype=torch.float64))
    model = nn.ParameterList([weight])
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, [weight], lr=lr)
    scheduler = gen.GenScheduler(optimizer, model, lr_max=math.inf, companions=[gen.Verification(verify)])
    return scheduler, weight, lambda: weight.abs().pow(power).sum() / power


def update(scheduler: gen.GenScheduler, loss: Any) -> gen.Update:
    scheduler.optimizer.zero_grad()
    loss().backward()
    scheduler.step(closure=loss)
    assert scheduler.last is not None
    return scheduler.last


def test_on_a_parabola_the_loss_changes_as_predicted() -> None:
    scheduler, _, loss = bowl(2, 3.0)
    assert update(scheduler, loss).change_ratio == pytest.approx(1)


def test_the_ratio_is_that_of_the_true_loss() -> None:
    scheduler, weight, loss = bowl(4, 1.0)
    seen = update(scheduler, loss)
    assert seen.lr == pytest.approx(1 / 3)  # g = 1, H = 3
    predicted = -1 / 3 + 3 * (1 / 3) ** 2 / 2
    assert seen.change_ratio == pytest.approx(((1 - 1 / 3) ** 4 - 1) / 4 / predicted)
    assert weight.item() == 1.0, "weights are where they were"


def test_a_step_that_raises_the_loss_is_shortened() -> None:
    # the curvature of |x|^1.2 is far too small at 1: its parabola has the minimum beyond the other wall
    scheduler, weight, loss = bowl(1.2, 1.0)
    seen = update(scheduler, loss)
    overshoot = 1 / 0.2  # g = 1, H = 0.2: to x = -4
    assert seen.change_ratio is not None
    assert seen.change_ratio < 0
    assert seen.reason == "shortened"
    assert seen.lr <= overshoot / 2
    before = loss().item()
    scheduler.optimizer.step()
    assert loss().item() <= before * 1.001
    assert weight.item() != 1.0


def test_the_shortened_rate_lasts_until_the_next_update() -> None:
    scheduler, _, loss = bowl(1.2, 1.0, verify=2)
    assert update(scheduler, loss).reason == "shortened"
    scheduler.optimizer.step()
    again = update(scheduler, loss)
    assert again.reason == "accepted"
    assert again.change_ratio is None, "every second update alone is verified"


def verified(kind: str) -> list[tuple[float, float | None, str]]:
    here = slice_here()
    inner = new_model()
    model = parallel(inner, kind)
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), lr=0.5)
    # a clamp that forces overshoot
    scheduler = gen.GenScheduler(optimizer, model, criterion, lr_min=0.5, companions=[gen.Verification()])
    seen = []
    for x, y in data()[:4]:
        optimizer.zero_grad()
        criterion(model(x[here]), y[here]).backward()
        before = [whole(p) for p in inner.parameters()]
        scheduler.step(x[here], y[here])
        assert all(torch.equal(whole(p), b) for p, b in zip(inner.parameters(), before, strict=True))
        optimizer.step()
        assert scheduler.last is not None
        seen.append((scheduler.last.lr, scheduler.last.change_ratio, scheduler.last.reason))
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_verify_as_one_process(pool: Callable[[int], Pool], kind: str) -> None:
    expected = verified("replica")
    assert "shortened" in [reason for _, _, reason in expected]
    results = pool(2).run(verified, kind)
    for seen in results:
        assert seen == results[0]
        for ours, theirs in zip(seen, expected, strict=True):
            assert ours[:2] == pytest.approx(theirs[:2], rel=1e-8)
            assert ours[2] == theirs[2]


def fails_in_the_try() -> str:
    rank, calls = dist.get_rank(), 0
    model = new_model()
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), lr=1e-3)
    scheduler = gen.GenScheduler(optimizer, model, companions=[gen.Verification(), gen.SelfCheck(None)])
    x, y = data()[0]

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if rank == 1 and calls == 2:
            raise OSError("disk full")
        return criterion(model(x), y)

    criterion(model(x), y).backward()
    try:
        scheduler.step(closure=closure)
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_a_failure_in_the_try_is_raised_everywhere(pool: Callable[[int], Pool]) -> None:
    one, two = pool(2).run(fails_in_the_try)
    assert "rank 1 (OSError: disk full)" in one
    assert two == "OSError: disk full"


# ------------------------------------------------------------------------------- errors from micro-batches


@pytest.mark.parametrize(("curvature", "probes"), [("exact", 2), ("forward", 2), ("forward", 1), ("gauss-newton", 2)])
def test_micro_batches_give_standard_errors(curvature: str, probes: int) -> None:
    model = new_model()
    x, y = data()[0]
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=1e-2)
    scheduler = gen.GenScheduler(optimizer, model, criterion, curvature=curvature, probes=probes)
    criterion(model(x), y).backward()
    weights = [*model.parameters()]
    d = [p.grad.clone() for p in weights if p.grad is not None]
    parts = []
    for a, b in zip(x.chunk(4), y.chunk(4), strict=True):
        if curvature == "gauss-newton":
            parts.append(reference.gauss_newton(model, criterion, a, b, d)[1:])
        elif curvature == "forward":
            parts.append(
                reference.finite_differences(lambda a=a, b=b: criterion(model(a), b), weights, d, 1e-2, 2)  # type: ignore[misc]
            )
        else:
            parts.append(reference.derivatives(lambda a=a, b=b: criterion(model(a), b), weights, d)[1:])  # type: ignore[misc]
    expected = torch.tensor(parts, dtype=torch.float64).std(0).div(2).tolist()  # of a mean of four
    scheduler.step(batches=[*zip(x.chunk(4), y.chunk(4), strict=True)])
    assert scheduler.last is not None
    if probes == 2:
        assert scheduler.last[5:7] == pytest.approx(expected, rel=1e-6)
    else:
        assert scheduler.last.numerator_error is not None
        assert scheduler.last.denominator_error is None, "one probe knows no curvature of a slice"
    scheduler.step(x, y)
    assert scheduler.last[5:7] == (None, None)


def test_losses_of_micro_batches_save_a_pass() -> None:
    model = new_model()
    x, y = data()[0]
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=1e-2)
    batches = [*zip(x.chunk(4), y.chunk(4), strict=True)]
    losses = torch.stack([criterion(model(a), b) for a, b in batches])
    losses.mean().backward()
    count = 0

    def add(*_: Any) -> None:
        nonlocal count
        count += 1

    model.register_forward_hook(add)
    seen = []
    for loss in (None, losses):
        count = 0
        optimizer.param_groups[0]["lr"] = 1e-2  # and so the same distance of the probes
        unchecked = [gen.SelfCheck(None)]
        scheduler = gen.GenScheduler(optimizer, model, criterion, curvature="forward", companions=unchecked)
        scheduler.step(batches=batches, loss=loss)
        seen.append((count, scheduler.last))
    assert (seen[0][0], seen[1][0]) == (12, 8)
    assert seen[0][1][1:4] == pytest.approx(seen[1][1][1:4], rel=1e-6)  # type: ignore[index]


# --------------------------------------------------------------------------------------------- signal and noise

KINDS_OF_STEP: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1}),
    "sgd nesterov": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True}),
    "sgd dampened": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "dampening": 0.3}),
    "adam": (torch.optim.Adam, {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-3}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-3}),
}
STEPS = 3


def signals(name: str) -> list[tuple[float | None, float]]:
    model = new_model()
    cls, arguments = KINDS_OF_STEP[name]
    optimizer = gen.make_gen_optimizer(cls, model.parameters(), **arguments)
    scheduler = gen.GenScheduler(optimizer, model, criterion, lr_max=1e-2, companions=[gen.GradientNoise()])
    here = slice_here()
    seen = []
    for x, y in data()[:STEPS]:
        optimizer.zero_grad()
        criterion(model(x[here]), y[here]).backward()
        scheduler.step(x[here], y[here])
        optimizer.step()
        assert scheduler.last is not None
        seen.append((scheduler.last.signal, scheduler.last.lr))
    return seen


def expected_share(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    """By finite differences of the optimizer itself: how its direction answers to each slice's deviation."""

    def direction(gradients: list[Tensor]) -> list[Tensor]:
        for p, g in zip(model.parameters(), gradients, strict=True):
            p.grad = g
        return reference.direction(model, optimizer)

    slices = [
        [*torch.autograd.grad(criterion(model(a), b), [*model.parameters()])]
        for a, b in zip(x.chunk(4), y.chunk(4), strict=True)
    ]
    mean = [torch.stack(parts).mean(0) for parts in zip(*slices, strict=True)]
    numerator = sum(float((g * d).sum()) for g, d in zip(mean, direction(mean), strict=True))
    noise, h = 0.0, 1e-6
    for slice_ in slices:
        delta = [a - b for a, b in zip(slice_, mean, strict=True)]
        ahead = direction([g + h * e for g, e in zip(mean, delta, strict=True)])
        behind = direction([g - h * e for g, e in zip(mean, delta, strict=True)])
        noise += sum(float((e * (a - b)).sum()) / (2 * h) for e, a, b in zip(delta, ahead, behind, strict=True))
    direction(mean)
    return 1 - noise / (4 * 3) / numerator


@pytest.mark.parametrize("name", KINDS_OF_STEP)
def test_the_share_of_signal(pool: Callable[[int], Pool], name: str) -> None:
    results = pool(4).run(signals, name)
    assert all(seen == results[0] for seen in results)
    model = new_model()
    cls, arguments = KINDS_OF_STEP[name]
    optimizer = cls(model.parameters(), **arguments)
    for number, ((x, y), (share, rate)) in enumerate(zip(data()[:STEPS], results[0], strict=True)):
        if number or "dampened" not in name:  # whose first step is not dampened, as torch has it
            assert share == pytest.approx(expected_share(model, optimizer, x, y), rel=1e-4)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()


def test_signal_says_what_it_cannot_do(pool: Callable[[int], Pool]) -> None:
    model = new_model()
    for optimizer in (
        gen.make_gen_optimizer(torch.optim.RMSprop, model.parameters()),
        gen.make_gen_optimizer(torch.optim.Adam, model.parameters(), amsgrad=True),
    ):
        with pytest.raises(TypeError, match="knows the directions of SGD, Adam and AdamW, not of Gen"):
            gen.GenScheduler(optimizer, model, criterion, companions=[gen.GradientNoise()])
    assert pool(2).run(refused_in_ddp) == ["ValueError"] * 2
    with pytest.raises(ValueError, match="every must be a whole number of updates, 1 or more, got -1"):
        gen.Verification(-1)


def refused_in_ddp() -> str:
    model = parallel(new_model(), "ddp")
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=1e-2)
    try:
        gen.GenScheduler(optimizer, model, criterion, companions=[gen.GradientNoise()])
    except ValueError as error:
        return type(error).__name__
    return "nothing"
