"""Trainers that hide `optimizer.step()` set the rates of the plain loop, bit for bit."""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import hidden_loops as loops
import pytest
import torch
import torch.nn.functional as F
from effects import assert_unchanged
from hidden_loops import Recorded, Reports, Training, plain
from problems import criterion, data, new_model, perceptron
from rank_pool import Pool
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import gen_dist as gen

pytestmark = [pytest.mark.timeout(90), pytest.mark.filterwarnings("ignore")]


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {' and '.join(missing)}")


ACCUMULATING = [
    pytest.param(loop, marks=needs(package))
    for loop, package in (
        (loops.ignite_by_its_criterion, "ignite"),
        (loops.ignite_by_its_events, "ignite"),
        (loops.timm_by_its_criterion, "timm"),
        (loops.timm_by_hand, "timm"),
    )
]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("loop", ACCUMULATING)
def test_updates_are_those_of_the_plain_loop(loop: Callable[..., Reports], accumulate: int) -> None:
    assert loop(accumulate=accumulate) == plain(accumulate=accumulate)


@needs("ignite")
def test_a_criterion_that_is_a_module() -> None:
    assert loops.ignite_by_its_criterion(as_module=True) == plain()


@needs("skorch")
@pytest.mark.parametrize("loop", [loops.skorch_by_its_callback, loops.skorch_by_its_criterion])
def test_skorch_whose_closure_makes_the_gradients(loop: Callable[..., Reports]) -> None:
    assert loop() == plain()


@needs("fastai")
def test_fastai_which_clears_gradients_in_place() -> None:
    assert loops.fastai_by_its_criterion() == plain()


@needs("timm")
def test_autocast_is_entered_again() -> None:
    assert loops.timm_by_its_criterion(bfloat16=True) == plain(bfloat16=True)


@needs("ignite")
@pytest.mark.parametrize("kind", ["replica", "ddp", "fsdp2"])
def test_on_ranks(pool: Callable[[int], Pool], kind: str) -> None:
    expected = pool(2).run(plain, kind, 2)
    assert len({repr(seen) for seen in expected}) == 1
    for loop in (loops.ignite_by_its_criterion, loops.ignite_by_its_events):
        assert pool(2).run(loop, kind, 2) == expected


# ------------------------------------------------------------------- a loss of the scheduler's, averaged weights


def by_dict(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return criterion(model(batch["x"]), batch["y"])


def by_pair(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return criterion(model(batch[0]), batch[1])


COLLECTED: dict[str, tuple[Callable[..., Tensor], Callable[[gen.RateAtStep, Tensor, Tensor], None]]] = {
    "a dict": (by_dict, lambda rate, x, y: rate.collect({"x": x, "y": y})),
    "a pair": (by_pair, lambda rate, x, y: rate.collect(x, y)),
    "batches": (by_pair, lambda rate, x, y: rate.collect(batches=[(x, y)])),
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("way", COLLECTED)
def test_what_is_collected_is_what_the_scheduler_computes_the_loss_of(way: str, accumulate: int) -> None:
    compute_loss, collect = COLLECTED[way]
    training = Training(accumulate=accumulate, compute_loss=compute_loss)
    rate = gen.RateAtStep(training.scheduler)
    for group in training.groups:
        training.optimizer.zero_grad()
        for x, y in group:
            collect(rate, x, y)
            (criterion(training.model(x), y) / accumulate).backward()
        training.optimizer.step()
    assert training.scheduler.seen == plain(accumulate=accumulate)


class Labelled(nn.Module):
    """Returns its own loss, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = new_model()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": criterion(self.inner(x), labels)}


def test_a_dict_whose_loss_the_model_returns() -> None:
    model = Labelled()
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), **loops.ADAMW)
    scheduler = Recorded(optimizer, model)
    rate = gen.RateAtStep(scheduler)
    for x, y in data(loops.STEPS, batch=4):
        optimizer.zero_grad()
        model(x, y)["loss"].backward()
        rate.collect({"x": x, "labels": y})
        optimizer.step()
    assert scheduler.seen == plain()


def normed() -> tuple[nn.Module, gen.AutoGen]:
    """A model with a batch norm, and its scheduler."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters())
    return model, gen.AutoGen(optimizer, model, F.mse_loss)


def test_the_averaged_weights_are_those_of_the_plain_loop_and_those_in_training_come_back() -> None:
    (model, scheduler), (twin, its) = normed(), normed()
    rate = gen.RateAtStep(scheduler)
    x, y = torch.randn(5, 8, 4).double(), torch.randn(5, 8, 3).double()
    for inputs, targets in zip(x, y, strict=True):
        for each, stepped in ((model, scheduler), (twin, its)):
            stepped.optimizer.zero_grad()
            F.mse_loss(each(inputs), targets).backward()
        rate.collect(inputs, targets)
        scheduler.optimizer.step()
        its.step(inputs, targets)
        its.optimizer.step()
    in_training, expected = copy.deepcopy(model.state_dict()), copy.deepcopy(twin)
    assert its.average is not None
    assert its.average.count == 5
    with torch.no_grad():
        for p, average in zip(expected.parameters(), its.average.average, strict=True):
            p.copy_(average)
    for batches in ((), list(x)):
        if batches:
            update_bn(batches, expected)
        with rate.averaged(batches):
            assert_unchanged(expected.state_dict(), model.state_dict())
        assert_unchanged(expected.state_dict(), rate.averaged_state_dict(batches))
        assert_unchanged(in_training, model.state_dict())
    assert not torch.equal(in_training["0.weight"], expected[0].weight)


def test_without_averages_the_block_says_how_to_get_them() -> None:
    rate = gen.RateAtStep(Training().scheduler)
    with pytest.raises(ValueError, match="make it with average=True, or use AutoGen"), rate.averaged():
        pass
    with pytest.raises(ValueError, match="make it with average=True, or use AutoGen"):
        rate.averaged_state_dict()


# ---------------------------------------------------------------- which batches count


def orders() -> dict[str, list[str]]:
    """A micro-batch in the orders in which loops make it; `clear` only where an accumulation begins."""
    return {
        "clear, collect, backward": ["clear", "collect", "backward"],
        "collect, clear, backward": ["collect", "clear", "backward"],
        "clear, backward, collect": ["clear", "backward", "collect"],
        "collect, backward, clear after the step": ["collect", "backward"],
        "backward, collect, clear after the step": ["backward", "collect"],
        "criterion, clear, backward": ["criterion", "clear", "backward"],
        "criterion, backward, clear after the step": ["criterion", "backward"],
    }


class Told(gen.ExactGen):
    """Notes how many micro-batches each update has, and their mean loss."""

    told: list[tuple[int, float]]

    def step(self, *args: Any, **given: Any) -> None:
        super().step(*args, **given)
        assert self.last is not None
        self.told.append((len(given["batches"]), self.last.loss))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("order", orders())
def test_a_step_that_the_scaler_leaves_out_takes_its_batches_away(order: str, accumulate: int, in_place: bool) -> None:
    model, batches, parts = new_model(), data(4 * accumulate, batch=4), orders()[order]
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters())
    scheduler = Told(optimizer, model, None if "criterion" in parts else criterion, lr_max=1e-3)
    scheduler.told = []
    rate = gen.RateAtStep(scheduler)
    collected = rate.collect_from(criterion) if "criterion" in parts else criterion
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    expected = []
    for first in range(0, len(batches), accumulate):
        overflows = first == accumulate
        for index, (x, y) in enumerate(batches[first : first + accumulate]):
            for part in parts:
                if part == "collect":
                    rate.collect(x, y)
                elif part == "criterion":
                    loss = collected(model(x), y)
                elif part == "backward":
                    loss = loss if "criterion" in parts else criterion(model(x), y)
                    scaler.scale(loss / accumulate * (torch.inf if overflows else 1)).backward()
                elif index == 0:
                    optimizer.zero_grad(set_to_none=not in_place)
        if not overflows:
            with torch.no_grad():
                own = [criterion(model(x), y) for x, y in batches[first : first + accumulate]]
            expected.append((accumulate, pytest.approx(torch.stack(own).mean().item(), rel=1e-12)))
        scaler.step(optimizer)
        scaler.update()
        if "clear" not in parts:
            optimizer.zero_grad(set_to_none=not in_place)
    assert scheduler.told == expected


def test_a_loss_that_is_scaled_in_place() -> None:
    """As `loss /= accum_iter` does in the loop of masked autoencoders."""
    training = Training(accumulate=2)
    collected = gen.RateAtStep(training.scheduler).collect_from(criterion)
    for group in training.groups:
        training.optimizer.zero_grad()
        for x, y in group:
            loss = collected(training.model(x), y)
            loss /= 2
            loss.backward()
        training.optimizer.step()
    assert training.scheduler.seen == plain(accumulate=2)


@pytest.mark.filterwarnings("ignore:.*is deprecated")
@pytest.mark.parametrize(("make", "tolerance"), [(gen.ExactGen, 1e-8), (gen.ApproxGen, 1e-4)])
def test_a_model_of_torchscript(make: Any, tolerance: float) -> None:
    """As timm's `train.py` makes with `--torchscript`."""
    twin, told = perceptron(4, 5, 3).double(), []
    model = torch.jit.script(copy.deepcopy(twin))
    x, y = torch.randn(5, 8, 4).double(), torch.randn(5, 8, 3).double()
    for each in (model, twin):
        optimizer = gen.make_gen_optimizer(torch.optim.AdamW, each.parameters())
        scheduler = make(optimizer, each, F.mse_loss, lr_max=0.1)
        collected = gen.RateAtStep(scheduler).collect_from(F.mse_loss) if each is not twin else F.mse_loss
        for inputs, targets in zip(x, y, strict=True):
            optimizer.zero_grad()
            collected(each(inputs), targets).backward()
            if each is twin:
                scheduler.step(inputs, targets)
            optimizer.step()
            assert scheduler.last is not None
            told.append((scheduler.last.numerator, scheduler.last.denominator, scheduler.last.lr))
    for mine, its in zip(told[:5], told[5:], strict=True):
        assert mine == pytest.approx(its, rel=tolerance)


def test_a_loss_that_is_never_trained_on_does_not_count() -> None:
    """A batch that the loop leaves out, as one whose loss is not finite."""
    training = Training()
    collected = gen.RateAtStep(training.scheduler).collect_from(criterion)
    for x, y in training.batches:
        collected(training.model(y), x)
        training.optimizer.zero_grad()
        collected(training.model(x), y).backward()
        training.optimizer.step()
    assert training.scheduler.seen == plain()


def test_detached_the_criterion_collects_no_more() -> None:
    training = Training()
    rate = gen.RateAtStep(training.scheduler)
    collected = rate.collect_from(criterion)
    rate.detach()
    x, y = training.batches[0]
    collected(training.model(x), y).backward()
    training.optimizer.step()
    assert rate.batches == training.scheduler.seen == []


def test_a_copy_goes_on_with_a_criterion_of_its_own() -> None:
    training = Training()
    rate = gen.RateAtStep(training.scheduler)
    rate.collect_from(criterion)
    twin = copy.deepcopy(rate)
    collected = twin.collect_from(criterion)
    for x, y in training.batches:
        twin.scheduler.optimizer.zero_grad()
        collected(twin.scheduler.model(x), y).backward()
        twin.scheduler.optimizer.step()
    assert twin.scheduler.seen == plain()  # type: ignore[attr-defined]
    assert rate.batches == training.scheduler.seen == []


def test_two_outputs_and_a_part_of_an_output() -> None:
    """As in contrastive losses: the criterion gets parts of two outputs of the model."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3).double()

        def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
            return {"features": scale * self.inner(x).tanh(), "norm": x.norm()}

    def apart(one: Tensor, other: Tensor, *, margin: float) -> Tensor:
        return F.relu(margin - (one - other).square().sum(1)).mean()

    seen = []
    for watched in (True, False):
        torch.manual_seed(0)
        model, (x, y) = Pair(), torch.randn(2, 6, 4).double()
        optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=0.1)
        scheduler = Recorded(optimizer, model)
        loss_of = gen.RateAtStep(scheduler).collect_from(apart) if watched else apart

        def closure(model: nn.Module = model, loss_of: Any = loss_of, x: Tensor = x, y: Tensor = y) -> Tensor:
            one, other = model(x)["features"], model(y, scale=0.5)["features"]
            return loss_of(one, other, margin=3.0)  # type: ignore[no-any-return]

        for _ in range(3):
            optimizer.zero_grad()
            closure().backward()
            if not watched:
                scheduler.step(closure=closure)
            optimizer.step()
        seen.append(scheduler.seen)
    assert seen[0] == seen[1]
    assert len(seen[0]) == 3


def test_a_copy_of_the_model_is_free() -> None:
    """An average of weights begins as a deep copy, which must not take the scheduler along."""
    training = Training()
    rate = gen.RateAtStep(training.scheduler)
    collected = rate.collect_from(criterion)
    twin = copy.deepcopy(training.model)
    x, y = training.batches[0]
    criterion(twin(x), y).backward()
    assert rate.batches == []
    collected(training.model(x), y).backward()
    assert len(rate.batches) == 1


def test_only_inputs_are_kept_until_the_step() -> None:
    """The graph of a forward pass ends with its loss."""
    from weakref import ref

    training = Training()
    collected = gen.RateAtStep(training.scheduler).collect_from(criterion)
    x, y = training.batches[0]
    output = training.model(x)
    alive = ref(output)
    loss = collected(output, y)
    loss.backward()
    del output, loss
    assert alive() is None


# ------------------------------------------------------------------------------------------------- wrong calls


def of_another_model(rate: gen.RateAtStep, model: nn.Module, x: Tensor, y: Tensor) -> None:
    rate.collect_from(criterion)(new_model()(x), y)


def of_something_computed(rate: gen.RateAtStep, model: nn.Module, x: Tensor, y: Tensor) -> None:
    rate.collect_from(criterion)(model(x).log_softmax(-1), y)


def of_more_than_the_output(rate: gen.RateAtStep, model: nn.Module, x: Tensor, y: Tensor) -> None:
    output = model(x)
    rate.collect_from(lambda a, b: (a - b).square().mean())(output, output.softmax(-1))


def of_every_sample(rate: gen.RateAtStep, model: nn.Module, x: Tensor, y: Tensor) -> None:
    rate.collect_from(lambda a, b: F.cross_entropy(a.flatten(0, 1), b.flatten(), reduction="none"))(model(x), y)


def late(rate: gen.RateAtStep, model: nn.Module, x: Tensor, y: Tensor) -> None:
    for _ in range(2):
        rate.collect(closure=lambda: criterion(model(x), y))


WRONG: list[tuple[Callable[..., None], str]] = [
    (of_another_model, r"computed from the output.*or of another model: call rate.collect\(batch\)"),
    (of_something_computed, r"shape \(4, 5, 11\) that was computed from the output"),
    (of_more_than_the_output, "computed from the output"),
    (of_every_sample, r"(?s)tensor with one element.*call rate.collect\(batch\)"),
    (late, r"one function over the same variables.*rate.collect\(batches=\[batch1, batch2\]"),
    (lambda rate, model, x, y: rate.collect(), r"rate.collect got no batch; type one of rate.collect\(x, y\)"),
    (lambda rate, model, x, y: rate.collect(x, y), r"rate.collect\(x, y\) needs the criterion"),
]


@pytest.mark.parametrize(("call", "text"), WRONG)
def test_a_wrong_call_says_what_to_type(call: Callable[..., None], text: str) -> None:
    training = Training()
    with pytest.raises(ValueError, match=text):
        call(gen.RateAtStep(training.scheduler), training.model, *training.batches[0])


def test_without_a_scheduler_nothing_is_collected() -> None:
    rate = gen.RateAtStep()
    for call in (lambda: rate.collect(1, 2), lambda: rate.collect_from(criterion), rate.averaged):
        with pytest.raises(RuntimeError, match="no scheduler yet"):
            call()


def test_steps_without_batches_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    training = Training()
    gen.RateAtStep(training.scheduler)
    caplog.set_level(logging.WARNING, logger="gen_dist")
    for x, y in training.batches:
        training.optimizer.zero_grad()
        criterion(training.model(x), y).backward()
        training.optimizer.step()
    [warning] = [record.getMessage() for record in caplog.records]
    assert "without a batch" in warning
    assert "rate.collect_from(criterion)" in warning
    assert training.scheduler.last is None
