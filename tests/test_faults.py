"""Faults injected: interrupts at every point of a step, NaN anywhere, errors on one rank. Nothing is half done."""

from __future__ import annotations

import copy
import math
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_pool import Pool
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gen_dist as gen
from gen_dist.parallel import local

# ------------------------------------------------------------------------------------------------ no half step


class Interrupt(KeyboardInterrupt):
    """Ctrl-C, at a point of our choice."""


def interrupted_at(point: int, call: Callable[[], Any]) -> bool:
    """Run `call`, interrupted at its n-th call or return, Python's or C's; whether it came so far."""
    count, over = 0, False

    def count_down(*_: Any) -> None:
        nonlocal count
        count += not over
        if count == point and not over:
            sys.setprofile(None)
            raise Interrupt

    try:
        sys.setprofile(count_down)
        call()
        over = True
    except Interrupt:
        over = True
    finally:
        sys.setprofile(None)
    return count >= point


def problem(curvature: str) -> tuple[gen.GenScheduler, nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.2), nn.Linear(3, 1))
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=1e-2, momentum=0.9, foreach=False)
    verification = [gen.Verification()]
    scheduler = gen.GenScheduler(
        optimizer, model, nn.functional.mse_loss, curvature=curvature, average=True, companions=verification
    )
    return scheduler, model, torch.randn(4, 2), torch.randn(4, 1)


@pytest.mark.parametrize("curvature", ["exact", "forward"])
def test_an_interrupt_anywhere_leaves_no_displaced_weights(curvature: str) -> None:
    scheduler, model, x, y = problem(curvature)
    nn.functional.mse_loss(model(x), y).backward()
    scheduler.step(x, y)  # warm: what happens once alone is behind it
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    point, reached, stride = 1, True, 5 if curvature == "forward" else 41
    while reached:
        reached = interrupted_at(point, lambda: scheduler.step(x, y))
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name]), f"{name} is displaced after an interrupt at point {point}"
        assert torch.equal(torch.get_rng_state(), random), f"random state after an interrupt at point {point}"
        assert not model._forward_pre_hooks, f"a hook is left after an interrupt at point {point}"
        assert torch.is_grad_enabled(), f"gradients are off after an interrupt at point {point}"
        assert scheduler.optimizer.param_groups[0]["lr"] < 2.0**10, f"a trial rate after an interrupt at point {point}"
        point += stride
    assert point > 1000, "the interrupts reached far into the step"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # interrupts of generators that end
def test_an_interrupt_anywhere_leaves_no_average_in_the_model() -> None:
    """At every call and return from the beginning of `averaged` to its end."""
    scheduler, model, x, y = problem("exact")
    for _ in range(3):
        scheduler.optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        scheduler.step(x, y)
        scheduler.optimizer.step()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    point, reached, inside = 1, True, 0

    def look() -> None:
        nonlocal inside
        with scheduler.averaged([x]):
            inside += not torch.equal(model[0].weight, state["0.weight"])

    while reached:
        reached = interrupted_at(point, look)
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name]), f"{name} is that of the average after an interrupt at point {point}"
        assert torch.is_grad_enabled()
        point += 1
    assert inside > 10, "the interrupts came while the average was there, and while the weights were put back"


# --------------------------------------------------------------------------------------------------- no poison


def network(kind: str = "alone") -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    if kind == "fsdp2":
        fully_shard(model)
    return DistributedDataParallel(model) if kind == "ddp" else model


def train_with_a_fault(kind: str, fault: str, curvature: str, auto: bool) -> list[tuple[Any, ...]]:
    """Six steps, the third with a fault on the last rank alone: rate, reason, all finite, and weights of each."""
    rank, last = (dist.get_rank(), dist.get_world_size() - 1) if dist.is_initialized() else (0, 0)
    model = network(kind)
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), lr=1e-2)
    make: Any = gen.AutoGen if auto else gen.GenScheduler
    scheduler = make(optimizer, model, nn.functional.cross_entropy, curvature=curvature, update_every=1, lr_max=0.1)
    generator = torch.Generator().manual_seed(rank)
    seen = []
    for step in range(6):
        x, y = torch.randn(5, 3, generator=generator), torch.randint(0, 2, (5,), generator=generator)
        here = step == 2 and rank == last
        optimizer.zero_grad()
        calls = 0

        def loss(here: bool = here, x: Tensor = x, y: Tensor = y) -> Tensor:
            nonlocal calls
            calls += 1
            value = nn.functional.cross_entropy(model(x), y)
            poison = {"nan in the probe": math.nan, "overflow in the probe": math.inf}.get(fault, 0.0)
            return value + poison if here and calls == 2 else value

        poisoned = next(model.parameters()).register_hook(lambda g: g * math.nan)  # before any reduction
        if not (here and fault == "nan in the gradient"):
            poisoned.remove()
        loss().backward()
        poisoned.remove()
        if here and fault == "no samples":
            scheduler.step(x[:0], y[:0], weight=0)
        elif here and fault == "nan in the data":
            scheduler.step(x * math.nan, y)
        else:
            scheduler.step(closure=loss)
        optimizer.step()
        state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        finite = all(bool(t.isfinite().all()) for t in [*model.parameters(), *state])
        weights = torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()
        seen.append((scheduler.last.lr, scheduler.last.reason, finite, weights))
    return seen


FAULTS = ["nan in the gradient", "nan in the probe", "overflow in the probe", "nan in the data", "no samples"]


@pytest.mark.parametrize("auto", [False, True], ids=["raw", "auto"])
@pytest.mark.parametrize("curvature", ["exact", "forward"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("kind", "ranks"), [("alone", 1), ("replica", 2), ("ddp", 2)])
def test_a_fault_on_one_rank_spoils_nothing(
    pool: Callable[[int], Pool], kind: str, ranks: int, fault: str, curvature: str, auto: bool
) -> None:
    if fault == "no samples" and ranks == 1:
        pytest.skip("one rank without samples is no step")
    results = pool(ranks).run(train_with_a_fault, kind, fault, curvature, auto)
    for seen in results:
        assert seen == results[0], "rates, reasons and weights are the same on all ranks"
        assert all(finite for _, _, finite, _ in seen)
        assert all(0 < lr <= 0.1 for lr, _, _, _ in seen)
        if fault != "no samples":
            assert seen[2][1] == "not finite"
            assert seen[2][0] <= seen[1][0] * (1.5 if auto else 1), "at most the growth that was decided before"
            assert auto or seen[2][0] == seen[1][0], "the rate is kept"
        if fault == "nan in the gradient":
            assert seen[2][3] == seen[1][3], "the step is skipped"
        assert seen[3][1] != "not finite", "and the next one is as ever"
        assert seen[5][3] != seen[3][3]


def train_between_updates(kind: str, fused: bool) -> list[tuple[bool, list[float]]]:
    """Six steps with an update at the first alone and a NaN in the fourth gradient: all finite, and the weights."""
    last = dist.get_world_size() - 1 if dist.is_initialized() else 0
    rank = dist.get_rank() if dist.is_initialized() else 0
    model = network(kind)
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), lr=1e-2, fused=fused)
    scheduler = gen.GenScheduler(optimizer, model, nn.functional.cross_entropy, update_every=100)
    generator = torch.Generator().manual_seed(rank)
    seen = []
    for step in range(6):
        x, y = torch.randn(5, 3, generator=generator), torch.randint(0, 2, (5,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        if step == 3 and (rank == last or kind == "ddp"):  # which has reduced it by now
            local(next(model.parameters()).grad).view(-1)[:1] = math.nan
        scheduler.step(x, y)
        optimizer.step()
        parts = [local(p.detach()).flatten() for p in model.parameters()]
        state = [local(v) for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        seen.append((all(bool(t.isfinite().all()) for t in [*parts, *state]), torch.cat(parts).tolist()))
    return seen


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("kind", "ranks"), [("alone", 1), ("replica", 2), ("ddp", 2), ("fsdp2", 2)])
def test_a_gradient_between_updates_spoils_nothing(
    pool: Callable[[int], Pool], kind: str, ranks: int, fused: bool
) -> None:
    for seen in pool(ranks).run(train_between_updates, kind, fused):
        assert all(finite for finite, _ in seen)
        weights = [weights for _, weights in seen]
        assert weights[3] == weights[2], "the step is skipped, on every rank"
        assert weights[4] != weights[3], "and the next one is as ever"


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "GradScaler"])
@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD])
def test_a_fused_step_that_is_skipped_on_the_device_leaves_no_trace(
    optimizer_class: type[torch.optim.Optimizer], scaled: bool
) -> None:
    """Beside a twin without gen_dist, which leaves the bad batch out."""
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(5, 3, generator=generator), torch.tensor([0, 1, 1, 0, 1])) for _ in range(5)]
    batches[2] = (batches[2][0] * math.nan, batches[2][1])
    model = network("alone")
    twin = copy.deepcopy(model)
    optimizer = gen.make_gen_optimizer(optimizer_class, model.parameters(), lr=1e-2, fused=True)
    of_twin = optimizer_class(twin.parameters(), lr=1e-2, fused=True)
    scheduler = gen.GenScheduler(optimizer, model, nn.functional.cross_entropy, 1e-2, 1e-2, update_every=100)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, enabled=scaled)
    for number, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        scaler.unscale_(optimizer)
        scheduler.step(x, y)
        scaler.step(optimizer)
        scaler.update()
        assert not hasattr(optimizer, "found_inf")
        if number != 2:
            of_twin.zero_grad()
            nn.functional.cross_entropy(twin(x), y).backward()
            of_twin.step()
    for weight, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-6, atol=1e-7)  # the first step is theta - lr d
        for name, value in of_twin.state[other].items():
            torch.testing.assert_close(optimizer.state[weight][name], value)


# ----------------------------------------------------------------------------------------------------- no hang


class Failing:
    """Training of a small network whose closure fails on rank 1, in its third evaluation of the second step."""

    def __init__(self, kind: str) -> None:
        self.model = network(kind)
        self.optimizer = gen.make_gen_optimizer(torch.optim.AdamW, self.model.parameters(), lr=1e-2)
        self.scheduler = gen.GenScheduler(self.optimizer, self.model, curvature="forward", lr_max=0.1, average=True)
        self.generator = torch.Generator().manual_seed(dist.get_rank())

    def step(self, number: int) -> Exception | None:
        """Everything of a step but `optimizer.step()`; what `scheduler.step` raised."""
        x = torch.randn(5, 3, generator=self.generator)
        y = torch.randint(0, 2, (5,), generator=self.generator)
        calls = 0

        def loss() -> Tensor:
            nonlocal calls
            calls += 1
            torch.rand(3)
            if number == 1 and dist.get_rank() == 1 and calls == 3:
                raise OSError("disk full")
            return nn.functional.cross_entropy(self.model(x), y)

        self.optimizer.zero_grad()
        loss().backward()
        self.before = [v.clone() for v in self.model.state_dict().values()], torch.get_rng_state()
        self.start = time.monotonic()
        try:
            self.scheduler.step(closure=loss)
        except (OSError, RuntimeError) as error:
            return error
        return None

    def weights(self) -> list[float]:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()]).tolist()


def fails_and_skips_the_batch(kind: str) -> tuple[str, float, bool, list[float]]:
    """What was raised, how soon, whether weights, random state, rate and scheduler were as before; the last weights."""
    training = Failing(kind)
    raised, took, kept = "", 0.0, False
    for number in range(4):
        state = training.scheduler.state_dict()
        if error := training.step(number):
            raised, took = f"{type(error).__name__}: {error}", time.monotonic() - training.start
            now = training.scheduler.state_dict()
            same = ("step_expected", "direction_held", "average")
            kept = all(now[name] == state[name] for name in state if name not in same)
            weights = training.model.state_dict().values()
            kept = kept and all(torch.equal(a, b) for a, b in zip(weights, training.before[0], strict=True))
            kept = kept and torch.equal(torch.get_rng_state(), training.before[1])
            kept = kept and training.optimizer.param_groups[0]["lr"] == state["rate"]
            continue
        training.optimizer.step()
    return raised, took, kept, training.weights()


@pytest.mark.parametrize("kind", ["replica", "ddp"])
def test_after_a_failure_on_one_rank_the_batch_may_be_skipped(pool: Callable[[int], Pool], kind: str) -> None:
    one, two = pool(2).run(fails_and_skips_the_batch, kind)
    assert one[0] == "RuntimeError: the loss could not be evaluated on rank 1 (OSError: disk full)"
    assert two[0] == "OSError: disk full"
    for _, took, kept, _ in (one, two):
        assert took < 1
        assert kept
    assert one[3] == two[3]


def fails_and_steps(kind: str) -> tuple[list[float], list[Tensor], list[float], list[Tensor], int]:
    """Weights and optimizer state after a step that the failure did not stop, beside those of the optimizer alone."""
    training = Failing(kind)
    training.step(0)
    training.optimizer.step()
    twin = copy.deepcopy(training.model.module if kind == "ddp" else training.model)
    plain = torch.optim.AdamW(twin.parameters())
    plain.load_state_dict(training.optimizer.state_dict())
    assert training.step(1) is not None
    for p, q in zip(twin.parameters(), training.model.parameters(), strict=True):
        p.grad = q.grad
    plain.step()
    training.optimizer.step()
    states = [[v for s in each.state.values() for v in s.values()] for each in (training.optimizer, plain)]
    expected = torch.cat([p.detach().flatten() for p in twin.parameters()]).tolist()
    assert training.scheduler.average is not None
    return training.weights(), states[0], expected, states[1], training.scheduler.average.count


@pytest.mark.parametrize("kind", ["replica", "ddp"])
def test_after_a_failure_the_next_step_is_an_ordinary_one_at_the_old_rate(
    pool: Callable[[int], Pool], kind: str
) -> None:
    for weights, state, expected, expected_state, averaged in pool(2).run(fails_and_steps, kind):
        assert all(torch.equal(a, b) for a, b in zip(state, expected_state, strict=True)), "advanced once"
        assert weights != expected, "averaged weights pull at them"
        assert averaged == 2, "the step counts"
        del weights, expected


def settings_differ(name: str) -> str:
    options = {
        "lr_max": {"lr_max": 1.0 + dist.get_rank()},
        "update_every": {"update_every": 1 + dist.get_rank()},
        "companions": {"companions": [gen.Verification(1 + dist.get_rank())]},
        "curvature": {"curvature": ["exact", "gauss-newton"][dist.get_rank()]},
        "micro-batches": {},
    }[name]
    model = network()
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=1e-2)
    scheduler = gen.GenScheduler(optimizer, model, nn.functional.cross_entropy, **options)  # type: ignore[arg-type]
    x, y = torch.randn(4, 3), torch.randint(0, 2, (4,))
    nn.functional.cross_entropy(model(x), y).backward()
    count = 1 + dist.get_rank() if name == "micro-batches" else 1
    try:
        scheduler.step(batches=[(x, y)] * count)
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("name", ["lr_max", "update_every", "curvature", "companions", "micro-batches"])
def test_settings_that_differ_are_told_at_the_first_step(pool: Callable[[int], Pool], name: str) -> None:
    for said in pool(2).run(settings_differ, name):
        assert said.startswith("the ranks disagree on settings")


# -------------------------------------------------------------------------------------------------------- fuzz

floats = st.one_of(st.floats(width=32), st.sampled_from([0.0, 1e-38, 1e38, math.nan, math.inf, -math.inf]))
CALLS = ["step", "step twice", "skip backward", "optimizer first", "micro-batches", "closure", "add a group"]
# On ranks, a step before the gradients are averaged takes the replicas apart: it is refused, but too late for them.
ON_RANKS = ["step", "step twice", "skip backward", "micro-batches", "closure"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(CALLS), floats, floats), min_size=1, max_size=6),
    st.sampled_from(["exact", "gauss-newton", "forward"]),
    st.booleans(),
    st.integers(1, 3),
    st.sampled_from([1e-3, 1e-7, 0.9]),
)
def test_any_calls_with_any_numbers_keep_the_rate_in_its_clamp(
    calls: list[tuple[str, float, float]], curvature: str, auto: bool, every: int, lr: float
) -> None:
    """From starts outside the clamp, too."""
    drive(calls, curvature, auto, every, lr)


def drive(
    calls: list[tuple[str, float, float]],
    curvature: str,
    auto: bool,
    every: int,
    lr: float = 1e-3,
) -> list[float]:
    """A small network through calls, with a number put among its inputs and one among its gradients."""
    model = nn.Sequential(network(), nn.Linear(2, 2))
    groups = [{"params": list(part.parameters())} for part in model]
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, groups[:1], lr=lr)
    make: Any = gen.AutoGen if auto else gen.GenScheduler
    limits = {"lr_min": 1e-5, "lr_max": 0.5, "update_every": every}
    scheduler = make(optimizer, model, nn.functional.cross_entropy, curvature=curvature, **limits)
    x, y = torch.ones(4, 3), torch.tensor([0, 1, 0, 1])
    rates: list[float] = []
    gradient: Tensor | None = None
    for call, of_input, of_gradient in calls:
        x = x.clone()
        x[0, 0] = of_input
        if call != "skip backward":
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            gradient = next(model.parameters()).grad
            assert gradient is not None
            gradient[0, 0] += of_gradient
        if call == "optimizer first":
            optimizer.step()
        if call == "add a group" and len(optimizer.param_groups) < 2:
            optimizer.add_param_group(groups[1])
        if call in ("optimizer first", "skip backward") and (gradient is None or optimizer.has_used_gradients()):
            with pytest.raises(ValueError, match=r"no parameter has a gradient|has already used these gradients"):
                scheduler.step(x, y)
            continue
        if call == "closure" and curvature != "gauss-newton":
            scheduler.step(closure=lambda x=x: nn.functional.cross_entropy(model(x), y))
        elif call == "micro-batches":
            scheduler.step(batches=[(x, y), (x[:2], y[:2])])
        else:
            scheduler.step(x, y)
        if call == "step twice":
            scheduler.step(x, y)
        optimizer.step()
        for rate in scheduler.get_last_lr():
            assert 1e-5 * (1 - 1e-9) <= rate <= 0.5, (rate, scheduler.last)
        rates += scheduler.get_last_lr()
    return rates


def many_drives() -> list[list[float]]:
    """The same sequences of calls on every rank, with other numbers on each."""
    calls, numbers = random.Random(0), random.Random(dist.get_rank())
    special = [0.0, 1.0, -3.0, 0.5, 2.0, 7.0, 1e20, math.nan]
    found = []
    for _ in range(20):
        sequence = [(calls.choice(ON_RANKS), numbers.choice(special), numbers.choice(special)) for _ in range(4)]
        curvature, auto, every = calls.choice(["exact", "forward"]), calls.random() < 0.5, calls.choice([1, 2])
        found.append(drive(sequence, curvature, auto, every))
    return found


def test_ranks_never_differ_whatever_they_see(pool: Callable[[int], Pool]) -> None:
    one, two = pool(2).run(many_drives)
    assert one == two
    assert len({rate for rates in one for rate in rates}) > 5
