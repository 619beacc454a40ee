"""`suggest_lr`, one call before training: its numbers are those of the true line, on ranks too. It changes nothing."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import torch.distributed as dist
import torch.nn.functional as F
from effects import assert_unchanged, local_snapshot, snapshot
from problems import OfDict, criterion, data, new_model, noisy_regression, parallel, perceptron, slice_here
from programs import ENVIRONMENT, torchrun
from rank_pool import Pool
from torch import Tensor, nn

import gen_dist as gen
from gen_dist.suggest import Suggestion
from gen_dist.suggest import __main__ as suggest

pytestmark = pytest.mark.usefixtures("float64")


def small() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    return perceptron(4, 6, 2), torch.randn(8, 4), torch.randn(8, 2)


def direction(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> list[Tensor]:
    twin_model, twin = copy.deepcopy((model, optimizer))
    F.mse_loss(twin_model(x), y).backward()
    return reference.direction(twin_model, twin)


def true_loss(model: nn.Module, d: list[Tensor], rate: float, x: Tensor, y: Tensor) -> float:
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for p, v in zip(moved.parameters(), d, strict=True):
            p.sub_(rate * v)
        return F.mse_loss(moved(x), y).item()


def curve(seen: Suggestion, a: float) -> float:
    return seen.loss + seen.slope * a + seen.curvature * a**2 / 2


def test_a_loss_that_is_a_parabola_is_known_exactly() -> None:
    model = nn.Linear(4, 2)
    x, y = torch.randn(8, 4), torch.randn(8, 2)
    optimizer = torch.optim.SGD(model.parameters())
    d = direction(model, optimizer, x, y)
    loss, slope, curvature = reference.derivatives(lambda: F.mse_loss(model(x), y), [*model.parameters()], d)
    seen = gen.suggest_lr(model, optimizer, F.mse_loss, x, y)
    assert seen.reason == "accepted"
    assert [seen.loss, seen.slope, seen.curvature] == pytest.approx([loss, -slope, curvature], rel=1e-9)
    assert seen.rate == seen.minimum == pytest.approx(slope / curvature, rel=1e-9)
    assert [seen.confidence, seen.misfit_at_half, seen.misfit_at_twice] == pytest.approx([1, 0, 0], abs=1e-9)
    size = math.sqrt(sum(v.square().sum().item() for v in d) / sum(p.square().sum().item() for p in model.parameters()))
    assert seen.relative_step == pytest.approx(slope / curvature * size)


@pytest.mark.parametrize("held_out", [False, True], ids=["own batch", "held out"])
@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_numbers_are_those_of_the_true_line(optimizer_class: Any, held_out: bool) -> None:
    model, x, y = small()
    other = torch.randn(8, 4), torch.randn(8, 2)
    optimizer = optimizer_class(model.parameters(), lr=1e-3)
    d = direction(model, optimizer, x, y)
    seen = gen.suggest_lr(model, optimizer, F.mse_loss, x, y, held_out=other if held_out else None)

    on_own = reference.derivatives(lambda: F.mse_loss(model(x), y), [*model.parameters()], d)
    x, y = other if held_out else (x, y)
    loss, slope, curvature = reference.derivatives(lambda: F.mse_loss(model(x), y), [*model.parameters()], d)
    assert [seen.loss, seen.slope, seen.curvature] == pytest.approx([loss, -slope, curvature], rel=1e-7)
    assert seen.signal == (pytest.approx(slope / on_own[1], rel=1e-7) if held_out else None)
    for a, value in [*zip(*seen.scan, strict=True), *zip(*seen.line, strict=True)]:
        assert value == pytest.approx(true_loss(model, d, a, x, y), rel=1e-9)
    best = min((value, a) for a, value in zip(*seen.scan, strict=True))
    assert seen.lowest == (best[1] if best[0] < loss else None)
    if seen.minimum is not None:
        fall = loss - curve(seen, seen.minimum)
        for factor, misfit in [(0.5, seen.misfit_at_half), (2.0, seen.misfit_at_twice)]:
            a = factor * seen.minimum
            assert misfit == pytest.approx((true_loss(model, d, a, x, y) - curve(seen, a)) / fall, rel=1e-6)


@pytest.mark.parametrize("state", ["plain", "stepped", "direction held"])
def test_nothing_is_changed(state: str) -> None:
    model, x, y = noisy_regression()
    model.requires_grad_()
    frozen = next(model.parameters()).requires_grad_(False)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.3))
    if state == "direction held":
        optimizer = gen.as_gen_optimizer(optimizer)
    if state != "plain":
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    if isinstance(optimizer, gen.GenOptimizer):
        optimizer.compute_param_updates()
    gradients = [p.grad for p in model.parameters()]
    before, hooks = snapshot(model, optimizer), len(model._forward_pre_hooks)
    with torch.no_grad():  # which the gradients are made in spite of
        assert gen.suggest_lr(model, optimizer, F.mse_loss, x, y, held_out=[(x, y), (x, y)]).rate is not None
    assert_unchanged(before, snapshot(model, optimizer))
    assert all(g is p.grad for g, p in zip(gradients, model.parameters(), strict=True))
    assert (len(model._forward_pre_hooks), frozen.requires_grad, model.training) == (hooks, False, True)


FORMS = ["closure", "dict", "batches"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_batch(form: str) -> None:
    inner, x, y = small()
    optimizer = torch.optim.AdamW(inner.parameters())
    expected = gen.suggest_lr(inner, optimizer, F.mse_loss, x, y, held_out=(x / 2, y))
    model = OfDict(inner)
    calls: dict[str, dict[str, Any]] = {
        "closure": {"closure": lambda: F.mse_loss(inner(x), y), "held_out": lambda: F.mse_loss(inner(x / 2), y)},
        "dict": {"criterion": F.mse_loss, "x": {"input": x}, "y": y, "held_out": ({"input": x / 2}, y)},
        "batches": {
            "criterion": F.mse_loss,
            "batches": [({"input": x[:4]}, y[:4]), lambda: F.mse_loss(inner(x[4:]), y[4:])],
            "held_out": [({"input": x[:4] / 2}, y[:4]), ({"input": x[4:] / 2}, y[4:])],
        },
    }
    seen = gen.suggest_lr(model, optimizer, **calls[form])
    assert (seen.rate, seen.confidence) == pytest.approx((expected.rate, expected.confidence), rel=1e-9)


def along(function: Callable[[Tensor], Tensor], **options: Any) -> Suggestion:
    """The suggestion for a loss of one weight, which is 1, and plain gradient descent."""
    weight = nn.Parameter(torch.tensor([1.0]))
    model = nn.Module()
    model.weight = weight
    return gen.suggest_lr(model, torch.optim.SGD([weight]), closure=lambda: function(weight).sum(), **options)


@pytest.mark.parametrize("lr_max", [math.inf, 0.3])
def test_where_the_curvature_is_negative_the_true_line_decides(lr_max: float) -> None:
    seen = along(lambda w: -torch.cos(w - 3.0), lr_max=lr_max)  # slope sin(-2), curvature cos(-2) < 0
    assert (seen.confidence, seen.minimum, seen.misfit_at_half) == (None, None, None)
    assert seen.rate == seen.lowest
    assert seen.reason.startswith("curvature not positive; the ")
    if lr_max == 0.3:
        assert seen.rate == 0.3
        assert seen.reason.endswith("the loss still falls at this rate")
    else:  # at most as far as the weight is large: d = sin(-2), and 1 - a d = 3 would be beyond
        assert seen.rate == pytest.approx(1 / math.sin(2))


def test_where_the_parabola_does_not_fit_the_true_line_decides() -> None:
    seen = along(lambda w: w.pow(8))  # its parabola stops at 1/7 of the weight, the true minimum is at all of it
    assert seen.minimum == pytest.approx(8 / 56 / 8)
    assert seen.confidence is not None
    assert seen.confidence < 0.5
    assert seen.rate == pytest.approx(1 / 8, rel=0.4)
    assert seen.reason == "the parabola does not fit; the loss still falls at this rate"


def test_a_clamp() -> None:
    seen = along(lambda w: (w - 3.0).square(), lr_max=0.25)
    assert (seen.rate, seen.minimum, seen.confidence) == pytest.approx((0.25, 0.5, 1.0))
    assert seen.reason == "clamped"
    seen = along(lambda w: (w - 3.0).square(), lr_min=2.0)
    assert (seen.rate, seen.confidence) == (None, 0.0)
    assert seen.reason == "the loss does not fall along the direction"


def test_no_rate_where_held_out_data_say_otherwise() -> None:
    weight = nn.Parameter(torch.tensor([1.0]))
    model = nn.Module()
    model.weight = weight
    optimizer = torch.optim.SGD([weight])
    seen = gen.suggest_lr(
        model, optimizer, closure=lambda: (weight - 3).square().sum(), held_out=lambda: (weight + 3).square().sum()
    )
    assert seen.rate is None
    assert seen.reason.startswith("the direction does not descend on the held-out data")
    assert seen.signal == pytest.approx(-2.0)


def test_no_rate_for_a_loss_that_is_not_finite() -> None:
    seen = along(lambda w: w * math.nan)
    assert (seen.rate, seen.reason, seen.scan.rates) == (None, "not finite", ())
    assert json.loads(json.dumps(seen.as_dict(), allow_nan=False))["loss"] is None


@pytest.mark.parametrize("options", [{}, {"dampening": 0.5}, {"nesterov": True}])
def test_steps_of_sgd_with_momentum_add_up(options: dict[str, Any]) -> None:
    model = nn.Linear(4, 2)
    x, y = torch.randn(8, 4), torch.randn(8, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, **options)
    F.mse_loss(model(x), y).backward()
    twin, late = copy.deepcopy((model, optimizer))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.grad = p.grad
    for _ in range(300):
        late.step()
    d = reference.direction(twin, late)
    _, slope, curvature = reference.derivatives(lambda: F.mse_loss(model(x), y), [*model.parameters()], d)
    seen = gen.suggest_lr(model, optimizer, F.mse_loss, x, y)
    assert seen.rate == pytest.approx(slope / curvature, rel=1e-9)


def test_forward_passes_alone() -> None:
    model, x, y = small()
    optimizer = torch.optim.AdamW(model.parameters())
    exact = gen.suggest_lr(model, optimizer, F.mse_loss, x, y)
    forward = gen.suggest_lr(model, optimizer, F.mse_loss, x, y, curvature="forward")
    assert forward.rate == pytest.approx(exact.rate, rel=0.5)
    assert forward.slope == pytest.approx(exact.slope, rel=0.5)


MISTAKES: dict[str, tuple[Callable[[nn.Module, torch.optim.Optimizer], Any], type[Exception], str]] = {
    "no batch": (lambda m, o: gen.suggest_lr(m, o), ValueError, "type one of suggest_lr"),
    "no target": (lambda m, o: gen.suggest_lr(m, o, F.mse_loss, torch.ones(1, 4)), ValueError, "without a target"),
    "criterion second": (lambda m, _: gen.suggest_lr(m, F.mse_loss), TypeError, "takes a torch.optim.Optimizer second"),
    "clamp": (lambda m, o: gen.suggest_lr(m, o, lr_min=2.0, lr_max=1.0), ValueError, "lr_min <= lr_max"),
    "curvature": (lambda m, o: gen.suggest_lr(m, o, curvature="no"), ValueError, "'exact' or 'forward'"),
    "no gradient": (
        lambda m, o: gen.suggest_lr(nn.Linear(4, 2), o, F.mse_loss, torch.ones(1, 4), torch.ones(1, 2)),
        ValueError,
        "no parameter of the optimizer has a gradient",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_told(case: str) -> None:
    call, kind, told = MISTAKES[case]
    model, _, _ = small()
    with pytest.raises(kind, match=told):
        call(model, torch.optim.SGD(model.parameters()))


def test_it_says_what_it_found() -> None:
    seen = along(lambda w: (w - 3.0).square())
    assert repr(seen) == "Suggestion(rate=0.5, confidence=1, reason='accepted')"
    assert str(seen).splitlines()[0].split() == ["learning", "rate", "0.5"]
    assert len(seen.figure().axes) == 2
    assert len(along(lambda w: -torch.cos(w - 3.0), lr_max=0.3).figure().axes) == 2
    with pytest.raises(ValueError, match="nothing to draw"):
        along(lambda w: w * math.nan).figure()


# ------------------------------------------------------------------------------------------------------ ranks


def on_ranks(kind: str, slices: str) -> tuple[bool, Suggestion]:
    (x, y), held_out = data()[0], data()[1]
    here = slice_here(slices)
    model = parallel(new_model(), kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    if kind in ("replica", "ddp bucket views"):  # gradients are there already, in DDP's own buckets
        criterion(model(x[:1]), y[:1]).backward()
    before = local_snapshot(model, optimizer)
    seen = gen.suggest_lr(
        model,
        optimizer,
        criterion,
        x[here],
        y[here],
        held_out=(held_out[0][here], held_out[1][here]),
        weight=len(x[here]),
        process_group=dist.group.WORLD if slices == "unequal" else None,
    )
    unchanged = all(torch.equal(b, a) for b, a in zip(before, local_snapshot(model, optimizer), strict=True))
    return unchanged, seen


@pytest.mark.parametrize("slices", ["equal", "unequal"])
@pytest.mark.parametrize("kind", ["replica", "ddp", "ddp bucket views", "fsdp2", "fsdp1"])
def test_two_ranks_say_what_one_process_does(pool: Callable[[int], Pool], kind: str, slices: str) -> None:
    torch.set_default_dtype(torch.float32)  # as on the ranks
    model = new_model()
    (x, y), held_out = data()[0], data()[1]
    expected = gen.suggest_lr(model, torch.optim.AdamW(model.parameters(), lr=0.1), criterion, x, y, held_out=held_out)
    found = pool(2).run(on_ranks, kind, slices)
    for unchanged, seen in found:
        assert unchanged
        assert seen == found[0][1]
        assert seen.reason == expected.reason
        for name in ("rate", "loss", "slope", "curvature", "lowest", "relative_step", "signal"):
            assert getattr(seen, name) == pytest.approx(getattr(expected, name), rel=1e-6), name


def fails_on_one_rank() -> tuple[str, bool]:
    model, x, y = small()
    optimizer = torch.optim.SGD(model.parameters())

    def closure() -> Tensor:
        if dist.get_rank() == 1:
            raise OSError("disk full")
        return F.mse_loss(model(x.float()), y.float())

    try:
        gen.suggest_lr(model, optimizer, closure=closure)
    except Exception as error:
        return f"{type(error).__name__}: {error}", all(p.grad is None for p in model.parameters())
    return "", False


def test_an_error_on_one_rank_is_raised_on_all(pool: Callable[[int], Pool]) -> None:
    assert pool(2).run(fails_on_one_rank) == [
        ("RuntimeError: the loss could not be evaluated on rank 1 (OSError: disk full)", True),
        ("OSError: disk full", True),
    ]


# ---------------------------------------------------------------------------------------------------- command

FACTORIES = """
import torch
from torch import nn

def parts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    return model, torch.optim.AdamW(model.parameters()), nn.functional.mse_loss, torch.randn(8, 4), torch.randn(8, 2)

def named():
    model, optimizer, criterion, x, y = parts()
    if torch.distributed.is_initialized():
        ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        x, y = x[rank::ranks], y[rank::ranks]
        model = nn.parallel.DistributedDataParallel(model)
    return {"model": model, "optimizer": optimizer, "closure": lambda: criterion(model(x), y)}

def wrong():
    return 3
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.set_default_dtype(torch.float32)
    (tmp_path / "factories.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "factories", raising=False)
    return tmp_path


def test_the_command_prints_and_draws(factories: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suggest.main(["factories:parts", "--plot", str(factories / "rate.png")])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("learning rate")
    assert printed[-1].endswith("rate.png")
    assert (factories / "rate.png").stat().st_size > 10_000
    suggest.main(["factories:named", "--json", "--lr-max", "1e-4"])
    found = json.loads(capsys.readouterr().out)
    assert (found["rate"], found["lr_max"]) == (1e-4, 1e-4)


def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_default_dtype(torch.float32)
    suggest.main(["factory:digits", "--json"])
    assert 1e-3 < json.loads(capsys.readouterr().out)["rate"] < 3e-2


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("factories:nowhere", "no attribute 'nowhere'"),
        ("nowhere:parts", "No module named 'nowhere'"),
        ("factories", "must be package.module:function"),
        ("factories:torch", "is not a function"),
        ("factories:wrong", "returned int: return a dict"),
    ],
)
def test_a_wrong_factory_is_told(factories: Path, name: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        suggest.main([name])
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


def test_under_torchrun_rank_0_prints_what_one_process_says(
    factories: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suggest.main(["factories:named", "--json"])
    alone = json.loads(capsys.readouterr().out)
    done = subprocess.run(
        [*torchrun(2), "-m", "gen_dist.suggest", "factories:named", "--json"],
        cwd=factories,
        env=ENVIRONMENT | {"PYTHONPATH": str(Path(gen.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rate"] == pytest.approx(alone["rate"], rel=1e-4)
    assert "RuntimeWarning" not in done.stderr
