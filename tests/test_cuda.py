"""On a GPU: equality with the float64 reference, NCCL, half precision, random state, memory, synchronisation."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import reference
import torch
import torch.distributed as dist
from problems import criterion, data, new_model, parallel
from programs import torchrun
from torch import Tensor, nn

import gen_dist as gen

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ESTIMATORS = [("exact", 2), ("gauss-newton", 2), ("forward", 2), ("forward", 1)]


def on_gpu(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x.cuda(), y.cuda()


def first_update(model: nn.Module, curvature: str, probes: int, fused: bool = False) -> gen.Update:
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), lr=1e-2, fused=fused)
    scheduler = gen.GenScheduler(optimizer, model, criterion, curvature=curvature, probes=probes)
    x, y = on_gpu(*data()[0])
    criterion(model(x), y).backward()
    scheduler.step(x, y)
    assert scheduler.last is not None
    optimizer.step()
    return scheduler.last


def oracle(curvature: str, probes: int) -> tuple[float, float]:
    """`(g.d, d'Hd)` in float64 on the CPU."""
    model = new_model()
    x, y = data()[0]
    criterion(model(x), y).backward()
    d = reference.direction(model, torch.optim.AdamW(model.parameters(), lr=1.0))
    return reference.estimate(model, criterion, x, y, d, curvature, 1e-2, probes)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("curvature", "probes"), ESTIMATORS)
def test_an_update_equals_the_cpu_reference(curvature: str, probes: int, fused: bool) -> None:
    seen = first_update(new_model().cuda(), curvature, probes, fused)
    assert (seen.numerator, seen.denominator) == pytest.approx(oracle(curvature, probes), rel=1e-9)


def test_a_suggestion_and_the_curves_are_those_of_the_cpu() -> None:
    found = []
    for device in ("cpu", "cuda"):
        model = new_model().to(device)
        x, y = (tensor.to(device) for tensor in data()[0])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        held_out = tuple(tensor.to(device) for tensor in data()[1])
        random = torch.cuda.get_rng_state()
        seen = gen.suggest_lr(model, optimizer, criterion, x, y, held_out=held_out)
        criterion(model(x), y).backward()
        losses = gen.loss_per_learning_rate(model, criterion, optimizer, x, y, [0.0, 1e-2])
        assert torch.equal(random, torch.cuda.get_rng_state())
        found.append([seen.rate, seen.slope, seen.curvature, *losses])
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_training_equals_the_cpu_reference() -> None:
    model = new_model().cuda()
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), lr=1e-3)
    scheduler = gen.GenScheduler(optimizer, model, criterion, curvature="exact")
    rates = []
    for x, y in data():
        x, y = on_gpu(x, y)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        scheduler.step(x, y)
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
    plain = new_model()
    run = reference.train(plain, criterion, torch.optim.AdamW(plain.parameters(), lr=1e-3), data())
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(run.rates), rtol=1e-8, atol=0)


@pytest.mark.parametrize("kind", ["replica", "ddp", "fsdp2"])
def test_nccl(kind: str, tmp_path: Path) -> None:
    """On one rank, since one GPU is enough for it, and in a process of its own, which keeps the state of NCCL apart."""
    command = [*torchrun(1), __file__, kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr[-3000:]
    for line, (curvature, probes) in zip(done.stdout.splitlines(), ESTIMATORS, strict=True):
        seen = [float(word) for word in line.split()]
        assert seen == pytest.approx(oracle(curvature, probes), rel=1e-9)


def updates_under_nccl(kind: str) -> None:
    torch.cuda.set_device(0)
    dist.init_process_group("nccl")
    for curvature, probes in ESTIMATORS:
        inner = new_model().cuda()
        seen = first_update(parallel(inner, kind), curvature, probes)
        print(repr(seen.numerator), repr(seen.denominator))
    dist.destroy_process_group()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_bfloat16_autocast(estimator: tuple[str, int]) -> None:
    """The rate is that of float32 within 20 %, or the update is declined."""
    curvature, probes = estimator
    single = new_model().float().cuda()
    half = copy.deepcopy(single)
    true = first_update(single, curvature, probes)
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, half.parameters(), lr=1e-2)
    scheduler = gen.GenScheduler(optimizer, half, criterion, curvature=curvature, probes=probes)
    x, y = on_gpu(*data()[0])
    criterion(half(x), y).backward()
    with torch.autocast("cuda", torch.bfloat16):
        scheduler.step(x, y)
    assert scheduler.last is not None
    assert not scheduler.last.accepted or scheduler.last.lr == pytest.approx(true.lr, rel=0.2)
    if curvature == "exact":
        assert scheduler.last.accepted


def test_float16_with_a_scaler_skips_the_overflow() -> None:
    model = new_model().float().cuda()
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), lr=1e-3)
    scheduler = gen.ExactGen(optimizer, model, criterion)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    weights, reasons = [], []
    for number, (x, y) in enumerate(data()[:4]):
        x, y = on_gpu(x, y)
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = criterion(model(x), y)
        scaler.scale(loss * (1e38 if number == 1 else 1)).backward()
        scaler.unscale_(optimizer)
        with torch.autocast("cuda", torch.float16):
            scheduler.step(x, y)
        scaler.step(optimizer)
        scaler.update()
        assert scheduler.last is not None
        reasons.append(scheduler.last.reason)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert reasons[1] == "not finite"
    assert torch.equal(weights[1], weights[0])
    assert not torch.equal(weights[2], weights[1])
    assert "not finite" not in (reasons[0], reasons[2], reasons[3])


@pytest.mark.parametrize("curvature", ["exact", "forward"])
def test_random_state_of_the_gpu_is_put_back(curvature: str) -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 3)).cuda()
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=1e-2)
    scheduler = gen.GenScheduler(optimizer, model, nn.functional.cross_entropy, curvature=curvature)
    x, y = torch.randn(8, 4, device="cuda"), torch.randint(0, 3, (8,), device="cuda")
    nn.functional.cross_entropy(model(x), y).backward()
    before = torch.cuda.get_rng_state()
    scheduler.step(x, y)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def synchronisations(work: Callable[[], None]) -> int:
    """How often the host waits for the GPU during this work."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


@pytest.mark.parametrize("curvature", ["exact", "gauss-newton", "forward"])
def test_the_host_seldom_waits(curvature: str) -> None:
    model = new_model().cuda()
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), lr=1e-3, fused=True)
    scheduler = gen.GenScheduler(optimizer, model, criterion, curvature=curvature, update_every=2)
    counts = []
    for x, y in data()[:4]:
        x, y = on_gpu(x, y)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        counts.append(synchronisations(lambda x=x, y=y: scheduler.step(x, y)))  # type: ignore[misc]
        optimizer.step()
    assert counts[1] <= 1, counts  # whether the gradients are finite
    assert counts[3] <= 1, counts
    assert counts[2] <= 4, counts


def test_exact_keeps_no_graph() -> None:
    """The memory of an update does not grow with depth, except for the direction."""

    def peak(depth: int) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(depth))).cuda()
        optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=1e-3)
        scheduler = gen.ExactGen(optimizer, model, nn.functional.mse_loss)
        x = torch.randn(65536, 64, device="cuda")
        nn.functional.mse_loss(model(x[:8]), x[:8]).backward()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        scheduler.step(x, x)
        return torch.cuda.max_memory_allocated() - before

    assert peak(16) < 1.2 * peak(4)


if __name__ == "__main__":
    updates_under_nccl(sys.argv[1])
