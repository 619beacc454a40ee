"""The direction: the base step runs once, theta is restored bit for bit, and moving along d is the base step."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import gen_dist as gen

CASES: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {}),
    "sgd-momentum-decay": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "sgd-nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {"weight_decay": 0.01}),
    "adam-amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "adamw-foreach": (torch.optim.AdamW, {"foreach": True}),
    "adamw-fused": (torch.optim.AdamW, {"fused": True}),
    "adagrad": (torch.optim.Adagrad, {"lr_decay": 0.01}),
    "adadelta": (torch.optim.Adadelta, {}),
    "adamax": (torch.optim.Adamax, {}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.5, "centered": True}),
    "nadam": (torch.optim.NAdam, {"weight_decay": 0.01, "decoupled_weight_decay": True}),
    "radam": (torch.optim.RAdam, {"weight_decay": 0.01}),
}
if hasattr(torch.optim, "Muon"):
    CASES["muon"] = (torch.optim.Muon, {"weight_decay": 0.1})

RATES = [0.0, 1e-12, 1e-3, 10.0]
STEPS = 8  # enough for RAdam's rectified branch


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter((0.05 * torch.randn(7, 5, generator=generator, dtype=torch.float64)).to(dtype))]


def gradients(dtype: torch.dtype, scale: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [(scale * torch.randn(7, 5, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(STEPS)]


def true_direction(case: str, dtype: torch.dtype, scale: float) -> list[Tensor]:
    """The directions of float64 steps at rate 1, each from the same weights."""
    cls, arguments = CASES[case]
    [p] = parameters(dtype)
    if case == "muon":
        return muon_direction(p.detach(), dtype, scale)
    p = nn.Parameter(p.detach().double())
    start = p.detach().clone()
    optimizer = cls([p], **arguments | {"lr": 1.0})
    directions = []
    for g in gradients(dtype, scale):
        with torch.no_grad():
            p.copy_(start)
        p.grad = g.double()
        optimizer.step()
        directions.append(start - p.detach())
    return directions


def muon_direction(theta: Tensor, dtype: torch.dtype, scale: float) -> list[Tensor]:
    """Muon orthogonalises in bfloat16, where a slightly different input rounds differently, so float64 is no oracle.

    From zero weights its step is exactly minus the orthogonal part; the decay is added here.
    """
    p = nn.Parameter(torch.zeros_like(theta))
    optimizer = torch.optim.Muon([p], lr=1.0, weight_decay=0.0)
    directions = []
    for g in gradients(dtype, scale):
        with torch.no_grad():
            p.zero_()
        p.grad = g
        optimizer.step()
        directions.append(0.1 * theta.double() - p.detach().double())
    return directions


@pytest.mark.parametrize("scale", [1.0, 1e-5])
@pytest.mark.parametrize("lr", RATES)
@pytest.mark.parametrize("case", CASES)
def test_direction_is_accurate_at_any_rate(case: str, lr: float, scale: float) -> None:
    cls, arguments = CASES[case]
    [p] = parameters(torch.float32)
    start = p.detach().clone()
    optimizer = gen.make_gen_optimizer(cls, [p], **arguments | {"lr": lr})
    for g, d in zip(gradients(torch.float32, scale), true_direction(case, torch.float32, scale), strict=True):
        p.grad = g
        optimizer.compute_param_updates()
        assert torch.equal(p, start), "theta must come back bit for bit"
        assert optimizer.param_groups[0]["lr"] == lr
        error = (optimizer.get_param_update(p).double() - d).norm() / d.norm()
        assert error < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_moving_along_the_direction_is_the_base_step(case: str) -> None:
    cls, arguments = CASES[case]
    [p], [q] = parameters(torch.float64), parameters(torch.float64)
    optimizer = gen.make_gen_optimizer(cls, [p], **arguments | {"lr": 0.5})
    base = cls([q], **arguments | {"lr": 0.5})
    for step, g in enumerate(gradients(torch.float64, 1.0)):
        p.grad, q.grad = g.clone(), g.clone()
        optimizer.compute_param_updates()
        for group in (*optimizer.param_groups, *base.param_groups):
            group["lr"] = 0.01 * (step + 1)
        optimizer.step()
        base.step()
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


def test_state_advances_once_an_iteration() -> None:
    [p] = parameters(torch.float32)
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, [p])
    for g in gradients(torch.float32, 1.0):
        p.grad = g
        optimizer.compute_param_updates()
        optimizer.step()
    assert optimizer.state[p]["step"] == STEPS


def test_without_a_direction_it_is_the_base_optimizer() -> None:
    [p], [q] = parameters(torch.float32), parameters(torch.float32)
    optimizer, base = gen.make_gen_optimizer(torch.optim.AdamW, [p]), torch.optim.AdamW([q])
    for g in gradients(torch.float32, 1.0):
        p.grad, q.grad = g.clone(), g.clone()
        optimizer.step()
        base.step()
    assert torch.equal(p, q)


def test_class_bases() -> None:
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, parameters(torch.float32))
    assert type(optimizer).__bases__ == (gen.GenOptimizer, torch.optim.AdamW)
    assert isinstance(optimizer, torch.optim.AdamW)


def test_as_gen_optimizer_keeps_the_object_its_state_groups_and_hooks() -> None:
    [p], [q] = parameters(torch.float32), parameters(torch.float32)
    optimizer, base = torch.optim.AdamW([p]), torch.optim.AdamW([q])
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    first, second, *_ = gradients(torch.float32, 1.0)
    p.grad, q.grad = first.clone(), first.clone()
    optimizer.step()
    base.step()
    groups, state = optimizer.param_groups, optimizer.state
    converted = gen.as_gen_optimizer(optimizer)
    assert converted is optimizer
    assert converted.param_groups is groups
    assert converted.state is state
    calls.clear()
    p.grad, q.grad = second.clone(), second.clone()
    converted.compute_param_updates()
    assert calls == [], "hooks must run only at the step that the user takes"
    converted.step()
    assert calls == ["before", "after"]
    base.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def test_get_param_update_says_when_there_is_none() -> None:
    p, frozen, stranger = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, [p, frozen], lr=0.1)
    with pytest.raises(ValueError, match="no direction is held"):
        optimizer.get_param_update(p)
    p.grad = torch.tensor([1.0, 2.0])
    optimizer.compute_param_updates()
    assert torch.equal(optimizer.get_param_update(p), p.grad)
    assert torch.equal(optimizer.get_param_update(frozen), torch.zeros(2))
    with pytest.raises(ValueError, match="not in the optimizer"):
        optimizer.get_param_update(stranger)
    optimizer.reset()
    with pytest.raises(ValueError, match="no direction is held"):
        optimizer.get_param_update(p)


def test_step_with_a_closure_while_a_direction_is_held_is_refused() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, [p], lr=0.1)
    p.grad = torch.ones(2)
    optimizer.compute_param_updates()
    with pytest.raises(ValueError, match="run the closure before"):
        optimizer.step(lambda: p.square().sum().backward())


def test_a_closure_that_makes_no_gradients_may_come_with_a_held_direction() -> None:
    """Lightning's optimizers pass one."""
    p = nn.Parameter(torch.ones(2))
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, [p], lr=0.25)
    p.grad = torch.ones(2)
    optimizer.compute_param_updates()
    optimizer.step(lambda: torch.tensor(0.0))
    assert torch.equal(p, torch.full((2,), 0.75))


def test_tensor_rates_keep_their_identity() -> None:
    p = nn.Parameter(torch.ones(2))
    rate = torch.tensor(0.25)
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, [p], lr=rate, foreach=False, weight_decay=0.0)
    p.grad = torch.ones(2)
    optimizer.compute_param_updates()
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate == 0.25
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((2,), 0.75), rtol=1e-6, atol=0)


class Relative(Optimizer):
    """An optimizer whose step is not linear in lr, and which no list names."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=min(group["lr"], 0.01))


@pytest.mark.parametrize(
    "cls", [torch.optim.LBFGS, torch.optim.Rprop, torch.optim.ASGD, torch.optim.Adafactor, Relative]
)
def test_optimizers_without_a_direction_are_refused_by_name(cls: type[Optimizer]) -> None:
    with pytest.raises(TypeError, match=f"{cls.__name__}.*(use|SGD)"):
        gen.make_gen_optimizer(cls, parameters(torch.float32))
    with pytest.raises(TypeError, match=cls.__name__):
        gen.as_gen_optimizer(cls(parameters(torch.float32)))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_and_pickles(copied: Any) -> None:
    [p] = parameters(torch.float32)
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, [p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    twin = copied(optimizer)
    assert type(twin) is type(optimizer)
    assert twin.state_dict()["state"][0]["step"] == 1
