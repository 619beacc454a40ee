"""Rates for each group: the K x K system against double backward, its solution, and the same on ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import KINDS, Model, criterion, data, new_model, parallel, slice_here, whole
from rank_pool import Pool
from torch import Tensor, nn

import gen_dist as gen
from gen_dist.policy.groups import solve


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Embedding, matrices and vectors; the last with a smaller rate of its own."""
    named = dict(model.named_parameters())
    vectors = [n for n, p in named.items() if n.endswith("bias") or "norm" in n]
    embedding = [n for n in named if "embedding" in n]
    rest = [n for n in named if n not in vectors and n not in embedding]
    return [
        {"params": [named[n] for n in embedding]},
        {"params": [named[n] for n in rest]},
        {"params": [named[n] for n in vectors], "lr": 1e-4},
    ]


def oracle() -> tuple[Tensor, Tensor]:
    """`b` and `A` on the union batch, by double backward along every direction and sum of two."""
    model = new_model()
    x, y = data()[0]
    criterion(model(x), y).backward()
    groups = groups_of(model)
    weights = [p for g in groups for p in g["params"]]
    optimizer = torch.optim.AdamW([{"params": g["params"]} for g in groups], lr=1.0)
    step = dict(zip(model.parameters(), reference.direction(model, optimizer), strict=True))
    directions = [
        [step[p] if any(p is q for q in g["params"]) else torch.zeros_like(p) for p in weights] for g in groups
    ]

    def along(d: list[Tensor]) -> tuple[float, float]:
        return reference.derivatives(lambda: criterion(model(x), y), weights, d)[1:]  # type: ignore[return-value]

    b = torch.tensor([along(d)[0] for d in directions], dtype=torch.float64)
    a = torch.zeros(3, 3, dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            both = along([u + v for u, v in zip(directions[i], directions[j], strict=True)])[1]
            a[i, j] = (both - along(directions[i])[1] - along(directions[j])[1]) / 2
    return b, a


def float64_of(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


Trace = tuple[list[list[float]], list[float], list[list[float]], dict[str, Tensor]]


def train(kind: str, curvature: str = "exact", rates: bool | str = True, auto: bool = False) -> Trace:
    """Rates of the groups step by step, `b` and `A` of the first step, and final weights."""
    here = slice_here()
    inner = new_model()
    model = parallel(inner, kind)
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, groups_of(inner), lr=1e-3)
    scheduler: gen.GenScheduler
    if auto:
        scheduler = gen.AutoGen(optimizer, model, criterion, update_every=2, group_rates=rates)
    else:
        scheduler = gen.GenScheduler(optimizer, model, criterion, curvature=curvature, group_rates=rates)
    seen, systems = [], []
    for x, y in data()[:4]:
        optimizer.zero_grad()
        criterion(model(x[here]), y[here]).backward()
        scheduler.step(x[here], y[here])
        optimizer.step()
        seen.append(scheduler.get_last_lr())
        systems.append(scheduler.state.groups)
    weights = {name: whole(p) for name, p in inner.named_parameters()}
    return seen, systems[0].numerators, systems[0].denominators, weights


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_system_and_its_solution_equal_the_reference(pool: Callable[[int], Pool], ranks: int, kind: str) -> None:
    b, a = oracle()
    solution = solve(a, b)
    assert solution is not None
    ratios = solution / solution.max()
    expected = ratios * (ratios @ b) / (ratios @ a @ ratios)  # solution itself, had A been positive definite
    for rates, seen_b, seen_a, _ in pool(ranks).run(train, kind):
        torch.testing.assert_close(float64_of(seen_b), b, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(float64_of(seen_a), a, rtol=1e-8, atol=1e-9)
        assert max(expected) < 1, "the clamp would hide it"
        assert rates[0] == pytest.approx(expected.tolist(), rel=1e-7)


@pytest.mark.parametrize("auto", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_training_on_ranks_equals_one_process(pool: Callable[[int], Pool], kind: str, auto: bool) -> None:
    rates, _, _, weights = train("replica", auto=auto)
    results = pool(2).run(train, kind, "exact", True, auto)
    for seen, _, _, seen_weights in results:
        assert seen == results[0][0]
        for ours, theirs in zip(seen, rates, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-8)
        for name, weight in weights.items():
            torch.testing.assert_close(seen_weights[name], weight, rtol=1e-8, atol=1e-9)


def test_on_a_quadratic_the_step_ends_at_the_minimum_of_the_plane(float64: None) -> None:
    torch.manual_seed(3)
    one, two = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(3))
    root = torch.randn(7, 7)
    hessian = root @ root.T + torch.eye(7)

    def loss() -> Tensor:
        theta = torch.cat([one, two])
        return theta @ hessian @ theta / 2

    model = nn.ParameterList([one, two])
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, [{"params": [one]}, {"params": [two], "lr": 0.5}], lr=1.0)
    scheduler = gen.GenScheduler(optimizer, model, lr_max=math.inf, group_rates=True)
    loss().backward()
    plane = torch.block_diag(one.grad[:, None], two.grad[:, None])  # type: ignore[index]
    start = torch.cat([one, two]).detach()
    best = torch.linalg.solve(plane.T @ hessian @ plane, plane.T @ hessian @ start)
    scheduler.step(closure=loss)
    optimizer.step()
    torch.testing.assert_close(torch.cat([one, two]).detach(), start - plane @ best)
    assert (best > 0).all(), "otherwise the safeguard would have acted"


def forwards(model: Model, call: Callable[[], None]) -> int:
    count = 0

    def add(*_: Any) -> None:
        nonlocal count
        count += 1

    handle = model.register_forward_hook(add)
    call()
    handle.remove()
    return count


@pytest.mark.parametrize("rates", [True, "diagonal"])
def test_forward_passes_give_the_diagonal(rates: bool | str) -> None:
    model = new_model()
    x, y = data()[0]
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, groups_of(model), lr=1e-3)
    scheduler = gen.GenScheduler(
        optimizer, model, criterion, curvature="forward", group_rates=rates, companions=[gen.SelfCheck(None)]
    )
    criterion(model(x), y).backward()
    assert forwards(model, lambda: scheduler.step(x, y)) == 2 * 3 + 1
    b, a = oracle()
    assert scheduler.state.groups is not None
    _, seen_b, seen_a = scheduler.state.groups
    assert seen_b == pytest.approx(b.tolist(), rel=1e-3)  # finite differences at 1e-3
    assert float64_of(seen_a).diagonal().tolist() == pytest.approx(a.diagonal().tolist(), rel=2e-2)
    assert torch.equal(float64_of(seen_a), float64_of(seen_a).diag().diag())


def reductions(full: bool | str) -> list[int]:
    """Bytes of the collectives of one update in DDP."""
    from gen_dist.parallel import ranks as collectives

    model = parallel(inner := new_model(), "ddp")
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, groups_of(inner), lr=1e-3)
    scheduler = gen.GenScheduler(optimizer, model, criterion, group_rates=full, companions=[gen.SelfCheck(None)])
    x, y = data()[0]
    criterion(model(x), y).backward()
    sizes: list[int] = []
    all_reduce = collectives.dist.all_reduce

    def counted(values: Tensor, **arguments: Any) -> None:
        sizes.append(values.nbytes)
        all_reduce(values, **arguments)

    collectives.dist.all_reduce = counted  # type: ignore[assignment]
    try:
        scheduler.step(x, y)
    finally:
        collectives.dist.all_reduce = all_reduce
    return sizes


@pytest.mark.parametrize(("full", "lines"), [(True, 6), ("diagonal", 3)])
def test_one_reduction_still(pool: Callable[[int], Pool], full: bool | str, lines: int) -> None:
    assert pool(2).run(reductions, full)[0] == [8 * (8 + 5 * lines + 3 * 3)]


# -------------------------------------------------------------------------------------------- the solution


def test_a_positive_system_is_solved() -> None:
    a, b = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double(), torch.tensor([1.0, 1.0]).double()
    torch.testing.assert_close(solve(a, b), torch.linalg.solve(a, b))


@pytest.mark.parametrize(
    "a",
    [
        [[1.0, 3.0], [3.0, 1.0]],  # indefinite
        [[-1.0, 0.0], [0.0, 2.0]],  # a negative diagonal
        [[1.0, 0.9], [0.9, 0.85]],  # definite, with a negative rate
    ],
)
def test_the_safeguard_gives_positive_rates(a: list[list[float]]) -> None:
    matrix, b = torch.tensor(a).double(), torch.tensor([1.0, 2.0]).double()
    rates = solve(matrix, b)
    assert rates is not None
    assert (rates > 0).all()
    shifts = ((matrix @ rates - b) / -(matrix.diagonal().abs() * rates)).tolist()
    assert shifts[0] == pytest.approx(shifts[1]), "the solution for some mu"
    assert shifts[0] > 0


def test_no_solution_without_descent_or_bend() -> None:
    eye = torch.eye(2).double()
    assert solve(eye, torch.tensor([1.0, -1.0]).double()) is None
    assert solve(torch.zeros(2, 2).double(), torch.ones(2).double()) is None
    assert solve(torch.zeros(2, 2).double(), torch.zeros(2).double()) is None
    assert solve(2 * eye, torch.tensor([1.0, 5e-324]).double()) is None, "a rate that rounds to zero"
    rates = solve(torch.diag(torch.tensor([2.0, 0.0]).double()), torch.tensor([1.0, 0.0]).double())
    assert rates is not None
    assert rates.tolist() == pytest.approx([0.5, 0.5]), "a group at rest keeps out of it"


numbers = st.floats(-1e12, 1e12)


@given(st.lists(numbers, min_size=6, max_size=6), st.lists(numbers, min_size=3, max_size=3))
def test_any_system_gives_positive_rates_or_none(upper: list[float], b: list[float]) -> None:
    a = torch.zeros(3, 3, dtype=torch.float64)
    a[torch.triu_indices(3, 3).unbind()] = torch.tensor(upper, dtype=torch.float64)
    a = a + a.T
    rates = solve(a, torch.tensor(b, dtype=torch.float64))
    assert rates is None or bool((rates > 0).all() and rates.isfinite().all())


# ------------------------------------------------------------------------------------------- around training


def test_a_run_goes_on_from_its_state() -> None:
    whole_run = train("replica", auto=True)[0]
    model = new_model()
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, groups_of(model), lr=1e-3)
    scheduler = gen.AutoGen(optimizer, model, criterion, update_every=2, group_rates=True)
    rates = []
    for number, (x, y) in enumerate(data()[:4]):
        if number == 1:
            states = scheduler.state_dict(), optimizer.state_dict(), model.state_dict()
            model = new_model()
            optimizer = gen.make_gen_optimizer(torch.optim.AdamW, groups_of(model), lr=1e-3)
            scheduler = gen.AutoGen(optimizer, model, criterion, update_every=2, group_rates=True)
            scheduler.load_state_dict(states[0])
            optimizer.load_state_dict(states[1])
            model.load_state_dict(states[2])
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        scheduler.step(x, y)
        optimizer.step()
        rates.append(scheduler.get_last_lr())
    assert rates == whole_run


def test_a_group_added_later_starts_with_its_own_ratio() -> None:
    model = new_model()
    groups = groups_of(model)
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, groups[:2], lr=1e-3)
    scheduler = gen.GenScheduler(optimizer, model, criterion, group_rates=True)
    for number, (x, y) in enumerate(data()[:3]):
        if number == 1:
            optimizer.add_param_group(groups[2])
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        scheduler.step(x, y)
        optimizer.step()
        assert len(scheduler.get_last_lr()) == (2 if number == 0 else 3)
        assert all(0 < rate <= 1 for rate in scheduler.get_last_lr())


def test_wrong_values_are_refused() -> None:
    model = new_model()
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, groups_of(model), lr=1e-3)
    with pytest.raises(ValueError, match="group_rates must be True, False or 'diagonal'"):
        gen.GenScheduler(optimizer, model, criterion, group_rates="full")
