"""A batch means one loss, however it looks and whoever is asked: the scheduler, the curves, `suggest_lr`."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from problems import perceptron
from torch import Tensor, nn

import gen_dist as gen

CURVATURES = ["exact", "forward"]
RATES = [0.0, 0.05, 0.1]


class Labelled(nn.Module):
    """Returns its own loss, as models of transformers do."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = perceptron(4, 5, 3).double()
        self.wrap = wrap

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        output = self.inner(x)
        return output if labels is None else self.wrap(F.mse_loss(output, labels))


class Graph:
    """A batch of a kind that nobody knows."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y


def of_graph(model: nn.Module, batch: Graph) -> Tensor:
    return F.mse_loss(model(batch.x), batch.y)


def with_labels(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {"x": x, "labels": y}


class Way(NamedTuple):
    """How the loss and the batch are given."""

    batch: Callable[[Tensor, Tensor], Any]
    wrap: Callable[[Tensor], Any] = lambda loss: loss
    criterion: Any = None
    compute_loss: Any = None


WAYS = {
    "pair": Way(lambda x, y: (x, y), criterion=F.mse_loss),
    "list": Way(lambda x, y: [x, y], criterion=F.mse_loss),
    "dict, loss alone": Way(with_labels),
    "dict, loss in a dict": Way(with_labels, lambda loss: {"loss": loss, "logits": None}),
    "dict, loss in an object": Way(with_labels, lambda loss: SimpleNamespace(loss=loss)),
    "another mapping": Way(lambda x, y: UserDict(with_labels(x, y)), lambda loss: {"loss": loss}),
    "any batch": Way(Graph, compute_loss=of_graph),
    "a pair for compute_loss": Way(lambda x, y: (x, y), compute_loss=lambda model, b: F.mse_loss(model(b[0]), b[1])),
    "closure": Way(lambda x, y: None),
}


def parts() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    x, y = (torch.randn(2, 6, size, generator=generator).double() for size in (4, 3))
    return list(zip(x, y, strict=True))


class Asked:
    """A model with gradients of the parts, and the parts as batches of a way, or as closures."""

    def __init__(self, way: Way, count: int) -> None:
        self.model = Labelled(way.wrap)
        self.optimizer = gen.make_gen_optimizer(torch.optim.AdamW, self.model.parameters(), lr=0.01)
        self.loss = {"criterion": way.criterion, "compute_loss": way.compute_loss}
        data = parts()[:count]
        for x, y in data:
            (F.mse_loss(self.model(x), y) / count).backward()
        closures = [lambda x=x, y=y: F.mse_loss(self.model(x), y) for x, y in data]
        self.batches = closures if way is WAYS["closure"] else [way.batch(x, y) for x, y in data]

    def update(self, curvature: str, **given: Any) -> gen.Update | None:
        scheduler = gen.GenScheduler(self.optimizer, self.model, **self.loss, curvature=curvature, average=False)
        scheduler.step(**given or {"batches": self.batches})
        return scheduler.last

    def curve(self, function: Callable[..., Any], **more: Any) -> list[float]:
        given = {"x": self.batches[0]} if len(self.batches) == 1 else {"batches": self.batches}
        loss = dict(self.loss)
        numbers = function(self.model, loss.pop("criterion"), self.optimizer, **given, **loss, **more)
        return [float(number) for number in numbers]

    def suggestion(self, curvature: str) -> float | None:
        held_out, batches = self.batches[-1], self.batches[:1]
        return gen.suggest_lr(
            self.model, self.optimizer, **self.loss, batches=batches, held_out=held_out, curvature=curvature
        ).rate


BATCHES = pytest.mark.parametrize("way", [name for name in WAYS if name != "closure"])


@BATCHES
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_an_update_is_that_of_closures(way: str, count: int, curvature: str) -> None:
    expected = Asked(WAYS["closure"], count).update(curvature)
    asked = Asked(WAYS[way], count)
    assert asked.update(curvature) == expected
    if count == 1:
        asked.optimizer.reset()
        assert Asked(WAYS[way], 1).update(curvature, x=asked.batches[0]) == expected


@BATCHES
def test_the_curves_are_those_of_closures(way: str) -> None:
    for function, more in (
        (gen.second_order_approximation_coeffs, {}),
        (gen.second_order_approximation, {"learning_rates": RATES}),
        (gen.loss_per_learning_rate, {"learning_rates": RATES}),
    ):
        expected = Asked(WAYS["closure"], 2).curve(function, **more)
        assert Asked(WAYS[way], 2).curve(function, **more) == expected
        assert Asked(WAYS[way], 1).curve(function, **more) == Asked(Way(Graph, compute_loss=of_graph), 1).curve(
            function, **more
        )


@BATCHES
def test_a_suggestion_is_that_of_closures(way: str) -> None:
    assert Asked(WAYS[way], 2).suggestion("exact") == Asked(WAYS["closure"], 2).suggestion("exact")


@pytest.mark.parametrize("make", [gen.ExactGen, gen.ApproxGen, gen.AutoGen])
def test_every_scheduler_takes_compute_loss(make: Any) -> None:
    asked = Asked(WAYS["any batch"], 1)
    scheduler = make(asked.optimizer, asked.model, compute_loss=of_graph)
    scheduler.step(asked.batches[0])
    assert scheduler.last.loss == pytest.approx(of_graph(asked.model, asked.batches[0]).item(), rel=1e-12)


# ------------------------------------------------------------------------------------------------- refused


def scheduler_of(model: nn.Module | None = None, **loss: Any) -> gen.GenScheduler:
    model = model or Labelled(lambda loss: {"loss": loss})
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=0.01)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return gen.GenScheduler(optimizer, model, **loss)


X, Y = parts()[0]
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a criterion and a dict": (
        lambda: scheduler_of(criterion=F.mse_loss).step({"x": X, "labels": Y}),
        ValueError,
        r"leave it out, or type scheduler.step\(x, y\)",
    ),
    "both losses": (
        lambda: scheduler_of(criterion=F.mse_loss, compute_loss=of_graph),
        ValueError,
        "pass one of them",
    ),
    "a criterion as compute_loss": (
        lambda: scheduler_of(compute_loss=nn.MSELoss()),
        TypeError,
        "pass MSELoss as criterion=",
    ),
    "no function": (lambda: scheduler_of(compute_loss=3), TypeError, r"compute_loss\(model, batch\), got 3"),
    "no labels": (lambda: scheduler_of().step({"x": X}), TypeError, "the loss must be"),
    "no loss in the output": (
        lambda: scheduler_of(Labelled(lambda loss: {"logits": loss})).step({"x": X, "labels": Y}),
        TypeError,
        "returned dict without a loss: does the batch hold the labels",
    ),
    "no target": (lambda: scheduler_of(criterion=F.mse_loss).step(X), ValueError, r"type scheduler.step\(x, y\)"),
    "an unknown batch": (lambda: scheduler_of().step(Graph(X, Y)), TypeError, "pass compute_loss=lambda model, batch"),
    "a pair without a criterion": (lambda: scheduler_of().step((X, Y)), ValueError, "pass criterion=, or compute_loss"),
    "gauss-newton": (
        lambda: scheduler_of(curvature="gauss-newton").step({"x": X, "labels": Y}),
        ValueError,
        "needs model and criterion apart",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_call_says_what_to_type(case: str) -> None:
    call, kind, text = REFUSED[case]
    with pytest.raises(kind, match=text):
        call()


# ------------------------------------------------------------------------------------- closures that bind late

batch: dict[str, Tensor] = {}  # as at the top level of a script


class Step:
    """A trainer that keeps its batch in an attribute."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def loss(self) -> Tensor:
        return self.model(**self.batch)["loss"]  # type: ignore[no-any-return]

    def take(self, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
        self.batch = batch
        return self.loss


def in_cells(model: nn.Module) -> list[Callable[[], Tensor]]:
    closures = []
    for x, y in parts():
        closures.append(lambda: model(x, y)["loss"])  # noqa: B023
    return closures


def in_globals(model: nn.Module) -> list[Callable[[], Tensor]]:
    closures: list[Callable[[], Tensor]] = []
    for x, y in parts():
        batch.update(x=x, labels=y)
        closures.append(lambda model=model: model(**batch)["loss"])
    return closures


def in_attributes(model: nn.Module) -> list[Callable[[], Tensor]]:
    step = Step(model)
    return [step.take(with_labels(x, y)) for x, y in parts()]


def one_of_them_twice(model: nn.Module) -> list[Any]:
    x, y = parts()[0]
    return [with_labels(x, y), late := lambda: model(x, y)["loss"], late]


@pytest.mark.parametrize("late", [in_cells, in_globals, in_attributes, one_of_them_twice])
def test_closures_that_see_the_same_batch_are_refused(late: Callable[[nn.Module], list[Any]]) -> None:
    scheduler = scheduler_of()
    with pytest.raises(ValueError, match=r"one function over the same variables.*scheduler.step\(batches=\[batch1"):
        scheduler.step(batches=late(scheduler.model))
    assert scheduler.last is None


def by_defaults(model: nn.Module) -> list[Callable[[], Tensor]]:
    return [lambda x=x, y=y: model(x, y)["loss"] for x, y in parts()]


def by_keywords(model: nn.Module) -> list[Callable[[], Tensor]]:
    return [lambda *, x=x, y=y: model(x, y)["loss"] for x, y in parts()]


def by_partial(model: nn.Module) -> list[Callable[[], Tensor]]:
    return [partial(lambda x, y: model(x, y)["loss"], x, y) for x, y in parts()]


def by_a_function(model: nn.Module) -> list[Callable[[], Tensor]]:
    def bound(x: Tensor, y: Tensor) -> Callable[[], Tensor]:
        return lambda: model(x, y)["loss"]

    return [bound(x, y) for x, y in parts()]


def by_objects(model: nn.Module) -> list[Callable[[], Tensor]]:
    return [Step(model).take(with_labels(x, y)) for x, y in parts()]


@pytest.mark.parametrize("bound", [by_defaults, by_keywords, by_partial, by_a_function, by_objects])
def test_closures_that_hold_their_batch_are_taken(bound: Callable[[nn.Module], list[Any]]) -> None:
    scheduler = scheduler_of()
    scheduler.step(batches=bound(scheduler.model))
    assert scheduler.last is not None
    expected = torch.stack([F.mse_loss(scheduler.model(x), y) for x, y in parts()]).mean().item()
    assert scheduler.last.loss == pytest.approx(expected, rel=1e-12)
