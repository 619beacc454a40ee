"""Half precision: the rate is that of float32 within 20 %, or the update is declined. Overflow changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import CNN, GPT
from problems import parallel, perceptron
from rank_pool import Pool
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import gen_dist as gen
from gen_dist.parallel import local

STEPS = 50


def criterion(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


def problem(name: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    if name == "gpt":
        tokens = torch.randint(0, 16, (STEPS, 8, 17)).cummax(-1).values  # something to learn
        return GPT(16, context=16, depth=1, width=32, heads=2), [(t[:, :-1], t[:, 1:]) for t in tokens]
    centres = torch.randn(4, 1, 8, 8)
    labels = torch.randint(0, 4, (STEPS, 32))
    return CNN(1, 4, width=8), [(centres[y] + torch.randn(32, 1, 8, 8), y) for y in labels]


@pytest.mark.parametrize("estimator", [("exact", 2), ("gauss-newton", 2), ("forward", 2), ("forward", 1)])
@pytest.mark.parametrize("how", ["autocast around the step", "autocast in a closure", "bfloat16 weights"])
@pytest.mark.parametrize("name", ["gpt", "cnn"])
def test_bfloat16_rates(name: str, how: str, estimator: tuple[str, int]) -> None:
    """At each step of a float32 run, compare the rates that both precisions choose there."""
    curvature, probes = estimator
    if how == "autocast in a closure" and curvature == "gauss-newton":
        pytest.skip("gauss-newton takes no closures")
    model, batches = problem(name)
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), lr=1e-3)
    scheduler = gen.GenScheduler(optimizer, model, criterion, curvature=curvature, probes=probes)
    half = copy.deepcopy(model).bfloat16() if how == "bfloat16 weights" else model
    ratios, declined = [], 0
    twin: gen.GenScheduler | None = None
    for x, y in batches:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        state, before = copy.deepcopy(optimizer.state_dict()), scheduler.state_dict()
        scheduler.step(x, y)
        true = scheduler.last
        if how == "bfloat16 weights":
            half.load_state_dict(model.state_dict())
            for p, q in zip(half.parameters(), model.parameters(), strict=True):
                p.grad = None if q.grad is None else q.grad.bfloat16()
        half_optimizer = gen.make_gen_optimizer(torch.optim.AdamW, half.parameters(), lr=1e-3)
        half_optimizer.load_state_dict(state)
        twin = gen.GenScheduler(half_optimizer, half, criterion, curvature=curvature, probes=probes)
        twin.load_state_dict(before)
        x = x.bfloat16() if how == "bfloat16 weights" and x.is_floating_point() else x
        if how == "autocast around the step":
            with torch.autocast("cpu", torch.bfloat16):
                twin.step(x, y)
        elif how == "autocast in a closure":
            twin.step(closure=lambda x=x, y=y: autocast_loss(half, x, y))
        else:
            twin.step(x, y)
        assert true is not None
        assert twin.last is not None
        if true.accepted and twin.last.accepted:
            ratios.append(twin.last.lr / true.lr)
        declined += not twin.last.accepted
        optimizer.param_groups[0]["lr"] = 1e-3
        optimizer.step()
    inside = [ratio for ratio in ratios if 0.8 <= ratio <= 1.2]
    assert len(inside) == len(ratios), f"{len(ratios) - len(inside)} of {len(ratios)} rates off: {sorted(ratios)}"
    if curvature != "forward":
        assert len(ratios) > STEPS / 2, f"only {len(ratios)} accepted by both, {declined} declined"


@pytest.mark.parametrize("estimator", [("exact", 2), ("forward", 2), ("forward", 1)])
@pytest.mark.parametrize("compiled_blocks", [False, True])
def test_autocast_in_the_model_counts_as_around_it(compiled_blocks: bool, estimator: tuple[str, int]) -> None:
    """Also where the model gives its output in float32: no false alarm, and no rate from rounding."""

    class Autocast(GPT):
        inside = False

        def forward(self, tokens: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.inside or torch.is_autocast_enabled("cpu")):
                return super().forward(tokens).float()

    curvature, probes = estimator
    for seed in range(2):
        torch.manual_seed(seed)
        model = Autocast(64, context=16)
        tokens = torch.randint(64, (2, 17))
        x, y = tokens[:, :-1], tokens[:, 1:]
        if compiled_blocks:
            for block in model.blocks:
                block.compile(backend="eager")
        seen = []
        for inside in (False, True):
            model.inside = inside
            optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), lr=1e-5)
            scheduler = gen.GenScheduler(optimizer, model, criterion, curvature=curvature, probes=probes)
            with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
                loss = criterion(model(x), y)
            loss.backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
                scheduler.step(x, y)
            assert scheduler.last is not None
            seen.append(scheduler.last.reason)
            optimizer.zero_grad()
        assert seen[0] == seen[1]
        assert curvature == "exact" or seen[0] == "curvature within rounding"


def autocast_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return criterion(model(x), y)


# ------------------------------------------------------------------------------------------------- float16


@pytest.mark.parametrize("curvature", ["exact", "gauss-newton"])
@pytest.mark.parametrize("how", ["around the step", "in the model"])
def test_float16_numbers_along_a_direction_of_large_entries(how: str, curvature: str) -> None:
    """Adam's first direction is about 1 in every weight: unscaled, accelerations pass 65504, the largest number."""

    class Autocast(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.float16, enabled=how == "in the model" and self.training):
                return super().forward(x)

    model = Autocast(*(layer for _ in range(4) for layer in (nn.Linear(512, 512), nn.LayerNorm(512), nn.GELU())))
    x, y = torch.randn(8, 512), torch.randint(0, 512, (8,))
    numbers = []
    for half in (False, True):
        weights = copy.deepcopy(model).train(half)
        criterion(weights(x), y).backward()
        optimizer = gen.make_gen_optimizer(torch.optim.AdamW, weights.parameters(), lr=1e-3)
        scheduler = gen.GenScheduler(optimizer, weights, criterion, curvature=curvature)
        with torch.autocast("cpu", torch.float16, enabled=half and how == "around the step"):
            for _ in range(2):
                scheduler.step(x, y)
        assert scheduler.last is not None
        numbers.append((scheduler.last.numerator, scheduler.last.denominator))
    assert numbers[1] == pytest.approx(numbers[0], rel=0.1)


# ------------------------------------------------------------------------------------- float16 with a scaler


def scaled_training(kind: str, fused: bool) -> list[tuple[Any, ...]]:
    """Take four steps, of which the second overflows, only on the slice of one rank."""
    torch.manual_seed(1)
    model = parallel(perceptron(4, 8, 3), kind)
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), lr=1e-3, fused=fused)
    scheduler = gen.ExactGen(optimizer, model, F.cross_entropy, lr_max=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    rank = dist.get_rank() if dist.is_initialized() else 0
    generator = torch.Generator().manual_seed(rank)
    seen = []
    for step in range(4):
        x, y = torch.randn(8, 4, generator=generator), torch.randint(0, 3, (8,), generator=generator)
        if step == 1 and rank == 0:
            x[0, 0] = 1e38
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(x).float(), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        with torch.autocast("cpu", torch.float16):
            scheduler.step(x, y)
        scaler.step(optimizer)
        scaler.update()
        assert scheduler.last is not None
        state = optimizer.state_dict()["state"]
        weights = torch.cat([local(p).detach().flatten() for p in model.parameters()])
        moments = torch.cat([local(state[k]["exp_avg"]).flatten() for k in state]) if state else torch.zeros(1)
        count = int(state[0]["step"]) if state else 0
        seen.append((scheduler.last.reason, scheduler.last.lr, count, weights.tolist(), moments.tolist()))
    return seen


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("kind", "ranks"), [("alone", 1), ("ddp", 2), ("fsdp2", 2)])
def test_an_overflow_step_changes_nothing_on_any_rank(
    pool: Callable[[int], Pool], kind: str, ranks: int, fused: bool
) -> None:
    results = pool(ranks).run(scaled_training, kind, fused)
    for first, overflow, third, last in results:
        assert [s[0] for s in (first, third, last)] == ["accepted"] * 3 or first[0] == "clamped"
        assert overflow[0] == "not finite"
        assert overflow[1:] == first[1:], "rate, counters, weights and moments as before"
        assert (first[2], third[2], last[2]) == (1, 2, 3)
        assert third[3] != first[3]
    if kind != "fsdp2":  # whose ranks hold different weights
        assert all(result == results[0] for result in results)


def mixed_policy(curvature: str) -> tuple[float, float, str]:
    """The third rates of FSDP2 with float32 and with bfloat16 computation, and the reason of the latter."""
    rates = []
    for dtype in (None, torch.bfloat16):
        model, batches = problem("gpt")
        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block, mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
        fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, output_dtype=torch.float32))
        optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), lr=1e-3)
        scheduler = gen.GenScheduler(optimizer, model, criterion, lr_max=1.0, curvature=curvature)
        for x, y in batches[:3]:
            here = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
            optimizer.zero_grad()
            criterion(model(x[here]), y[here]).backward()
            scheduler.step(x[here], y[here])
            for group in optimizer.param_groups:
                group["lr"] = 1e-3  # the same steps in both
            optimizer.step()
        assert scheduler.last is not None
        rates.append(scheduler.last)
    return rates[0].lr, rates[1].lr, rates[1].reason


@pytest.mark.parametrize("curvature", ["exact", "gauss-newton", "forward"])
def test_fsdp2_mixed_precision(pool: Callable[[int], Pool], curvature: str) -> None:
    for full, half, reason in pool(2).run(mixed_policy, curvature):
        assert half == pytest.approx(full, rel=0.2) or reason == "curvature within rounding"
