"""Training loops in use: accumulation, clipping, several losses, warm-up, checkpointing and compilation."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from problems import KINDS, criterion, data, new_model, parallel, perceptron, slice_here, whole
from rank_pool import Pool
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from training import assert_same, expected, record

import gen_dist as gen

# ------------------------------------------------------------------------------------------- accumulation


def accumulate(kind: str, curvature: str, as_closures: bool) -> reference.Run:
    """Train with four micro-batches for each step on this rank, synchronised at the last one."""
    here = slice_here()
    inner = new_model()
    model = parallel(inner, kind)
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), lr=1e-3, weight_decay=0.1)
    scheduler = gen.GenScheduler(optimizer, model, criterion, curvature=curvature)
    run = reference.Run()
    for x, y in data():
        micro = list(zip(x[here].chunk(4), y[here].chunk(4), strict=True))
        optimizer.zero_grad()
        for i, (mx, my) in enumerate(micro):
            last = i == len(micro) - 1
            with model.no_sync() if kind == "ddp" and not last else contextlib.nullcontext():  # type: ignore[operator]
                if kind == "fsdp2":
                    model.set_requires_gradient_sync(last)  # type: ignore[operator]
                (criterion(model(mx), my) / len(micro)).backward()
        batches: list[Any] = list(micro)
        if as_closures:
            batches = [lambda mx=mx, my=my: criterion(model(mx), my) for mx, my in micro]
        scheduler.step(batches=batches)
        optimizer.step()
        record(run, scheduler)
    run.parameters = {name: whole(p) for name, p in inner.named_parameters()}
    return run


@pytest.mark.parametrize("as_closures", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_give_the_rate_of_the_whole_batch(
    pool: Callable[[int], Pool], kind: str, as_closures: bool
) -> None:
    for run in pool(2).run(accumulate, kind, "exact", as_closures):
        assert_same(run, expected("adamw"), 1e-10)


# ------------------------------------------------------------------------------------- one process is enough


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return perceptron(4, 8, 3).double(), torch.randn(16, 4).double(), torch.randint(0, 3, (16,))


def assert_reference(scheduler: gen.GenScheduler, loss: Callable[[], Tensor], d: list[Tensor]) -> None:
    weights = [p for p in scheduler.model.parameters() if p.requires_grad]
    assert scheduler.last is not None
    seen = scheduler.last.loss, scheduler.last.numerator, scheduler.last.denominator
    assert seen == pytest.approx(reference.derivatives(loss, weights, d), rel=1e-9)


def test_clipped_gradients() -> None:
    """The direction is that of the clipped gradient, and slope and curvature are those of the loss along it."""
    model, x, y = problem()
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=0.1)
    scheduler = gen.ExactGen(optimizer, model, F.cross_entropy, lr_max=1e9)
    F.cross_entropy(model(x), y).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    d = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    scheduler.step(x, y)
    assert_reference(scheduler, lambda: F.cross_entropy(model(x), y), d)


def clipped_shards(kind: str) -> tuple[float, ...]:
    inner = new_model()
    model = parallel(inner, kind)
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=0.1)
    scheduler = gen.ExactGen(optimizer, model, criterion, lr_max=1e9)
    x, y = data()[0]
    here = slice_here()
    criterion(model(x[here]), y[here]).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
    scheduler.step(x[here], y[here])
    assert scheduler.last is not None
    return scheduler.last[:4]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_clipped_gradients_on_ranks(pool: Callable[[int], Pool], kind: str) -> None:
    model = new_model()
    x, y = data()[0]
    criterion(model(x), y).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
    d = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    loss, slope, curvature = reference.derivatives(lambda: criterion(model(x), y), [*model.parameters()], d)
    for seen in pool(2).run(clipped_shards, kind):
        assert seen == pytest.approx((slope / curvature, slope, curvature, loss), rel=1e-9)


@pytest.mark.parametrize("curvature", ["exact", "forward"])
def test_several_losses_in_one_closure(curvature: str) -> None:
    model, x, y = problem()
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), lr=1e-4)
    scheduler = gen.GenScheduler(optimizer, model, curvature=curvature, lr_max=10)

    def loss() -> Tensor:
        batch = {"inputs": x, "labels": y}
        logits = model(batch["inputs"])
        return F.cross_entropy(logits, batch["labels"]) + 0.1 * logits.square().mean() + 1e-3 * model[0].weight.norm()

    loss().backward()
    d = reference.direction(model, torch.optim.AdamW(model.parameters(), lr=1.0))
    scheduler.step(closure=loss)
    assert scheduler.last is not None
    expected = reference.derivatives(loss, [*model.parameters()], d)
    seen = scheduler.last.loss, scheduler.last.numerator, scheduler.last.denominator
    assert seen == pytest.approx(expected, rel=1e-9 if curvature == "exact" else 1e-3)


@pytest.mark.parametrize("curvature", ["exact", "gauss-newton", "forward"])
def test_warm_up_from_zero(curvature: str) -> None:
    model, x, y = problem()
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), lr=0.0)
    scheduler = gen.GenScheduler(optimizer, model, F.cross_entropy, curvature=curvature)
    F.cross_entropy(model(x), y).backward()
    assert scheduler.get_last_lr() == [0.0]
    scheduler.step(x, y)
    assert scheduler.last is not None
    assert scheduler.last.accepted
    assert scheduler.get_last_lr()[0] > 0


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    model, x, y = problem()
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters())
    scheduler = gen.ExactGen(optimizer, model, F.cross_entropy)
    twin = copy.deepcopy(model)
    run = reference.train(twin, F.cross_entropy, torch.optim.AdamW(twin.parameters()), [(x, y)] * 3)
    rates = []
    for _ in range(3):
        optimizer.zero_grad(set_to_none=set_to_none)
        F.cross_entropy(model(x), y).backward()
        scheduler.step(x, y)
        optimizer.step()
        rates += scheduler.get_last_lr()
    assert rates == pytest.approx(run.rates, rel=1e-9)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("curvature", ["exact", "gauss-newton", "forward"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_activation_checkpointing(curvature: str, reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner[0](x)
            return checkpoint(lambda x: self.inner[2](self.inner[1](x)), x, use_reentrant=reentrant)

    plain, x, y = problem()
    lasts = []
    for model in (Checkpointed(copy.deepcopy(plain)), plain):
        optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters())
        scheduler = gen.GenScheduler(optimizer, model, F.cross_entropy, curvature=curvature)
        F.cross_entropy(model(x), y).backward()
        scheduler.step(x, y)
        assert scheduler.last is not None
        lasts.append(scheduler.last[:4])
    assert lasts[0] == pytest.approx(lasts[1], rel=1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("in_place", [True, False], ids=["model.compile()", "torch.compile(model)"])
@pytest.mark.parametrize("curvature", ["exact", "gauss-newton", "forward"])
def test_compiled_models(curvature: str, in_place: bool) -> None:
    """A compiled model gives the numbers of the plain one, and no probe compiles it again."""
    torch.compiler.reset()
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(1)
        return graph.forward

    plain, x, y = problem()
    inner = copy.deepcopy(plain)
    if in_place:
        inner.compile(backend=backend)
        model: nn.Module = inner
    else:
        model = torch.compile(inner, backend=backend)  # type: ignore[assignment]
    lasts = []
    for each in (model, plain):
        optimizer = gen.make_gen_optimizer(torch.optim.AdamW, each.parameters())
        scheduler = gen.GenScheduler(optimizer, each, F.cross_entropy, curvature=curvature)
        seen = []
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(each(x), y).backward()
            count = len(graphs)
            scheduler.step(x, y)
            if _ > 0:
                assert len(graphs) == count
            optimizer.step()
            assert scheduler.last is not None
            seen += scheduler.last[:4]
        lasts.append(seen)
    assert lasts[0] == pytest.approx(lasts[1], rel=1e-12)
    assert len(graphs) <= 2, "at most two graphs: one with gradients and one without"
