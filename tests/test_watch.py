"""`Watch`: the numbers are those of the step that the script makes, and training is bitwise what it is without."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import reference
import torch
import torch.distributed as dist
import torch.nn.functional as F
from effects import Collectives, assert_unchanged, snapshot
from memory import peak_memory
from problems import BATCH, noisy_regression, parallel, perceptron, slice_here, whole
from rank_pool import Pool
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, SequentialLR

import gen_dist as gen

STEPS = 6
Numbers = list[tuple[float, ...]]


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    xy = torch.randn(STEPS, 8, 6, generator=generator, dtype=torch.float64)
    return [(each[:, :4], each[:, 4:]) for each in xy]


def small() -> nn.Module:
    torch.manual_seed(3)
    return perceptron(4, 6, 2).double()


def along_the_step(model: nn.Module, before: nn.Module, x: Any, y: Any, lr: float, loss_of: Any) -> tuple[float, ...]:
    """Loss, `g.d` and `d'Hd` before the step that leads to `model`, by double backward."""
    pairs = zip(before.parameters(), model.parameters(), strict=True)
    d = [(p - q).detach() / lr for p, q in pairs]
    return reference.derivatives(lambda: loss_of(before(x), y), [*before.parameters()], d)


# ------------------------------------------------------------------------------------------- one process

OPTIMIZERS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and kind is not torch.optim.Optimizer and issubclass(kind, torch.optim.Optimizer)
}


def made(name: str, model: nn.Module) -> list[torch.optim.Optimizer]:
    """The optimizer of a name; one that takes matrices alone, and another for the rest."""
    kind: Any = OPTIMIZERS[name]
    if name == "Muon":
        matrices = [p for p in model.parameters() if p.ndim == 2]
        rest = [p for p in model.parameters() if p.ndim != 2]
        return [kind(matrices, lr=0.02), torch.optim.AdamW(rest, lr=0.01)]
    return [kind(model.parameters(), lr=0.02)]


def trained(name: str, watched: bool) -> tuple[nn.Module, Numbers, Numbers]:
    """A model after some steps, what was seen of them, and what there was to see."""
    sparse = name == "SparseAdam"
    model: nn.Module = small()
    if sparse:
        model = nn.Embedding(6, 2, sparse=True).double()
        torch.nn.init.constant_(model.weight, 0.5)
    optimizers = made(name, model)
    watch = gen.Watch(optimizers, model, F.mse_loss, every=2)
    seen, true = [], []
    for number, (x, y) in enumerate(batches()):
        x = x[:, 0].abs().mul(2).long().clamp(max=5) if sparse else x
        before = copy.deepcopy(model)
        for optimizer in optimizers:
            optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()

        def step(x: Tensor = x, y: Tensor = y) -> None:
            def closure() -> Tensor:
                optimizers[0].zero_grad()
                loss = F.mse_loss(model(x), y)
                loss.backward()
                return loss

            for optimizer in optimizers:
                optimizer.step(*([closure] if name == "LBFGS" else []))  # type: ignore[arg-type]

        if not watched:
            step()
            continue
        with watch.step(x, y):
            step()
        if number % 2 == 0:
            assert watch.last is not None
            assert watch.last.step == number + 1
            seen.append((watch.last.loss, watch.last.numerator, watch.last.denominator))
            if sparse:
                before.sparse = False
            true.append(along_the_step(model, before, x, y, 0.02, F.mse_loss))
    assert len(watch.history) == len(seen)
    return model, seen, true


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_of_torch(name: str) -> None:
    model, seen, true = trained(name, watched=True)
    twin, _, _ = trained(name, watched=False)
    assert_unchanged(twin.state_dict(), model.state_dict())
    assert len(seen) == STEPS // 2
    for mine, its in zip(seen, true, strict=True):
        assert mine == pytest.approx(its, rel=1e-8, abs=1e-12)


def test_the_minimum_of_a_parabola_is_where_the_loss_is_lowest_and_the_edge_where_it_is_as_before() -> None:
    model = nn.Linear(4, 2).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    watch = gen.Watch(optimizer, model, F.mse_loss, every=1)
    for x, y in batches():
        before = copy.deepcopy(model)
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        with watch.step(x, y):
            optimizer.step()
    last = watch.last
    assert last is not None
    assert last.minimum is not None
    assert last.edge is not None
    assert last.minimum_over_lr is not None

    def loss_at(times: float) -> float:
        moved = copy.deepcopy(before)
        with torch.no_grad():
            for p, q in zip(moved.parameters(), model.parameters(), strict=True):
                p.add_(q - p, alpha=times)
        return F.mse_loss(moved(x), y).item()

    lowest = loss_at(last.minimum_over_lr)
    assert lowest < min(loss_at(0.99 * last.minimum_over_lr), loss_at(1.01 * last.minimum_over_lr))
    assert loss_at(last.edge / last.lr) == pytest.approx(loss_at(0.0), rel=1e-10) == pytest.approx(last.loss)
    assert last.numbers()["minimum_over_lr"] == last.minimum_over_lr


def warm_up_and_cosine(optimizer: torch.optim.Optimizer) -> Any:
    warm_up = LambdaLR(optimizer, lambda step: step / 2)  # begins at 0
    return SequentialLR(optimizer, [warm_up, CosineAnnealingLR(optimizer, 5)], milestones=[2])


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "warm-up and cosine": warm_up_and_cosine,
    "one cycle": lambda optimizer: OneCycleLR(optimizer, max_lr=[0.1, 0.03], total_steps=STEPS + 1),
}


def scheduled(schedule: str, watched: bool) -> tuple[list[Any], list[list[float]], gen.Watch, list[tuple[float, ...]]]:
    """Train two groups at different rates under a schedule; the state at the end, the rates, what was seen and true."""
    torch.manual_seed(0)
    model, x, y = noisy_regression()
    first, *rest = model.parameters()
    optimizer = torch.optim.SGD([{"params": [first], "lr": 0.03}, {"params": rest}], lr=0.1, momentum=0.9)
    scheduler = SCHEDULES[schedule](optimizer)
    watch = gen.Watch(optimizer, model, F.mse_loss, every=1)
    rates, true = [], []
    for _ in range(STEPS):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        if watched:
            before, state = copy.deepcopy(model), torch.get_rng_state()
            with watch.step(x, y):
                optimizer.step()
            if max(rates[-1]):
                true.append(along_the_step(model, before, x, y, max(rates[-1]), F.mse_loss))
                torch.set_rng_state(state)  # dropout: the reference has drawn the numbers that the measurement saw
        else:
            optimizer.step()
        scheduler.step()
    return [snapshot(model, optimizer), torch.get_rng_state()], rates, watch, true


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_schedule_stays_in_charge(schedule: str) -> None:
    state, rates, watch, true = scheduled(schedule, watched=True)
    twin, twin_rates, _, _ = scheduled(schedule, watched=False)
    assert_unchanged(twin, state)
    assert rates == twin_rates
    moving = [(number, max(of_groups)) for number, of_groups in enumerate(rates, 1) if max(of_groups)]
    assert len(moving) == STEPS - (schedule == "warm-up and cosine")
    assert [(seen.step, seen.lr) for seen in watch.history] == moving, "a step at rate 0 is passed over"
    for seen, numbers in zip(watch.history, true, strict=True):
        assert (seen.loss, seen.numerator, seen.denominator) == pytest.approx(numbers, rel=1e-8)


def test_every_so_many_steps_and_nothing_in_between() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, passes = gen.Watch(optimizer, model, F.mse_loss, every=4), []
    for number, (x, y) in enumerate(batches(), 1):
        F.mse_loss(model(x), y).backward()
        hook = model.register_forward_hook(lambda *_, number=number: passes.append(number))
        with watch.step(x, y):
            optimizer.step()
        hook.remove()
    assert [seen.step for seen in watch.history] == [1, 5]
    assert {*passes} == {1, 5}


@pytest.mark.parametrize(("curvature", "copies"), [("exact", 2), ("forward", 3)])
def test_a_look_holds_a_few_copies_of_the_weights_and_a_step_between_none(curvature: str, copies: int) -> None:
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    watch = gen.Watch(optimizer, model, F.mse_loss, every=2, curvature=curvature)
    x, y = torch.randn(2, 256), torch.randn(2, 256)
    F.mse_loss(model(x), y).backward()

    def step() -> None:
        with watch.step(x, y):
            optimizer.step()

    step()  # which also checks the measurement by a backward pass
    size = sum(p.nbytes for p in model.parameters())
    between, look = peak_memory(step), peak_memory(step)
    assert len(watch.history) == 2
    assert between < 0.01 * size
    assert copies * size <= look < (copies + 0.2) * size


def test_a_step_inside_of_a_trainer_is_watched_by_the_optimizer_s_hooks() -> None:
    model, optimizer, x, y = with_gradient()
    twin, its, _, _ = with_gradient()
    seen, watching = gen.Watch(optimizer, model, F.mse_loss), contextlib.ExitStack()
    optimizer.register_step_pre_hook(lambda *_: watching.enter_context(seen.step(x, y)))
    optimizer.register_step_post_hook(lambda *_: watching.close())
    optimizer.step()
    with gen.Watch(its, twin, F.mse_loss).step(x, y):
        its.step()
    assert len(seen.history) == 1
    assert_unchanged(snapshot(twin, its)[:2], snapshot(model, optimizer)[:2])


def test_other_forms_of_a_batch_and_maximize() -> None:
    seen = []
    for form in ("x, y", "closure", "batches", "maximize"):
        model = small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, maximize=form == "maximize")
        x, y = batches()[0]
        F.mse_loss(model(x), y).mul(-1 if form == "maximize" else 1).backward()
        criterion = F.mse_loss if form != "maximize" else lambda output, target: -F.mse_loss(output, target)
        watch = gen.Watch(optimizer, model, criterion)
        arguments: dict[str, Any] = {
            "closure": {"closure": lambda model=model, x=x, y=y: F.mse_loss(model(x), y)},
            "batches": {"batches": [(x[:4], y[:4]), lambda model=model, x=x, y=y: F.mse_loss(model(x[4:]), y[4:])]},
        }.get(form, {"x": x, "y": y})
        with watch.step(**arguments):
            optimizer.step()
        assert watch.last is not None
        seen.append((watch.last.numerator, watch.last.denominator, abs(watch.last.loss)))
        assert (watch.last.loss < 0) == (form == "maximize")
        assert (watch.last.numerator_error is None) == (form != "batches")
    for other in seen[1:]:
        assert other == pytest.approx(seen[0], rel=1e-10)


class Labelled(nn.Module):
    """Returns its own loss, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": F.mse_loss(self.inner(x), labels)}


def of_pair(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return model(*batch)["loss"]  # type: ignore[no-any-return]


FORMS: dict[str, tuple[Callable[[nn.Module, Tensor, Tensor], Any], dict[str, Any]]] = {
    "closure": (lambda model, x, y: lambda: model(x, y)["loss"], {}),
    "dict": (lambda model, x, y: {"x": x, "labels": y}, {}),
    "compute_loss": (lambda model, x, y: (x, y), {"compute_loss": of_pair}),
}


def watched_by(form: str, parts: int, curvature: str) -> tuple[list[gen.Watched], dict[str, Tensor]]:
    """What is seen of steps whose batch, in so many parts, has this form; and the weights in the end."""
    model, (batch_of, loss) = Labelled(), FORMS[form]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    watch = gen.Watch(optimizer, model, every=2, curvature=curvature, **loss)
    for x, y in batches():
        optimizer.zero_grad()
        pieces = [*zip(x.chunk(parts), y.chunk(parts), strict=True)]
        for piece in pieces:
            (model(*piece)["loss"] / parts).backward()
        given = [batch_of(model, *piece) for piece in pieces]
        alone = {"closure": given[0]} if form == "closure" else {"x": given[0]}
        with watch.step(**alone if parts == 1 else {"batches": given}):
            optimizer.step()
    return watch.history, model.state_dict()


@pytest.mark.parametrize("curvature", ["exact", "forward"])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("form", ["dict", "compute_loss"])
def test_a_batch_that_is_a_dict_or_anything_is_seen_as_its_closure(form: str, parts: int, curvature: str) -> None:
    seen, weights = watched_by(form, parts, curvature)
    expected, its = watched_by("closure", parts, curvature)
    assert seen == expected
    assert len(seen) == STEPS // 2
    assert_unchanged(its, weights)


# ------------------------------------------------------------------------------------- how it is measured


class Square(torch.autograd.Function):
    """A custom function by NumPy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy() ** 2)  # where jets cannot follow

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class Squaring(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = small()

    def forward(self, x: Tensor) -> Tensor:
        return Square.apply(self.inner(x))  # type: ignore[no-untyped-call, no-any-return]


def test_an_operator_without_a_rule_is_measured_by_forward_passes(caplog: pytest.LogCaptureFixture) -> None:
    model = Squaring()
    twin = copy.deepcopy(model)
    optimizer, its = (torch.optim.SGD(each.parameters(), lr=1e-3) for each in (model, twin))
    watch = gen.Watch(optimizer, model, F.mse_loss, every=1)
    for x, y in batches():
        for each, stepping in ((model, optimizer), (twin, its)):
            stepping.zero_grad()
            F.mse_loss(each(x), y).backward()
        before = copy.deepcopy(model)
        with watch.step(x, y):
            optimizer.step()
        its.step()
        plain = lambda output, target, x=x, before=before: F.mse_loss(before.inner(x).square(), target)  # noqa: E731
        _, slope, curvature = along_the_step(model, before, x, y, 1e-3, plain)
        assert watch.last is not None
        assert (watch.last.numerator, watch.last.denominator) == pytest.approx((slope, curvature), rel=1e-4)
    assert_unchanged(twin.state_dict(), model.state_dict())
    assert sum("goes on by forward passes" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("share", [1.0, 1e-2, 1e-3])
def test_finite_differences_look_beyond_a_step_that_rounding_hides(share: float) -> None:
    """In float32, a step at a thousandth of the minimum changes the loss by less than its rounding."""
    model = small().float()
    x, y = (part.float() for part in batches()[0])
    seen = {}
    for curvature in ("exact", "forward"):
        twin = copy.deepcopy(model)
        optimizer = torch.optim.SGD(twin.parameters(), lr=share)
        F.mse_loss(twin(x), y).backward()
        watch = gen.Watch(optimizer, twin, F.mse_loss, curvature=curvature)
        with watch.step(x, y):
            optimizer.step()
        assert watch.last is not None
        seen[curvature] = watch.last.minimum
    assert seen["forward"] == pytest.approx(seen["exact"], rel=0.25)


def test_where_there_is_no_minimum_the_reason_is_told() -> None:
    weight = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    model = nn.Module()
    model.weight = weight
    optimizer = torch.optim.SGD([weight], lr=0.1)
    watch = gen.Watch(optimizer, model, every=1)

    def loss() -> Tensor:
        return -torch.cos(weight - 3.0).sum()  # the curvature cos(-2) is negative

    loss().backward()
    with watch.step(closure=loss):
        optimizer.step()
    last = watch.last
    assert last is not None
    assert (last.minimum, last.edge, last.reason) == (None, None, "curvature not positive")
    assert last.denominator == pytest.approx(math.cos(2.0) * math.sin(2.0) ** 2)
    assert "minimum" not in last.numbers()
    assert "no minimum along the step (curvature not positive)" in str(last)


# ------------------------------------------------------------------------------------------ calls and failures


def with_gradient() -> tuple[nn.Module, torch.optim.Optimizer, Tensor, Tensor]:
    model = small()
    x, y = batches()[0]
    F.mse_loss(model(x), y).backward()
    return model, torch.optim.SGD(model.parameters(), lr=0.1), x, y


def test_a_skipped_step_is_passed_over_and_steps_that_never_come_are_told(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer, x, y = with_gradient()
    watch = gen.Watch(optimizer, model, F.mse_loss)
    scaler = torch.amp.GradScaler("cpu")
    model[0].weight.grad[0, 0] = math.inf
    scaler.scale(torch.zeros(1))
    with watch.step(x, y):
        scaler.step(optimizer)
    scaler.update()
    assert watch.last is None
    model[0].weight.grad[0, 0] = 0.0
    with watch.step(x, y):
        scaler.step(optimizer)
    assert [seen.step for seen in watch.history] == [2]
    watch = gen.Watch(optimizer, model, F.mse_loss)
    for _ in range(101):
        with watch.step(x, y):
            pass
    assert [record.message[:36] for record in caplog.records] == ["100 steps in a row moved no weight: "]


def test_a_step_that_is_not_finite_is_told_and_left_as_it_is() -> None:
    model, optimizer, x, y = with_gradient()
    watch = gen.Watch(optimizer, model, F.mse_loss)
    model[0].weight.grad[0, 0] = math.inf
    with watch.step(x, y):
        optimizer.step()
    assert watch.last is not None
    assert (watch.last.minimum, watch.last.reason) == (None, "not finite")
    assert (~model[0].weight.isfinite()).nonzero().tolist() == [[0, 0]]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("curvature", ["exact", "forward"])
def test_after_an_error_in_the_measurement_the_step_is_made(curvature: str, error: type[BaseException]) -> None:
    model, optimizer, x, y = with_gradient()
    twin, its, _, _ = with_gradient()
    its.step()
    watch, calls = gen.Watch(optimizer, model, curvature=curvature), []

    def failing() -> Tensor:
        calls.append(0)
        if len(calls) == (3 if curvature == "forward" else 1):
            raise error("in the closure")
        return F.mse_loss(model(x), y)

    def watched() -> None:
        with watch.step(closure=failing):
            optimizer.step()

    with pytest.raises(error, match="in the closure"):
        watched()
    assert_unchanged(snapshot(twin, its), snapshot(model, optimizer))


def test_an_error_in_the_block_is_the_script_s_own() -> None:
    model, optimizer, x, y = with_gradient()
    watch = gen.Watch(optimizer, model, F.mse_loss)

    def failing() -> None:
        with watch.step(x, y):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    with watch.step(x, y):
        optimizer.step()
    assert [seen.step for seen in watch.history] == [1]


def test_mistakes_are_told() -> None:
    model, optimizer, x, y = with_gradient()
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer"):
        gen.Watch(model, model, F.mse_loss)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        gen.Watch(optimizer, F.mse_loss)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every must be a whole number of steps"):
        gen.Watch(optimizer, model, F.mse_loss, every=0)
    with pytest.raises(ValueError, match="curvature must be one of"):
        gen.Watch(optimizer, model, F.mse_loss, curvature="newton")
    with pytest.raises(ValueError, match="criterion and compute_loss both say what the loss is"):
        gen.Watch(optimizer, model, F.mse_loss, compute_loss=of_pair)
    with pytest.raises(TypeError, match=r"callable as criterion\(model\(x\), y\), got 3"):
        gen.Watch(optimizer, model, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="pass MSELoss as criterion="):
        gen.Watch(optimizer, model, compute_loss=nn.MSELoss())
    watch = gen.Watch(optimizer, model)
    with pytest.raises(ValueError, match=r"watch\.step got no batch; type one of watch\.step\(x, y\)"):
        watch.step()
    with pytest.raises(ValueError, match="needs the criterion"):
        watch.step(x, y)
    with pytest.raises(ValueError, match=r"type watch\.step\(x, y\)"):
        watch.step(x)
    with pytest.raises(TypeError, match="pass compute_loss=lambda model, batch"):
        watch.step([x, y, x])
    with pytest.raises(ValueError, match=r"leave it out, or type watch\.step\(x, y\)"):
        gen.Watch(optimizer, model, F.mse_loss).step({"x": x, "labels": y})
    watch.step(closure=lambda: F.mse_loss(model(x), y))
    with pytest.raises(ValueError, match=r"had no block: type with watch\.step"):
        watch.step(closure=lambda: F.mse_loss(model(x), y))
    with pytest.raises(ValueError, match="needs model and criterion apart"):
        gen.Watch(optimizer, model, curvature="gauss-newton").step(closure=lambda: F.mse_loss(model(x), y))


# -------------------------------------------------------------------------------------------------- on ranks


class Feed(nn.Module):
    """A feed-forward network beside a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.expand = nn.Linear(6, 12)
        self.contract = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.contract(F.gelu(self.expand(self.norm(x))))


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 6)
        self.blocks = nn.ModuleList([Feed(), Feed()])
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def classification() -> tuple[Classifier, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(1)
    x, y = torch.randn(STEPS, BATCH, 5, dtype=torch.float64), torch.randint(0, 3, (STEPS, BATCH))
    return Classifier().double(), [*zip(x, y, strict=True)]


def tensor_parallel(model: Any, mesh: Any) -> nn.Module:
    for block in model.blocks:
        parallelize_module(block, mesh, {"expand": ColwiseParallel(), "contract": RowwiseParallel()})
    return model


def sharded(model: Any, mesh: Any) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def spread(model: nn.Module, kind: str) -> tuple[nn.Module, slice]:
    """The model as this kind of parallelism has it, and this rank's part of a batch."""
    ranks = dist.get_world_size()
    if kind == "tp":
        return tensor_parallel(model, init_device_mesh("cpu", (ranks,))), slice(None)
    if kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard"))
        return sharded(model, mesh), slice_here()
    if kind == "fsdp2 x tp":
        mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("data", "tensor"))
        part = BATCH // mesh["data"].size()
        here = slice(mesh["data"].get_local_rank() * part, (mesh["data"].get_local_rank() + 1) * part)
        return sharded(tensor_parallel(model, mesh["tensor"]), mesh["data"]), here
    kind_of_model = "ddp" if kind in ("zero", "ddp unequal") else kind
    return parallel(model, kind_of_model), slice_here("unequal" if kind == "ddp unequal" else "equal")


def run(kind: str, watched: bool, curvature: str) -> tuple[Numbers, dict[str, Tensor], int]:
    """Train with warm-up; what was seen, the weights, and the collectives of steps between two looks."""
    inner, batches = classification()
    model, here = spread(inner, kind)
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
    if kind == "zero":
        optimizer: Any = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, **options)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), **options)
    schedule = LambdaLR(optimizer, lambda step: min(1.0, step / 2))
    watch = gen.Watch(optimizer, model, F.cross_entropy, every=2, curvature=curvature)
    between = 0
    for number, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        weight = len(x[here])
        loss = F.cross_entropy(model(x[here]), y[here])
        (loss * weight * 2 / BATCH if kind == "ddp unequal" else loss).backward()
        if kind == "replica":  # which the script averages itself
            for p in model.parameters():
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()  # type: ignore[operator]
        if watched and (number == 0 or number % 2):
            with watch.step(x[here], y[here], weight=weight):
                optimizer.step()
        elif watched:
            with watch.step(x[here], y[here], weight=weight), Collectives() as collectives:
                optimizer.step()
            between += 0 if kind == "zero" else len(collectives.seen)
        else:
            optimizer.step()
        schedule.step()
    seen = [each[:7] for each in watch.history]
    return seen, {name: whole(p) for name, p in inner.named_parameters()}, between


@functools.cache
def expected(curvature: str) -> Numbers:
    model, batches = classification()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    true = []
    for number, (x, y) in enumerate(batches):
        rate = optimizer.param_groups[0]["lr"] = 0.01 * min(1.0, number / 2)
        before = copy.deepcopy(model)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if number % 2:
            loss = F.cross_entropy(before(x), y).item()
            d = [(p - q).detach() / rate for p, q in zip(before.parameters(), model.parameters(), strict=True)]
            how = "forward" if curvature == "forward" else "exact"
            slope, bend = reference.estimate(before, F.cross_entropy, x, y, d, how, rate, 2)
            minimum = slope / bend if slope > 0 and bend > 0 else math.nan
            true.append((number + 1, rate, minimum, 2 * minimum, slope, bend, loss))
    return true


TWO, FOUR = ("replica", "ddp", "ddp unequal", "zero", "fsdp1", "fsdp1 flat", "fsdp2", "tp"), ("hsdp", "fsdp2 x tp")
KINDS = dict.fromkeys(TWO, 2) | dict.fromkeys(FOUR, 4)


@pytest.mark.parametrize("curvature", ["auto", "forward"])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_see_what_one_process_sees_and_train_as_without(
    pool: Callable[[int], Pool], kind: str, curvature: str
) -> None:
    results = pool(KINDS[kind]).run(run, kind, True, curvature)
    twins = pool(KINDS[kind]).run(run, kind, False, curvature)
    true = expected(curvature)
    assert len(true) == STEPS // 2
    for (seen, weights, between), (_, twin, _) in zip(results, twins, strict=True):
        assert seen == results[0][0], "bitwise equal on all ranks"
        assert between == 0, "steps that are not looked at communicate nothing"
        assert_unchanged(twin, weights)
        for mine, its in zip(seen, true, strict=True):
            known = [math.nan if number is None else number for number in mine]
            assert known == pytest.approx(its, rel=1e-8 if curvature == "auto" else 1e-5, nan_ok=True)


def failing_on_one_rank() -> tuple[str, bool]:
    model, optimizer, x, y = with_gradient()
    twin, its, _, _ = with_gradient()
    its.step()
    watch = gen.Watch(optimizer, model)

    def loss() -> Tensor:
        if dist.get_rank() == 1:
            raise RuntimeError("no data")
        return F.mse_loss(model(x), y)

    try:
        with watch.step(closure=loss):
            optimizer.step()
    except RuntimeError as error:
        same = all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
        return str(error), same
    return "", False


def test_an_error_on_one_rank_is_raised_on_all_after_the_step(pool: Callable[[int], Pool]) -> None:
    (there, moved), (here, moved_too) = pool(2).run(failing_on_one_rank)
    assert (here, moved, moved_too) == ("no data", True, True)
    assert "rank 1 (RuntimeError: no data)" in there


@pytest.fixture
def information(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, "gen_dist"):
        yield caplog


def test_what_is_seen_is_logged(information: pytest.LogCaptureFixture) -> None:
    model, optimizer, x, y = with_gradient()
    watch = gen.Watch(optimizer, model, F.mse_loss)
    with watch.step(x, y):
        optimizer.step()
    assert [record.message for record in information.records] == [str(watch.last)]
    assert str(watch.last).startswith("step 1: rate 0.1, minimum along the step ")
