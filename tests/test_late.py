"""What comes later: copies of a run that go on as it does, and parameter groups that come after the start."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gen_dist as gen

criterion = nn.MSELoss()
SCHEDULERS: dict[str, Callable[..., gen.GenScheduler]] = {
    "exact": lambda *given: gen.ExactGen(*given, lr_max=0.1),
    "forward": gen.ApproxGen,
    "auto": gen.AutoGen,
    "auto-forward": lambda *given: gen.AutoGen(*given, curvature="forward"),
    "verified": lambda *given: gen.AutoGen(*given, update_every=2, companions=[gen.Verification()]),
    "noise": lambda *given: gen.AutoGen(*given, companions=[gen.GradientNoise()], total_steps=40),
    "averaged": lambda *given: gen.GenScheduler(*given, lr_max=0.1, average=True),
}
COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda run: pickle.loads(pickle.dumps(run)),
}


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 4, generator=generator), torch.randn(8, 3, generator=generator)


def new_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


Run = tuple[nn.Module, gen.GenOptimizer, gen.GenScheduler]


def new_run(name: str, cls: type[torch.optim.Optimizer] = torch.optim.AdamW) -> Run:
    model = new_model()
    groups = [{"params": [p for p in model.parameters() if (p.ndim > 1) is large]} for large in (True, False)]
    groups[1]["lr"] = 5e-4  # type: ignore[assignment]
    optimizer = gen.make_gen_optimizer(cls, groups, lr=1e-3)
    return model, optimizer, SCHEDULERS[name](optimizer, model, criterion)


def begin_step(run: Run, step: int) -> None:
    model, optimizer, scheduler = run
    optimizer.zero_grad()
    x, y = batch(step)
    criterion(model(x), y).backward()
    scheduler.step(x, y)


def train(run: Run, steps: Iterable[int]) -> Run:
    for step in steps:
        begin_step(run, step)
        run[1].step()
    return run


def contents(run: Run) -> list[torch.Tensor]:
    model, optimizer, scheduler = run
    averages = list(scheduler.averaged_state_dict().values()) if scheduler.average is not None else []
    rates = torch.tensor([float(group["lr"]) for group in optimizer.param_groups], dtype=torch.float64)
    return [rates, *(p.detach().clone() for p in model.parameters()), *averages]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ------------------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_copy_goes_on_as_the_original(name: str, copied: str) -> None:
    run = train(new_run(name), range(5))
    twin = COPIES[copied](run)
    before = contents(run)
    train(twin, range(5, 10))  # which leaves the original alone
    assert same(contents(run), before)
    train(run, range(5, 10))
    assert same(contents(run), contents(twin))


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_holds_the_direction(copied: str) -> None:
    run = train(new_run("averaged"), range(3))
    begin_step(run, 3)
    assert run[1].direction is not None
    twin = COPIES[copied](run)
    for each in (run, twin):
        each[1].step()
        train(each, range(4, 8))
    assert same(contents(run), contents(twin))


def test_a_copy_of_a_copy_in_any_order_and_of_an_optimizer_that_was_converted() -> None:
    model = new_model()
    optimizer = gen.as_gen_optimizer(torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9))
    run = train((model, optimizer, gen.AutoGen(optimizer, model, criterion)), range(4))
    scheduler, model, optimizer = copy.deepcopy(pickle.loads(pickle.dumps((run[2], run[0], run[1]))))
    twin = train((model, optimizer, scheduler), range(4, 9))
    assert same(contents(train(run, range(4, 9))), contents(twin))


def test_a_copy_of_the_scheduler_alone_brings_its_own_model_and_optimizer() -> None:
    run = train(new_run("auto"), range(4))
    scheduler = copy.deepcopy(run[2])
    twin = train((scheduler.model, scheduler.optimizer, scheduler), range(4, 8))
    assert scheduler.model is not run[0]
    assert same(contents(train(run, range(4, 8))), contents(twin))


def test_a_copy_of_the_optimizer_alone_touches_no_averages() -> None:
    run = train(new_run("auto"), range(4))
    begin_step(run, 4)
    before = contents(run)[1:]
    copy.deepcopy(run[1]).step()
    assert same(contents(run)[1:], before)


def test_a_pickle_goes_on_in_another_process(tmp_path: Path) -> None:
    run = train(new_run("auto"), range(4))
    (tmp_path / "run.pickle").write_bytes(pickle.dumps(run))
    program = "import pickle, sys, torch; sys.path.insert(0, sys.argv[2]); import test_late as t; "
    program += "folder = t.Path(sys.argv[1]); "
    program += "run = t.train(pickle.loads((folder / 'run.pickle').read_bytes()), range(4, 8)); "
    program += "torch.save(t.contents(run), folder / 'end.pt')"
    here = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", program, str(tmp_path), here], check=True, timeout=100)
    assert same(contents(train(run, range(4, 8))), torch.load(tmp_path / "end.pt"))


# ------------------------------------------------------------------------------------------ groups that come late


def with_the_first_layer_frozen(**more: Any) -> Run:
    model = new_model()
    model[0].requires_grad_(False)
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model[2].parameters(), lr=1e-3)
    return model, optimizer, gen.AutoGen(optimizer, model, criterion, **more)


def add_the_first_layer(run: Run) -> None:
    model, optimizer, _ = run
    assert isinstance(model, nn.Sequential)
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 2.5e-4})


@pytest.mark.parametrize("more", [{}, {"update_every": 5}], ids=str)
def test_a_group_that_comes_late_is_averaged_and_saved_like_the_others(more: dict[str, Any]) -> None:
    run = train(with_the_first_layer_frozen(**more), range(6))
    add_the_first_layer(run)
    at_once = contents_by_bytes(run)
    train(run, range(6, 10))
    later = contents_by_bytes(run)
    train(run, range(10, 14))
    assert run[2].get_last_lr()[1] == pytest.approx(run[2].get_last_lr()[0] / 4)
    averaged = run[2].averaged_state_dict()
    assert all(not torch.equal(averaged[name], p) for name, p in run[0].named_parameters())
    for content, steps in ((at_once, range(6, 14)), (later, range(10, 14))):
        resumed = with_the_first_layer_frozen(**more)
        add_the_first_layer(resumed)
        for part, state in zip(resumed, torch.load(io.BytesIO(content), weights_only=True), strict=True):
            part.load_state_dict(state)
        assert same(contents(train(resumed, steps)), contents(run))


def contents_by_bytes(run: Run) -> bytes:
    file = io.BytesIO()
    torch.save([part.state_dict() for part in run], file)
    return file.getvalue()


def test_a_group_may_come_after_a_checkpoint_was_loaded() -> None:
    run = train(with_the_first_layer_frozen(), range(5))
    resumed = with_the_first_layer_frozen()
    for part, state in zip(resumed, torch.load(io.BytesIO(contents_by_bytes(run)), weights_only=True), strict=True):
        part.load_state_dict(state)
    for each in (run, resumed):
        add_the_first_layer(each)
        train(each, range(5, 10))
    assert same(contents(resumed), contents(run))


def test_a_late_group_begins_its_average_with_its_own_steps() -> None:
    """Its first average is its first weights; without momentum it is that of a run that began there."""
    model = new_model()
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model[2].parameters(), lr=1e-2)
    scheduler = gen.GenScheduler(optimizer, model, criterion, lr_max=0.1, average=gen.Averaging(power=0, momentum=0))
    run = train((model, optimizer, scheduler), range(5))
    optimizer.add_param_group({"params": list(model[0].parameters())})
    seen = []
    for step in range(5, 9):
        train(run, [step])
        seen.append(model[0].weight.detach().clone())
    averaged = scheduler.averaged_state_dict()["0.weight"]
    torch.testing.assert_close(averaged, torch.stack(seen).mean(0))


def test_a_state_with_more_groups_asks_for_them() -> None:
    run = train(with_the_first_layer_frozen(), range(3))
    add_the_first_layer(run)
    train(run, range(3, 5))
    fresh = with_the_first_layer_frozen()[2]
    with pytest.raises(ValueError, match="add_param_group"):
        fresh.load_state_dict(run[2].state_dict())
    assert fresh.state.step == 0, "a refused state changes nothing"
