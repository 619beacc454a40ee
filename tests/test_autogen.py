"""AutoGen: no rate, no schedule, no horizon; averaged weights; the same on N ranks as in one process."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import math
import statistics
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from problems import BATCH, KINDS, Model, criterion, new_model, parallel, slice_here, whole
from rank_pool import Pool
from torch import Tensor, nn

import gen_dist as gen
from gen_dist import Auto, Averaging

STEPS = 20


def data(steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 11, (steps, BATCH, 6), generator=generator)
    return [(t[:, :-1], t[:, 1:]) for t in tokens]


Trace = tuple[list[float], dict[str, Tensor], dict[str, Tensor]]


def train(kind: str, lr: float = 1e-3, total_steps: int | None = None) -> Trace:
    """Rates, final weights and averaged weights."""
    inner = new_model()
    model = parallel(inner, kind)
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), lr=lr)
    scheduler = gen.AutoGen(optimizer, model, criterion, total_steps=total_steps)
    here = slice_here()
    rates = []
    for x, y in data():
        optimizer.zero_grad()
        criterion(model(x[here]), y[here]).backward()
        scheduler.step(x[here], y[here])
        optimizer.step()
        rates += scheduler.get_last_lr()
    weights = {name: whole(p) for name, p in inner.named_parameters()}
    with scheduler.averaged():
        averages = {name: whole(p) for name, p in inner.named_parameters()}
    return rates, weights, averages


@pytest.mark.parametrize("total_steps", [None, STEPS])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_same_on_ranks_as_in_one_process(
    pool: Callable[[int], Pool], ranks: int, kind: str, total_steps: int | None
) -> None:
    rates, weights, averages = train("replica", total_steps=total_steps)
    results = pool(ranks).run(train, kind, 1e-3, total_steps)
    for seen_rates, seen_weights, seen_averages in results:
        assert seen_rates == results[0][0], "bitwise equal on all ranks"
        assert seen_rates == pytest.approx(rates, rel=1e-10)
        for name in weights:
            torch.testing.assert_close(seen_weights[name], weights[name], rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(seen_averages[name], averages[name], rtol=1e-9, atol=1e-10)


def test_the_initial_rate_plays_no_part() -> None:
    small, large = train("replica", 1e-6), train("replica", 1e-1)
    assert small[0] == large[0]
    assert all(torch.equal(small[1][name], large[1][name]) for name in small[1])


def test_rates_and_weights_follow_the_recipe_written_out() -> None:
    """Beside the rule and Schedule-Free's three sequences as their papers state them, by double backward."""
    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.0, 0.999))
    weights = [*model.parameters()]
    curvatures: list[float] = []
    slopes: list[float] = []
    rates, rate, growth, updated, sum_of_shares, first_loss = [], 0.0, 1.0, -9, 0.0, 0.0
    z = [p.detach().clone() for p in weights]
    for step, (x, y) in enumerate(data()):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        d = reference.direction(model, optimizer)
        if step - updated >= 3:
            loss, slope, curvature = reference.derivatives(lambda x=x, y=y: criterion(model(x), y), weights, d)
            size = (sum(p.square().sum() for p in weights) / sum(v.square().sum() for v in d)).sqrt().item()  # type: ignore[union-attr]
            rate = rate or 5e-5 * size
            first_loss = loss if step == 0 else first_loss
            fall = min(loss, max(first_loss - loss, loss / 2))
            curvatures, slopes = [*curvatures, curvature / slope][-3:], [*slopes, slope / fall][-3:]
            e, p = rate * statistics.median(curvatures), rate * statistics.median(slopes)
            near = max(e / 0.75, p / 0.2)
            assert near < 1, "20 steps from so small a rate are growth"
            growth = 1.5 - 0.43 * min(max(math.log10(near) + 2, 0), 1) if near > 0 else 1.5
            updated = step
        optimizer.step()  # for its state; the weights come from the three sequences
        for ahead, v in zip(z, d, strict=True):
            ahead -= (rate if step == 0 else 10 * rate) * v
        sum_of_shares += (step + 1) * rate**2
        if step == 0:
            mean = [ahead.clone() for ahead in z]
        for weight, ahead, average in zip(weights, z, mean, strict=True):
            average.lerp_(ahead, (step + 1) * rate**2 / sum_of_shares)
            weight.data.copy_(0.1 * ahead + 0.9 * average)
        rates.append(rate)
        rate *= growth
    seen_rates, seen_weights, seen_averages = train("replica")
    assert seen_rates == pytest.approx(rates, rel=1e-9)
    for (name, weight), average in zip(model.named_parameters(), mean, strict=True):
        torch.testing.assert_close(seen_weights[name], weight.detach(), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(seen_averages[name], average, rtol=1e-9, atol=1e-10)


def test_at_the_last_step_of_a_known_horizon_the_weights_become_their_average() -> None:
    free, bound = train("replica"), train("replica", total_steps=STEPS)
    assert bound[0] == free[0]
    assert all(torch.equal(bound[1][name], free[2][name]) for name in free[1])
    assert not all(torch.equal(free[1][name], free[2][name]) for name in free[1])
    early = train("replica", total_steps=STEPS - 3)[0]
    assert early == [*free[0][: STEPS - 3], 0.0, 0.0, 0.0]


@pytest.mark.parametrize("seed", [0, 3, 5])
def test_batches_that_miss_the_steep_direction_do_not_let_it_diverge(seed: int) -> None:
    """Inputs of positive mean make one direction 60 times as steep as the others. Seed 3 once ended at infinity."""
    torch.manual_seed(seed)
    inputs, targets = torch.rand(2048, 20), torch.rand(2048, 1)
    model = nn.Linear(20, 1)
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=1e-3)
    scheduler = gen.AutoGen(optimizer, model, F.mse_loss)
    for _ in range(4):
        for batch in torch.randperm(2048).split(32):
            steps(scheduler, inputs[batch], targets[batch], 1, F.mse_loss)
    with scheduler.averaged():
        assert F.mse_loss(model(inputs), targets) < 0.1  # the variance of the targets is 1 / 12


class PostNorm(nn.Module):
    """PyTorch's own encoder layer; token ids `(time, batch)` of 500 -> logits `(time * batch, 500)`."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(500, 64)
        layer = nn.TransformerEncoderLayer(64, 2, 64, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 500)
        for module in (self.token, self.head):
            nn.init.uniform_(module.weight, -0.1, 0.1)
        self.position = nn.Parameter(0.1 * torch.randn(20, 1, 64))
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(20))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(8 * self.token(tokens) + self.position, self.mask)).flatten(0, 1)


def sentences(count: int) -> list[tuple[Tensor, Tensor]]:
    """Words by Zipf's law, every second of them one of four that may follow the word before."""
    follows, zipf = torch.randint(500, (500, 4)), 1 / torch.arange(1.0, 501)
    batches = []
    for _ in range(count):
        words = [torch.multinomial(zipf, 20, True)]
        for _ in range(20):
            follower = follows[words[-1], torch.randint(4, (20,))]
            words.append(torch.where(torch.rand(20) < 0.5, follower, torch.multinomial(zipf, 20, True)))
        text = torch.stack(words)
        batches.append((text[:-1], text[1:].flatten()))
    return batches


@pytest.mark.parametrize("seed", [0, 3])
def test_a_post_norm_transformer_is_not_spoiled_by_growth(seed: int) -> None:
    """A rate above 4e-3 kills it within some steps, and its loss stays near 5; 3e-3 trains."""

    def loss_after_training(auto: bool) -> float:
        torch.manual_seed(seed)
        *batches, held_out = sentences(221)
        model = PostNorm()
        optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), lr=3e-3)
        scheduler = gen.AutoGen(optimizer, model, F.cross_entropy) if auto else None
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            if scheduler:
                scheduler.step(x, y)
            optimizer.step()
        with torch.no_grad(), scheduler.averaged() if scheduler else contextlib.nullcontext():
            return F.cross_entropy(model(held_out[0]), held_out[1]).item()

    assert loss_after_training(auto=True) < 1.06 * loss_after_training(auto=False)


def test_a_skipped_last_step_of_a_known_horizon_leaves_the_average_all_the_same() -> None:
    scheduler, x, y = small_problem(total_steps=6)
    steps(scheduler, x, y, 5)
    average = scheduler.averaged_state_dict()
    scheduler.optimizer.zero_grad()
    (F.cross_entropy(scheduler.model(x), y) * math.nan).backward()
    scheduler.step(x, y)
    scheduler.optimizer.step()
    assert all(torch.equal(p, average[name]) for name, p in scheduler.model.named_parameters())


def test_where_the_loss_curves_downwards_the_rate_grows_and_nothing_warns(caplog: pytest.LogCaptureFixture) -> None:
    weight = nn.Parameter(torch.tensor([0.3], dtype=torch.float64))
    model = nn.ParameterList([weight])
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=0.1)
    scheduler = gen.AutoGen(optimizer, model)
    rates = []
    for _ in range(8):  # cos(x) + 1 curves downwards up to pi / 2
        optimizer.zero_grad()
        (torch.cos(weight).sum() + 1).backward()
        scheduler.step(closure=lambda: torch.cos(weight).sum() + 1)
        assert scheduler.last is not None
        assert scheduler.last.denominator < 0
        assert scheduler.last.accepted
        optimizer.step()
        rates += scheduler.get_last_lr()
    assert rates == sorted(set(rates))
    assert not [r for r in caplog.records if "updates in a row" in r.getMessage()]


def test_average_takes_no_none() -> None:
    with pytest.raises(TypeError, match=r"average must be True, False or gen_dist\.Averaging\(\.\.\.\), got None"):
        small_problem(average=None)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------- averaged weights


def small_problem(average: bool | Averaging = True, **options: Any) -> tuple[gen.AutoGen, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=0.1, momentum=0.9)
    scheduler = gen.AutoGen(optimizer, model, F.cross_entropy, average=average, **options)
    return scheduler, torch.randn(16, 4).double(), torch.randint(0, 3, (16,))


def steps(
    scheduler: gen.AutoGen, x: Tensor, y: Tensor, count: int, loss: Callable[..., Tensor] = F.cross_entropy
) -> list[list[Tensor]]:
    """Weights after each step."""
    seen = []
    for _ in range(count):
        scheduler.optimizer.zero_grad()
        loss(scheduler.model(x), y).backward()
        scheduler.step(x, y)
        scheduler.optimizer.step()
        seen.append([p.detach().clone() for p in scheduler.model.parameters()])
    return seen


def test_the_average_is_over_a_growing_window() -> None:
    scheduler, x, y = small_problem(Averaging(momentum=0))
    seen = steps(scheduler, x, y, 12)
    average, total = seen[0], 1.0
    for t, weights in enumerate(seen[1:], start=2):
        total += t**12
        average = [a + t**12 / total * (w - a) for a, w in zip(average, weights, strict=True)]
    for _ in range(2):  # looking twice takes nothing twice
        with scheduler.averaged():
            for p, a in zip(scheduler.model.parameters(), average, strict=True):
                torch.testing.assert_close(p, a, rtol=1e-12, atol=1e-12)
    for p, w in zip(scheduler.model.parameters(), seen[-1], strict=True):
        assert torch.equal(p, w)


@pytest.mark.parametrize("power", [0, 2])
@pytest.mark.parametrize("rate_power", [0, 2])
def test_momentum_is_the_interpolation_of_schedule_free(power: float, rate_power: float) -> None:
    """`y = (1 - b) z + b x`, gradients at `y`, `z` makes `1 / (1 - b)` times the step, and `x` is the mean of `z`."""
    b = 0.75
    averaging = Averaging(power, b, rate_power)
    scheduler, x, y = small_problem(averaging, update_every=1, rule=Auto())
    steps(scheduler, x, y, 1)
    total = scheduler.get_last_lr()[0] ** rate_power
    weights = [*scheduler.model.parameters()]
    ahead, mean = [p.detach().clone() for p in weights], [p.detach().clone() for p in weights]
    for step in range(2, 9):  # an update at each: always a direction
        scheduler.optimizer.zero_grad()
        F.cross_entropy(scheduler.model(x), y).backward()
        scheduler.step(x, y)
        updates = [scheduler.optimizer.get_param_update(p).clone() for p in weights]
        scheduler.optimizer.step()
        rate = scheduler.get_last_lr()[0]
        total += step**power * rate**rate_power
        for i, update in enumerate(updates):
            ahead[i] -= rate / (1 - b) * update
            mean[i] += step**power * rate**rate_power / total * (ahead[i] - mean[i])
            torch.testing.assert_close(weights[i].detach(), (1 - b) * ahead[i] + b * mean[i], rtol=1e-10, atol=1e-10)
    with scheduler.averaged():
        for p, m in zip(scheduler.model.parameters(), mean, strict=True):
            torch.testing.assert_close(p, m, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("make", "name", "before", "during"),
    [
        (partial(torch.optim.SGD, momentum=0.9, nesterov=True), "momentum", 0.9, 0.0),
        (torch.optim.Adam, "betas", (0.9, 0.999), (0.0, 0.999)),
        (torch.optim.AdamW, "betas", (0.9, 0.999), (0.0, 0.999)),
    ],
    ids=["SGD", "Adam", "AdamW"],
)
def test_averages_take_the_momentum_over(
    make: Any, name: str, before: Any, during: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "gen_dist")
    model, x, y = nn.Linear(4, 3).double(), torch.randn(16, 4).double(), torch.randint(0, 3, (16,))
    optimizer = gen.as_gen_optimizer(make(model.parameters(), lr=0.1))
    scheduler = gen.AutoGen(optimizer, model, F.cross_entropy)
    assert optimizer.param_groups[0][name] == during, "from the start: a checkpoint may be loaded now"
    steps(scheduler, x, y, 3)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})  # late, without gradients
    steps(scheduler, x, y, 3)
    assert [group[name] for group in optimizer.param_groups] == [during] * 2
    assert sum("take over the momentum" in message for message in caplog.messages) == 1
    saved = copy.deepcopy(optimizer.state_dict())
    gen.give_momentum_back(optimizer)
    assert [group[name] for group in optimizer.param_groups] == [before] * 2
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0][name] == during
    gen.give_momentum_back(optimizer)
    assert [group[name] for group in optimizer.param_groups] == [before] * 2


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.RMSprop])
def test_a_momentum_that_is_kept_or_cannot_be_taken_gets_other_averages(make: Any) -> None:
    model = nn.Linear(4, 3)
    optimizer = gen.as_gen_optimizer(make(model.parameters(), lr=0.1, momentum=0.9))
    momentum = "optimizer" if make is torch.optim.SGD else "averages"
    scheduler = gen.AutoGen(optimizer, model, F.cross_entropy, momentum=momentum)
    steps(scheduler, torch.randn(16, 4), torch.randint(0, 3, (16,)), 3)
    assert optimizer.param_groups[0]["momentum"] == 0.9
    assert scheduler.average is not None
    assert scheduler.average.averaging == Averaging()
    with pytest.raises(ValueError, match="'averages' or 'optimizer', got 'none'"):
        gen.AutoGen(optimizer, model, momentum="none")


def test_training_weights_come_back_after_an_error() -> None:
    scheduler, x, y = small_problem()
    steps(scheduler, x, y, 5)
    before = copy.deepcopy(scheduler.model.state_dict())
    with pytest.raises(OSError, match="disk"), scheduler.averaged([x]):
        raise OSError("disk")
    assert all(torch.equal(v, before[k]) for k, v in scheduler.model.state_dict().items())


def test_looking_at_the_average_does_not_change_training() -> None:
    one, x, y = small_problem()
    two, _, _ = small_problem()
    steps(one, x, y, 10)
    for _ in range(10):
        steps(two, x, y, 1)
        with two.averaged([x]):
            two.model(x)
    assert all(torch.equal(p, q) for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True))


def test_batch_norm_statistics_are_made_anew_for_the_average() -> None:
    scheduler, x, y = small_problem()
    steps(scheduler, x, y, 8)
    with scheduler.averaged([x]):
        features = scheduler.model[0](x)
        torch.testing.assert_close(scheduler.model[1].running_mean, features.mean(0).detach())
        torch.testing.assert_close(scheduler.model[1].running_var, features.var(0).detach())


def test_the_average_is_in_the_checkpoint_and_can_be_exported() -> None:
    scheduler, x, y = small_problem()
    steps(scheduler, x, y, 7)
    file = io.BytesIO()
    torch.save([scheduler.state_dict(), scheduler.model.state_dict(), scheduler.optimizer.state_dict()], file)
    file.seek(0)
    state, weights, optimizer_state = torch.load(file, weights_only=True)
    fresh, _, _ = small_problem()
    fresh.load_state_dict(state)
    fresh.model.load_state_dict(weights)
    fresh.optimizer.load_state_dict(optimizer_state)
    for one, two in zip(steps(scheduler, x, y, 6), steps(fresh, x, y, 6), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(one, two, strict=True))
    one, two = scheduler.averaged_state_dict(), fresh.averaged_state_dict()
    assert one.keys() == scheduler.model.state_dict().keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_before_the_first_step_the_average_is_the_weights_themselves() -> None:
    """Many scripts evaluate before they train."""
    scheduler, _, _ = small_problem()
    weights = {name: value.clone() for name, value in scheduler.model.state_dict().items()}
    averaged = scheduler.averaged_state_dict()
    assert averaged.keys() == weights.keys()
    assert all(torch.equal(averaged[name], weights[name]) for name in weights)


def test_batches_for_the_average_go_one_at_a_time() -> None:
    """They may be the data loader of a data set that does not fit into memory."""
    scheduler, x, y = small_problem()
    alive: list[weakref.ref[Tensor]] = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(5):
            batch = x.clone()
            alive.append(weakref.ref(batch))
            yield batch, y
            del batch
            assert sum(each() is not None for each in alive) <= 2, "this one and the first"

    with scheduler.averaged(batches()):
        assert len(alive) == 5


def test_averages_that_are_not_there_say_so() -> None:
    scheduler, _, _ = small_problem()
    plain = gen.ExactGen(scheduler.optimizer, scheduler.model)
    with pytest.raises(ValueError, match="average=True"), plain.averaged():
        pass


def test_a_scheduler_with_averages_goes_as_soon_as_nobody_holds_it() -> None:
    """A cycle would keep a DDP model beyond its process group, and processes have aborted at their end for it."""
    scheduler, x, y = small_problem()
    steps(scheduler, x, y, 3)
    there = weakref.ref(scheduler)
    gc.disable()
    try:
        del scheduler
        assert there() is None
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------- uncertainty from ranks


def errors(kind: str) -> tuple[float | None, float | None]:
    model = parallel(new_model(), kind)
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=1e-2)
    scheduler = gen.ExactGen(optimizer, model, criterion)
    x, y = data()[0]
    here = slice_here()
    criterion(model(x[here]), y[here]).backward()
    scheduler.step(x[here], y[here])
    assert scheduler.last is not None
    return scheduler.last.numerator_error, scheduler.last.denominator_error


@pytest.mark.parametrize("kind", KINDS)
def test_standard_errors_come_from_how_the_slices_differ(pool: Callable[[int], Pool], kind: str) -> None:
    model: Model = new_model()
    x, y = data()[0]
    criterion(model(x), y).backward()
    weights = [*model.parameters()]
    d = [p.grad.clone() for p in weights if p.grad is not None]
    parts = [
        reference.derivatives(lambda a=a, b=b: criterion(model(a), b), weights, d)[1:]
        for a, b in zip(x.chunk(4), y.chunk(4), strict=True)
    ]
    expected: Any = torch.tensor(parts, dtype=torch.float64).std(0).div(2).tolist()  # a mean of four
    for seen in pool(4).run(errors, kind):
        assert seen == pytest.approx(expected, rel=1e-8)
    assert pool(1).run(errors, kind) == [(None, None)]


# ------------------------------------------------------------------------------------------- starts and clamps


def from_zero_weights(lr: float) -> tuple[list[float], list[str], float, float]:
    """Rates, reasons, and the first and the last loss of logistic regression that starts at zero weights."""
    torch.manual_seed(3)
    model = nn.Linear(6, 3).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=lr)
    scheduler = gen.AutoGen(optimizer, model, F.cross_entropy)
    x = torch.randn(64, 6).double()
    y = (x @ torch.randn(6, 3).double()).argmax(1)
    rates, reasons, losses = [], [], []
    for _ in range(200):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        scheduler.step(x, y)
        optimizer.step()
        rates += scheduler.get_last_lr()
        losses.append(loss.item())
        assert scheduler.last is not None
        reasons.append(scheduler.last.reason)
    return rates, reasons, losses[0], losses[-1]


def test_weights_that_are_zero_train_whatever_the_initial_rate_was() -> None:
    rates, reasons, first, last = from_zero_weights(1e-6)
    assert from_zero_weights(10.0)[0] == rates
    assert "not finite" not in reasons
    assert last < 0.5 * first


@pytest.mark.parametrize("lr", [0.3, 1e-9])
def test_a_first_measurement_that_is_not_finite_keeps_the_rate_inside_the_clamp(lr: float) -> None:
    model = nn.Linear(3, 1)
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=lr)
    scheduler = gen.AutoGen(optimizer, model, F.mse_loss, lr_min=1e-3, lr_max=0.1)
    x, y = torch.ones(4, 3), torch.zeros(4, 1)
    F.mse_loss(model(x), y).backward()
    x[0, 0] = torch.inf  # of the measurement alone: gradients are finite
    scheduler.step(x, y)
    assert scheduler.last is not None
    assert scheduler.last.reason == "not finite"
    assert optimizer.param_groups[0]["lr"] == scheduler.last.lr == min(max(lr, 1e-3), 0.1)
