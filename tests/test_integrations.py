"""Every trainer sets the rates of the plain loop: on ranks, with accumulation, clipping, bfloat16 and checkpoints."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import integration_trainers as trainers
import pytest
import torch
from integration_trainers import STEPS, Rates, Setting
from problems import criterion, data, new_model, whole
from rank_pool import Pool
from torch import Tensor

import gen_dist as gen
from gen_dist import GenOptimizer
from gen_dist.integrations.at_step import RateAtStep
from gen_dist.integrations.joint import JointOptimizer

PACKAGES = {
    "accelerate": ["accelerate"],
    "fabric": ["lightning"],
    "lightning": ["lightning"],
    "transformers": ["transformers", "accelerate"],
    "torchtitan_container": ["torchtitan"],
    "torchtitan": ["torchtitan", "triton"],  # without triton its trainer cannot be imported
}


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {' and '.join(missing)}")


TRAINERS = [pytest.param(name, marks=needs(*packages)) for name, packages in PACKAGES.items()]
IN_BFLOAT16 = [trainer for trainer in TRAINERS if "torchtitan" not in str(trainer.values[0])]
pytestmark = [pytest.mark.timeout(90), pytest.mark.filterwarnings("ignore")]
Pools = Callable[[int], Pool]


def train(name: str, setting: Setting) -> Rates:
    with trainers.launched():
        return getattr(trainers, name)(setting)


def on_ranks(pool: Pools, ranks: int, name: str, setting: Setting) -> list[Rates]:
    """The rates of every rank."""
    return [train(name, setting)] if ranks == 1 else pool(ranks).run(train, name, setting)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", TRAINERS)
def test_rates_are_those_of_the_plain_loop(pool: Pools, name: str, ranks: int, accumulate: int) -> None:
    for rates in on_ranks(pool, ranks, name, Setting(accumulate)):
        assert rates == pytest.approx(trainers.plain(), rel=1e-10)


@needs("accelerate")
@pytest.mark.parametrize("ranks", [1, 2])
def test_accelerate_with_accumulation_by_hand(pool: Pools, ranks: int) -> None:
    for rates in on_ranks(pool, ranks, "accelerate_by_hand", Setting(2)):
        assert rates == pytest.approx(trainers.plain(), rel=1e-10)


@pytest.mark.parametrize("name", IN_BFLOAT16)
def test_bfloat16(name: str) -> None:
    assert train(name, Setting(bfloat16=True)) == pytest.approx(trainers.plain(bfloat16=True), rel=1e-6)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", TRAINERS)
def test_a_run_that_was_cut_goes_on_with_the_same_rates(pool: Pools, name: str, ranks: int, tmp_path: Path) -> None:
    first = on_ranks(pool, ranks, name, Setting(2, directory=str(tmp_path), steps=3))
    second = on_ranks(pool, ranks, name, Setting(2, directory=str(tmp_path), resume=True))
    for before, after in zip(first, second, strict=True):
        assert before + after == pytest.approx(trainers.plain(), rel=1e-10)
        assert len(after) == STEPS - 3


@needs("transformers", "accelerate")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_model_of_transformers_that_counts_its_tokens(pool: Pools, ranks: int, accumulate: int) -> None:
    for rates in on_ranks(pool, ranks, "language_model", Setting(accumulate)):
        assert rates == pytest.approx(trainers.plain_language_model(), rel=1e-4)  # it takes its loss in float32


@needs("transformers", "accelerate")
@pytest.mark.parametrize("overflow", [set(), {0}, {1}, {2}, {1, 2, 4}])
def test_transformers_takes_the_batches_away_of_a_step_that_the_scaler_leaves_out(
    overflow: set[int], tmp_path: Path
) -> None:
    """Also where an epoch ends in the middle of an accumulation."""
    with trainers.launched():
        told, true = trainers.transformers_with_overflows(overflow, str(tmp_path))
    assert [count for count, _ in true] == [count for i, count in enumerate([2, 2, 1] * 2) if i not in overflow]
    assert told == [(count, pytest.approx(loss, rel=1e-10)) for count, loss in true]


@pytest.mark.parametrize("name", [p for p in TRAINERS if p.values[0] in ("lightning", "transformers")])
def test_by_default_the_number_of_steps_is_the_horizon(name: str) -> None:
    rates = train(name, Setting(default=True))  # it looks at the end of the run
    assert all(rate > 0 for rate in rates)


@needs("torchtitan", "triton")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_chunked_loss_of_torchtitan(accumulate: int) -> None:
    """Chunks that are cut off from the graph, and have a backward pass each, would give another slope."""
    rates = train("torchtitan_chunked", Setting(accumulate))
    assert rates == pytest.approx(trainers.plain(), rel=1e-4)  # it sums gradients in float32


# ------------------------------------------------------------------------------------------ what they share


def problem(**arguments: bool) -> tuple[RateAtStep, Callable[[], Tensor]]:
    """A trainer's scheduler and a loss."""
    x, y = data()[0]
    model = new_model()
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), lr=1e-3, **arguments)
    return RateAtStep(gen.ExactGen(optimizer, model)), lambda: criterion(model(x), y)


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_unscaled_when_the_rate_is_set(fused: bool) -> None:
    """The scaler unscales them in its `step`, and a fused optimizer does it by itself."""
    rates = []
    for scale in (1.0, 1024.0):
        rate, loss = problem(fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(loss()).backward()
        rate.batches.append(loss)
        scaler.step(rate.scheduler.optimizer)
        rates += rate.get_last_lr()
        assert rate.scheduler.last is not None
        assert rate.scheduler.last.numerator > 0
    assert rates[0] == pytest.approx(rates[1], rel=1e-12)


def test_a_closure_makes_the_gradients_first() -> None:
    rate, loss = problem()
    rate.batches.append(loss)
    rate.scheduler.optimizer.step(lambda: loss().backward())
    by_closure = rate.get_last_lr()
    rate, loss = problem()
    loss().backward()
    rate.batches.append(loss)
    rate.scheduler.optimizer.step()
    assert by_closure == rate.get_last_lr()


def test_a_step_without_batches_is_the_optimizers_own() -> None:
    rate, loss = problem()
    loss().backward()
    rate.scheduler.optimizer.step()
    assert rate.scheduler.last is None
    assert rate.get_last_lr() == [1e-3]


def test_detached_it_is_the_optimizers_own() -> None:
    rate, loss = problem()
    rate.detach()
    loss().backward()
    rate.batches.append(loss)
    rate.scheduler.optimizer.step()
    assert rate.scheduler.last is None


def test_a_state_waits_for_its_scheduler() -> None:
    rate, loss = problem()
    loss().backward()
    rate.batches.append(loss)
    rate.scheduler.optimizer.step()
    late = RateAtStep()
    late.load_state_dict(rate.state_dict())
    assert late.state_dict() == rate.state_dict()
    late.attach(problem()[0].scheduler)
    assert late.scheduler.last == rate.scheduler.last


def test_without_a_scheduler_it_says_so() -> None:
    with pytest.raises(RuntimeError, match="when training starts"):
        _ = RateAtStep().scheduler


def test_several_optimizers_are_one() -> None:
    """Their joint rate equals that of one optimizer with a group for each of them."""
    seen = []
    for joint in (True, False):
        x, y = data()[0]
        model = new_model()
        parts = [list(model.blocks.parameters()), list(model.embedding.parameters())]
        if joint:
            optimizer: GenOptimizer = JointOptimizer(
                torch.optim.AdamW(part, lr=lr) for part, lr in zip(parts, (1e-3, 5e-4), strict=True)
            )
        else:
            groups = [{"params": part, "lr": lr} for part, lr in zip(parts, (1e-3, 5e-4), strict=True)]
            optimizer = gen.make_gen_optimizer(torch.optim.AdamW, groups)
        scheduler = gen.ExactGen(optimizer, model, criterion)
        for _ in range(3):
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            scheduler.step(x, y)
            optimizer.step()
            seen.append((scheduler.last, scheduler.get_last_lr()))
    assert seen[:3] == seen[3:]


def torchtitan_averages(folder: str) -> list[dict[str, Tensor]]:
    """The averaged weights after four steps in one go, and resumed after two."""
    from torch.distributed.checkpoint import load, save

    from gen_dist.integrations.torchtitan import GenSchedulers

    x, y = data()[0]
    ends = []
    for resume in (False, True):
        model = trainers.sharded(new_model())
        optimizers = trainers.optimizers_container([model])
        schedulers = GenSchedulers(optimizers, [model], gen.AutoGen)
        state = {"model": model, "optimizer": optimizers, "lr_scheduler": schedulers}
        if resume:
            load(state, checkpoint_id=folder)
        for step in range(schedulers.scheduler.last_epoch, 4):
            optimizers.zero_grad()
            criterion(model(x), y).backward()
            schedulers.batches.append(partial(lambda model: criterion(model(x), y), model))
            optimizers.step()
            schedulers.step()
            if step == 1:
                save(state, checkpoint_id=folder)
        averages = schedulers.scheduler.averaged_state_dict()
        ends.append({name: whole(average) for name, average in averages.items()})
    return ends


@needs("torchtitan")
@pytest.mark.parametrize("ranks", [1, 2])
def test_torchtitan_checkpoints_averaged_weights(pool: Pools, ranks: int, tmp_path: Path) -> None:
    for in_one_go, resumed in pool(ranks).run(torchtitan_averages, str(tmp_path)):
        for name, average in in_one_go.items():
            torch.testing.assert_close(resumed[name], average, rtol=1e-12, atol=0)


# -------------------------------------------------------------------------------------------- wrong calls


@needs("lightning")
def test_a_wrapped_optimizer_is_refused() -> None:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(inner := new_model(), gen.make_gen_optimizer(torch.optim.SGD, inner.parameters()))
    with pytest.raises(TypeError, match=r"optimizer\.optimizer"):
        RateAtStep(gen.ExactGen(optimizer, model))


def averaged_shards() -> list[float]:
    """Two steps, a checkpoint as rank 0 saves it, a step after it is loaded on each rank; the largest differences."""
    model = trainers.sharded(new_model())
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters())
    scheduler = gen.AutoGen(optimizer, model, criterion)
    at_step = RateAtStep(scheduler)
    x, y = data()[0]
    for step in range(3):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        at_step.batches.append(lambda: criterion(model(x), y))
        optimizer.step()
        if step == 1:
            saved = [at_step.state_dict()]
            torch.distributed.broadcast_object_list(saved)
            at_step.load_state_dict(saved[0])
            assert scheduler.average is not None
            assert scheduler.average.count == 0
    before = [p.full_tensor().clone() for p in model.parameters()]
    with scheduler.averaged():
        pairs = zip(before, model.parameters(), strict=True)
        return [(weight - p.full_tensor()).abs().max().item() for weight, p in pairs]


def test_averages_in_shards_begin_anew_after_a_trainers_checkpoint(pool: Pools) -> None:
    """It is saved on one rank, which has only a part of them."""
    for differences in pool(2).run(averaged_shards):
        assert differences
        assert max(differences) == 0


@pytest.mark.parametrize(
    ("module", "package"),
    [("accelerate", "accelerate"), ("lightning", "lightning.pytorch"), ("transformers", "transformers")],
)
def test_a_missing_package_is_named(module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"gen_dist.integrations.{module}", raising=False)
    with pytest.raises(ImportError, match="pip install"):
        importlib.import_module(f"gen_dist.integrations.{module}")


def test_the_library_needs_none_of_them() -> None:
    program = (
        "import sys, gen_dist, gen_dist.integrations.torchtitan; "
        "print({'accelerate', 'lightning', 'transformers', 'torchtitan'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"
