"""The net: the line is held to an ordinary forward and backward pass, and what is not the same function is said."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from effects import assert_unchanged, local_snapshot
from problems import KINDS, criterion, data, new_model, parallel, slice_here
from rank_pool import Pool
from torch import Tensor, nn

import gen_dist as gen

CURVATURES = [("exact", 2), ("gauss-newton", 2), ("forward", 2), ("forward", 1)]
Said = Callable[[], list[str]]


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Said:
    """The warnings so far."""
    caplog.set_level(logging.WARNING, logger="gen_dist")
    return lambda: [record.getMessage() for record in caplog.records]


def regression(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    layers = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)
    return nn.Sequential(*layers).to(dtype), torch.randn(6, 4).to(dtype), torch.randn(6, 3).to(dtype)


def updated(
    closure: Callable[[nn.Module, Tensor, Tensor], Tensor],
    curvature: str = "exact",
    probes: int = 2,
    change: Callable[[list[Tensor]], None] = lambda gradients: None,
    backward: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
    **options: Any,
) -> gen.GenScheduler:
    """Three updates of a regression with this loss, its gradients changed before each."""
    model, x, y = regression()
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=1e-2)
    scheduler = gen.GenScheduler(optimizer, model, curvature=curvature, probes=probes, **options)
    for _ in range(3):
        optimizer.zero_grad()
        (backward or closure)(model, x, y).backward()
        change([p.grad for p in model.parameters() if p.grad is not None])
        scheduler.step(closure=lambda: closure(model, x, y))
        optimizer.step()
    return scheduler


def mse(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(model(x), y)


# ---------------------------------------------------------------------------------------------- no false alarm


def checked(kind: str, curvature: str, probes: int, optimizer_class: Any) -> tuple[list[str], bool]:
    """What is said while a model trains on ranks, and whether a check leaves weights and gradients as they are."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("gen_dist").addHandler(handler)
    here, model = slice_here("unequal"), parallel(new_model(), kind)
    optimizer = gen.make_gen_optimizer(optimizer_class, model.parameters(), lr=1e-3)
    check = gen.SelfCheck(every=1)
    scheduler = gen.GenScheduler(optimizer, model, criterion, curvature=curvature, probes=probes, companions=[check])
    ranks, total, same = scheduler.ranks.size, 16, True
    for x, y in data()[:3]:
        x, y = x[here], y[here]
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        (loss if kind == "replica" else loss * len(x) * ranks / total).backward()
        before = local_snapshot(model, optimizer)
        scheduler.step(x, y, weight=len(x))
        if kind != "replica":  # whose gradients are averaged
            assert_unchanged(before, local_snapshot(model, optimizer))
        optimizer.step()
    logging.getLogger("gen_dist").removeHandler(handler)
    return records, same


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize(("curvature", "probes"), [("exact", 2), ("gauss-newton", 2), ("forward", 2), ("forward", 1)])
@pytest.mark.parametrize(("kind", "ranks"), [("replica", 1), *((kind, 2) for kind in KINDS)])
def test_a_check_at_every_update_says_nothing(
    pool: Callable[[int], Pool], kind: str, ranks: int, curvature: str, probes: int, optimizer: Any
) -> None:
    for records, _ in pool(ranks).run(checked, kind, curvature, probes, optimizer):
        assert records == []


@pytest.mark.parametrize(("curvature", "probes"), CURVATURES)
def test_dropout_and_clipping_are_no_reason(curvature: str, probes: int, said: Said) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 3))
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), lr=1e-3)
    check = [gen.SelfCheck(every=1)]
    scheduler = gen.GenScheduler(
        optimizer, model, F.mse_loss, curvature=curvature, probes=probes, lr_max=1e-3, companions=check
    )
    for _ in range(5):
        x, y = torch.randn(16, 4), torch.randn(16, 3)
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        scheduler.step(x, y)
        optimizer.step()
    assert said() == []


@pytest.mark.parametrize("clip", [nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_], ids=["norm", "value"])
def test_clipped_gradients_are_recognised(clip: Any, said: Said) -> None:
    def change(gradients: list[Tensor]) -> None:
        holders = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
        for holder, gradient in zip(holders, gradients, strict=True):
            holder.grad = gradient
        clip(holders, 1e-3)

    updated(mse, change=change)
    assert said() == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_half_precision_are_no_reason(dtype: torch.dtype, said: Said) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 3)).to(dtype)
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), lr=1e-3)
    scheduler = gen.GenScheduler(optimizer, model, F.mse_loss, companions=[gen.SelfCheck(every=1)], lr_max=1e-3)
    for _ in range(5):
        x, y = torch.randn(16, 32).to(dtype), torch.randn(16, 3).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            scheduler.step(x, y)
        optimizer.step()
    assert said() == []


# ------------------------------------------------------------------------------------------------ caught


def test_a_closure_that_computes_another_loss_at_each_call_is_refused_by_exact() -> None:
    calls: list[int] = []

    def closure(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        return F.mse_loss(model(x), y) * len(calls)

    with pytest.raises(RuntimeError, match=r"does not agree with an ordinary.*another loss at each call.*'forward'"):
        updated(closure)
    assert updated(closure, companions=[gen.SelfCheck(None)]).last is not None, "off by an option"


def self_distillation(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        target = model(x * 1.1)
    return F.mse_loss(model(x), 0.5 * target)


def temporal_difference(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x)[:, 0] - 1 - 0.99 * model(x.flip(0)).detach()[:, 0]).square().mean()


def straight_through(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    output = model(x)
    return F.mse_loss(output + (output.round() - output).detach(), y)


@pytest.mark.parametrize("loss", [self_distillation, temporal_difference, straight_through])
@pytest.mark.parametrize("probes", [1, 2])
def test_probes_that_see_another_function_than_training_are_declined(loss: Any, probes: int, said: Said) -> None:
    scheduler = updated(loss, "forward", probes)
    assert scheduler.last is not None
    assert scheduler.last.reason == "probes see another function than the one trained"
    assert scheduler.get_last_lr() == [1e-2]
    [warning] = [text for text in said() if "another function" in text]
    assert "curvature='exact'" in warning
    assert updated(loss, "exact").last.accepted, "exact follows what autograd does"  # type: ignore[union-attr]


@pytest.mark.parametrize(("curvature", "probes"), [c for c in CURVATURES if c[0] != "gauss-newton"])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda gradients: [g.mul_(1024) for g in gradients], "1024 times.*scaler.unscale_"),
        (lambda gradients: [g.copy_(torch.randn_like(g)) for g in gradients], "not those of the loss"),
    ],
    ids=["still scaled", "of another loss"],
)
def test_gradients_of_another_loss_are_told_of_once(
    change: Any, told: str, curvature: str, probes: int, said: Said
) -> None:
    import re

    updated(mse, curvature, probes, change=change, companions=[gen.SelfCheck(every=1)])
    assert len([text for text in said() if re.search(told, text)]) == 1


def test_a_check_comes_again_when_the_model_changes_its_mode(said: Said) -> None:
    model, x, y = regression()
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=1e-2)
    scheduler = gen.ExactGen(optimizer, model)

    def closure() -> Tensor:
        calls.append(1)
        return F.mse_loss(model(x), y) * (1 if model.training else len(calls))

    calls: list[int] = []
    for training in (True, True, False):
        model.train(training)
        optimizer.zero_grad()
        closure().backward()
        if training:
            scheduler.step(closure=closure)
        else:
            with pytest.raises(RuntimeError, match="does not agree with an ordinary"):
                scheduler.step(closure=closure)
        optimizer.step()
