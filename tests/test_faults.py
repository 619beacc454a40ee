"""Faults injected: interrupts at every point of a step, NaN anywhere, errors on one rank. Nothing is half done."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gen_dist as gen

# ------------------------------------------------------------------------------------------------ no half step


class Interrupt(KeyboardInterrupt):
    """Ctrl-C, at a point of our choice."""


def interrupted_at(point: int, call: Callable[[], Any]) -> bool:
    """Run `call`, interrupted at its n-th call or return, Python's or C's; whether it came so far."""
    count = 0

    def count_down(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == point:
            sys.setprofile(None)
            raise Interrupt

    try:
        sys.setprofile(count_down)
        call()
    except Interrupt:
        return True
    finally:
        sys.setprofile(None)
    return False


def problem(curvature: str) -> tuple[gen.GenScheduler, nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.2), nn.Linear(3, 1))
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=1e-2, momentum=0.9, foreach=False)
    scheduler = gen.GenScheduler(optimizer, model, nn.functional.mse_loss, curvature=curvature, verify=1)
    return scheduler, model, torch.randn(4, 2), torch.randn(4, 1)


@pytest.mark.parametrize("curvature", ["exact", "forward"])
def test_an_interrupt_anywhere_leaves_no_displaced_weights(curvature: str) -> None:
    scheduler, model, x, y = problem(curvature)
    nn.functional.mse_loss(model(x), y).backward()
    scheduler.step(x, y)  # warm: what happens once alone is behind it
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    point, reached, stride = 1, True, 3 if curvature == "forward" else 41
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
