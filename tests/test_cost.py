"""What an update may cost: memory, passes over the parameters, and reads of results by the host."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from counting import HostReads
from memory import allocations
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from update_cost import problem

import gen_dist as gen
from gen_dist.line import Line, MicroBatch, Slice, exact, gauss_newton
from gen_dist.parallel import Layout

ESTIMATORS = [("exact", 2), ("gauss-newton", 2), ("forward", 2), ("forward", 1)]


def prepared(curvature: str, probes: int, width: int = 256, depth: int = 8) -> tuple[Any, Any, Callable[[], None]]:
    """An optimizer and a scheduler before their third step, with gradients, and a function that makes the update."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)))
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=1e-3, momentum=0.9)
    scheduler = gen.GenScheduler(optimizer, model, F.mse_loss, curvature=curvature, probes=probes, update_every=2)
    x, y = torch.randn(2, width), torch.randn(2, width)
    loss: Tensor = torch.zeros(())

    def gradients() -> None:
        nonlocal loss
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()

    for _ in range(2):
        gradients()
        scheduler.step(x, y, loss=loss)
        optimizer.step()
    gradients()
    return optimizer, scheduler, lambda: scheduler.step(x, y, loss=loss)


@pytest.mark.parametrize(("curvature", "probes"), ESTIMATORS)
def test_memory_is_a_copy_of_the_parameters_for_the_direction_and_one_to_walk(curvature: str, probes: int) -> None:
    width, depth = 256, 8
    optimizer, scheduler, update = prepared(curvature, probes, width, depth)
    parameters, weight = 4 * depth * width**2, 4 * width**2
    peak, held = allocations(update)
    assert math.isfinite(scheduler.last.denominator)
    copies = 2 if curvature == "forward" else 1
    assert peak < copies * parameters + weight / 2  # and activations
    assert held == pytest.approx(parameters, rel=0.01)  # the direction
    _, released = allocations(optimizer.step)
    assert held + released == pytest.approx(0, abs=0.01 * parameters)


@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt", "gelu", "gelu tanh", "silu", "mish"])
def test_jets_need_three_times_the_memory_of_a_forward_pass(name: str) -> None:
    """A jet is three tensors in place of one. Intermediate results of the rules add nothing at the peak."""
    if name in ("mlp", "cnn", "gpt"):
        model, criterion, x, y = problem(name)
    else:
        kind, *approximate = name.split()
        activation = {"gelu": nn.GELU(*approximate or ["none"]), "silu": nn.SiLU(), "mish": nn.Mish()}[kind]
        model, criterion = nn.Sequential(nn.Linear(64, 256), activation, nn.Linear(256, 64)), F.mse_loss
        x, y = torch.randn(512, 64), torch.randn(512, 64)
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=1e-3)
    criterion(model(x), y).backward()
    optimizer.compute_param_updates()
    assert optimizer.direction is not None
    line = Line(Layout(model), optimizer.direction, Slice([MicroBatch(model, criterion, x, y)]))
    with torch.no_grad():
        forward, _ = allocations(lambda: criterion(model(x), y))
    assert allocations(lambda: exact(line))[0] < 3.02 * forward
    assert allocations(lambda: gauss_newton(line))[0] < 3.02 * forward


class Passes(TorchDispatchMode):
    """Records the operators that read or write a tensor of this many elements. Views do neither."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements
        self.seen: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        arguments = [*(args[0] if args and isinstance(args[0], (list, tuple)) else []), *args]
        large = any(isinstance(x, Tensor) and x.numel() == self.elements for x in arguments)
        if large and not is_view(operation):
            self.seen.append(operation._schema.name.removeprefix("aten::"))
        return result


def is_view(operation: Any) -> bool:
    returns = operation._schema.returns
    alias = returns[0].alias_info if returns else None
    return alias is not None and not alias.is_write


def passes(curvature: str, probes: int) -> tuple[list[str], list[str]]:
    width = 89
    optimizer, _, update = prepared(curvature, probes, width, depth=1)
    with Passes(width**2) as in_update:
        update()
    with Passes(width**2) as in_step:
        optimizer.step()
    return in_update.seen, in_step.seen


DIRECTION = 6  # a copy, three of momentum SGD's own step, the difference, the division
LOOKS = 2  # finite? and g.d
COPY_AND_BACK = 2
MOVE = 1


@pytest.mark.parametrize("probes", [1, 2])
def test_passes_over_the_parameters_by_probes(probes: int) -> None:
    in_update, in_step = passes("forward", probes)
    beside_the_model = [name for name in in_update if name != "mm"]
    assert len(in_update) - len(beside_the_model) == probes
    assert len(beside_the_model) == DIRECTION + LOOKS + COPY_AND_BACK + MOVE * probes, in_update
    assert len(in_step) == 1, in_step


@pytest.mark.parametrize("curvature", ["exact", "gauss-newton"])
def test_passes_over_the_parameters_by_jets(curvature: str) -> None:
    in_update, in_step = passes(curvature, 2)
    assert len([name for name in in_update if name != "mm"]) == DIRECTION + LOOKS, in_update
    assert len(in_step) == 1, in_step


@pytest.mark.parametrize(("curvature", "probes"), ESTIMATORS)
def test_the_host_reads_two_results_an_update(curvature: str, probes: int) -> None:
    """One read checks that the gradients are finite, and the other takes the reduced numbers."""
    _, _, update = prepared(curvature, probes)
    with HostReads() as reads:
        update()
    assert reads.seen == ["item", "tolist"]


@pytest.mark.parametrize(
    ("optimizer_class", "options", "waits"),
    [
        (torch.optim.AdamW, {"fused": True}, 0),
        (torch.optim.SGD, {"fused": True}, 0),
        (torch.optim.SGD, {"fused": True, "momentum": 0.9}, 1),
        (torch.optim.SGD, {}, 1),
    ],
)
def test_between_updates_the_host_waits_for_no_fused_optimizer(
    optimizer_class: type[torch.optim.Optimizer], options: dict[str, Any], waits: int
) -> None:
    model = nn.Linear(3, 1)
    optimizer = gen.make_gen_optimizer(optimizer_class, model.parameters(), lr=1e-3, **options)
    scheduler = gen.GenScheduler(optimizer, model, F.mse_loss, update_every=100, average=True)
    x, y = torch.randn(2, 3), torch.randn(2, 1)
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        with HostReads() as reads:
            scheduler.step(x, y)
            optimizer.step()
    assert reads.seen == ["item"] * waits
