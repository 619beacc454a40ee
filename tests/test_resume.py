"""A run that is cut and resumed equals the uncut run: bitwise on as many ranks, within rounding on other numbers."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from problems import KINDS, criterion, data, new_model, parallel, whole
from rank_pool import Pool
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful

import gen_dist as gen

STEPS = 40
CUT_STEPS = 24  # of runs that are resumed again and again
DATA = data(STEPS, batch=12, seed=3)  # for 1, 2, 3 and 4 ranks
SCHEDULERS: dict[str, Callable[..., gen.GenScheduler]] = {
    "exact": lambda *given: gen.ExactGen(*given, update_every=2),
    "approx": gen.ApproxGen,
    "auto": lambda *given: gen.AutoGen(*given, update_every=3),
    "verified": lambda *given: gen.AutoGen(*given, update_every=3, companions=[gen.Verification()]),
}
OPTIMIZERS = {
    "adamw": lambda groups: gen.make_gen_optimizer(torch.optim.AdamW, groups, lr=1e-3, weight_decay=0.1),
    "sgd": lambda groups: gen.make_gen_optimizer(torch.optim.SGD, groups, lr=1e-3, momentum=0.9),
}


class Training(Stateful):
    """A model, its optimizer with two groups, and its scheduler, as one `Stateful` object, as PyTorch shows it."""

    def __init__(self, kind: str, name: str, optimizer: str = "adamw") -> None:
        self.inner = new_model()
        self.model = parallel(self.inner, kind)
        weights = [*self.model.parameters()]
        groups = [{"params": [p for p in weights if (p.ndim > 1) is large]} for large in (True, False)]
        self.optimizer = OPTIMIZERS[optimizer](groups)
        self.scheduler = SCHEDULERS[name](self.optimizer, self.model, criterion)
        self.rates: list[float] = []

    def begin_step(self, step: int) -> None:
        ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        x, y = (t.chunk(ranks)[rank] for t in DATA[step])
        self.optimizer.zero_grad()
        criterion(self.model(x), y).backward()
        self.scheduler.step(x, y)
        self.rates.append(self.scheduler.get_last_lr()[0])

    def train(self, steps: Iterable[int]) -> None:
        for step in steps:
            self.begin_step(step)
            self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optimizer"],
        )
        self.scheduler.load_state_dict(state_dict["scheduler"])

    def to_bytes(self) -> bytes:
        file = io.BytesIO()
        parts: list[Any] = [self.model, self.optimizer, self.scheduler]
        torch.save([part.state_dict() for part in parts], file)
        return file.getvalue()

    def from_bytes(self, content: bytes) -> None:
        parts: list[Any] = [self.model, self.optimizer, self.scheduler]
        for part, state in zip(parts, torch.load(io.BytesIO(content), weights_only=True), strict=True):
            part.load_state_dict(state)

    def result(self) -> Result:
        averages: list[Tensor] = []
        if self.scheduler.average is not None:
            with self.scheduler.averaged():
                averages = [whole(p) for p in self.inner.parameters()]
        return Result(self.rates, [whole(p) for p in self.inner.parameters()], averages)


class Result(NamedTuple):
    """The rates step by step, the final weights and the final averages."""

    rates: list[float]
    weights: list[Tensor]
    averages: list[Tensor]

    def is_end_of(self, run: Result) -> bool:
        """Whether both are equal, bit for bit."""
        mine, others = [*self.weights, *self.averages], [*run.weights, *run.averages]
        same = all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))
        return same and self.rates == run.rates[len(run.rates) - len(self.rates) :]


@pytest.fixture(autouse=True)
def _quiet() -> Iterable[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


# --------------------------------------------------------------------------------- on as many ranks: bitwise


def cut_and_resumed(kind: str, name: str, optimizer: str, cuts: list[int]) -> list[str]:
    """Which runs, resumed at a cut or within the step after it, differ from the uncut run."""
    uncut = Training(kind, name, optimizer)
    after, within = {0: uncut.to_bytes()}, {}
    for step in range(CUT_STEPS):
        uncut.begin_step(step)
        if step in cuts and uncut.optimizer.direction is not None:  # otherwise gradients are lost, as ever
            within[step] = uncut.to_bytes()
        uncut.optimizer.step()
        after[step + 1] = uncut.to_bytes() if step + 1 in cuts else b""
    expected, different = uncut.result(), []
    for cut in cuts:
        for content, where in ((after[cut], "after optimizer.step"), (within.get(cut), "with a held direction")):
            if content is None:
                continue
            resumed = Training(kind, name, optimizer)
            resumed.from_bytes(content)
            if where == "with a held direction":
                resumed.optimizer.step()
            resumed.train(range(cut + (where == "with a held direction"), CUT_STEPS))
            if not resumed.result().is_end_of(expected):
                different.append(f"{where}, step {cut}")
    return different


@pytest.mark.parametrize("name", SCHEDULERS)
def test_cut_at_any_step_of_one_process(name: str) -> None:
    assert cut_and_resumed("alone", name, "adamw", [*range(8), *range(10, CUT_STEPS + 1, 7)]) == []


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("kind", KINDS)
def test_cut_on_two_ranks(pool: Callable[[int], Pool], kind: str, name: str) -> None:
    assert pool(2).run(cut_and_resumed, kind, name, "adamw", [12, 21]) == [[], []]


@pytest.mark.parametrize("kind", KINDS)
def test_cut_with_momentum(pool: Callable[[int], Pool], kind: str) -> None:
    assert pool(2).run(cut_and_resumed, kind, "auto", "sgd", [12]) == [[], []]


def test_a_skipped_step_stays_skipped() -> None:
    """A gradient that is not finite moves nothing, even if the run is resumed before `optimizer.step()`."""
    run, resumed = Training("alone", "exact"), Training("alone", "exact")
    run.train(range(3))
    run.optimizer.skip_step()
    resumed.from_bytes(run.to_bytes())
    for p in resumed.model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    resumed.optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(resumed.result().weights, run.result().weights, strict=True))


def test_loading_drops_a_direction_that_is_of_no_use_any_more() -> None:
    run = Training("alone", "exact")
    run.train(range(2))
    saved = run.to_bytes()
    run.begin_step(2)
    run.from_bytes(saved)
    assert run.optimizer.direction is None


def test_a_direction_left_out_of_the_checkpoint_is_missed(caplog: pytest.LogCaptureFixture) -> None:
    run, fresh = Training("alone", "auto"), Training("alone", "auto")
    run.begin_step(0)
    with caplog.at_level(logging.WARNING, logger="gen_dist"):
        fresh.scheduler.load_state_dict(run.scheduler.state_dict())
    assert "between scheduler.step() and optimizer.step()" in caplog.text


# ------------------------------------------------------------------------------ torch.distributed.checkpoint


def saved_while_training(kind: str, name: str, how: str, folder: str) -> list[bool]:
    """Whether a run that saves a checkpoint, and a run that resumes from it, equal a run without checkpoints."""
    plain, saved, resumed = Training(kind, name), Training(kind, name), Training(kind, name)
    plain.train(range(24))
    saved.train(range(13))
    if how == "async":  # training goes on while it writes, so it gets a group of its own
        group = dist.new_group(backend="gloo")
        writing: Any = dcp.async_save({"app": saved}, checkpoint_id=folder, process_group=group)
        saved.train(range(13, 24))
        writing.result()
    else:
        dcp.save({"app": saved}, checkpoint_id=folder)
        saved.train(range(13, 24))
    dcp.load({"app": resumed}, checkpoint_id=folder)
    resumed.train(range(13, 24))
    expected = plain.result()
    return [saved.result().is_end_of(expected), resumed.result().is_end_of(expected)]


@pytest.mark.parametrize(("how", "name"), [("sync", "auto"), ("async", "verified")])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_of_an_application(
    pool: Callable[[int], Pool], tmp_path: Path, kind: str, how: str, name: str
) -> None:
    for same in pool(2).run(saved_while_training, kind, name, how, str(tmp_path / "saved")):
        assert same == [True, True]


def part_by_part(folder: str) -> bool:
    """The scheduler is `Stateful` by itself, next to the dictionaries of the model and of the optimizer."""
    run, resumed = Training("fsdp2", "auto"), Training("fsdp2", "auto")

    def parts(training: Training) -> dict[str, Any]:
        model = get_model_state_dict(training.model)
        optimizer = get_optimizer_state_dict(training.model, training.optimizer)
        return {"model": model, "optimizer": optimizer, "scheduler": training.scheduler}

    run.train(range(10))
    assert isinstance(run.scheduler, Stateful)
    dcp.save(parts(run), checkpoint_id=folder)
    into = parts(resumed)
    dcp.load(into, checkpoint_id=folder)
    set_state_dict(resumed.model, resumed.optimizer, model_state_dict=into["model"], optim_state_dict=into["optimizer"])
    run.train(range(10, 20))
    resumed.train(range(10, 20))
    return resumed.result().is_end_of(run.result())


def test_the_scheduler_by_itself(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    assert pool(2).run(part_by_part, str(tmp_path)) == [True, True]


def with_a_held_direction(kind: str, folder: str) -> bool:
    run, resumed = Training(kind, "auto"), Training(kind, "auto")
    run.train(range(6))
    run.begin_step(6)
    dcp.save({"app": run}, checkpoint_id=folder)
    resumed.begin_step(0)  # holds a direction, any, for the loaded one to take its place
    dcp.load({"app": resumed}, checkpoint_id=folder)
    resumed.rates.clear()
    for each in (run, resumed):
        each.optimizer.step()
        each.train(range(7, 15))
    return resumed.result().is_end_of(run.result())


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_with_a_held_direction(pool: Callable[[int], Pool], tmp_path: Path, kind: str) -> None:
    assert pool(2).run(with_a_held_direction, kind, str(tmp_path)) == [True, True]


def save_average(folder: str, steps: int) -> list[Tensor]:
    run = Training("fsdp2", "auto")
    run.train(range(steps))
    dcp.save({"scheduler": run.scheduler}, checkpoint_id=folder)
    return [whole(average) for average in run.scheduler.state_dict()["average"]["average"]]


def test_averages_are_saved_in_shards(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    averages = pool(2).run(save_average, str(tmp_path), 4)[0]
    saved: dict[str, Any] = {**dcp.FileSystemReader(tmp_path).read_metadata().state_dict_metadata}
    entries = [saved[f"scheduler.average.average.{i}"] for i in range(len(averages))]
    assert [entry.size for entry in entries] == [average.shape for average in averages]
    assert [len(entry.chunks) for entry in entries] == [2] * len(averages)


def test_averages_load_on_another_number_of_ranks(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    expected = pool(2).run(save_average, str(tmp_path), 4)[0]
    fresh = Training("alone", "auto")  # has not begun its averages
    dcp.load({"scheduler": fresh.scheduler}, checkpoint_id=tmp_path)
    assert all(a.abs().max() > 0 for a in expected)
    for loaded, average in zip(fresh.scheduler.state_dict()["average"]["average"], expected, strict=True):
        assert torch.equal(loaded, average)


def test_averages_that_had_not_begun_have_not_begun(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    pool(2).run(save_average, str(tmp_path), 0)
    fresh = Training("alone", "auto")
    weights = [p.detach().clone() for p in fresh.inner.parameters()]
    dcp.load({"scheduler": fresh.scheduler}, checkpoint_id=tmp_path)
    assert all(torch.equal(a, w) for a, w in zip(fresh.result().averages, weights, strict=True))


def averages_of_fsdp1(folder: str, kind: str) -> bool:
    """The shards of FSDP1 are plain tensors. A checkpoint must not take those of one rank for those of all ranks."""
    schedulers = []
    for _ in range(2):
        model = parallel(new_model(), kind)
        optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), lr=1e-3)
        schedulers.append(gen.AutoGen(optimizer, model, criterion, curvature="forward"))
    run, resumed = schedulers
    for x, y in DATA[:3]:
        run.optimizer.zero_grad()
        criterion(run.model(x), y).backward()
        run.step(x, y)
        run.optimizer.step()
    dcp.save({"scheduler": run}, checkpoint_id=folder)
    dcp.load({"scheduler": resumed}, checkpoint_id=folder)
    assert run.average is not None
    assert resumed.average is not None
    return all(torch.equal(a, b) for a, b in zip(resumed.average.average, run.average.average, strict=True))


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp1 flat"])
def test_averages_of_fsdp1(pool: Callable[[int], Pool], tmp_path: Path, kind: str) -> None:
    assert pool(2).run(averages_of_fsdp1, str(tmp_path), kind) == [True, True]


def loaded_of_each_rank(kind: str) -> list[str]:
    """What becomes of the scheduler's state of each rank, saved by `torch.save`, on this rank."""
    model = parallel(new_model(), kind)
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), lr=1e-3)
    scheduler = gen.AutoGen(optimizer, model, criterion, curvature="forward")
    for x, y in DATA[:3]:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        scheduler.step(x, y)
        optimizer.step()
    file = io.BytesIO()
    torch.save(scheduler.state_dict(), file)
    files: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(files, file.getvalue())
    assert scheduler.average is not None
    before, found = [average.clone() for average in scheduler.average.average], []
    for content in files:
        try:
            scheduler.load_state_dict(torch.load(io.BytesIO(content), weights_only=True))
            found.append("loaded")
        except ValueError as error:
            found.append("refused" if "torch.distributed.checkpoint" in str(error) else str(error))
        assert all(torch.equal(a, b) for a, b in zip(before, scheduler.average.average, strict=True))
    return found


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1", "fsdp1 flat"])
def test_the_part_of_another_rank_is_refused(pool: Callable[[int], Pool], kind: str) -> None:
    assert pool(2).run(loaded_of_each_rank, kind) == [["loaded", "refused"], ["refused", "loaded"]]


def test_the_state_of_rank_0_serves_all_ranks_of_ddp(pool: Callable[[int], Pool]) -> None:
    assert pool(2).run(loaded_of_each_rank, "ddp") == [["loaded", "loaded"]] * 2


def whole_state_refused() -> bool:
    alone = Training("alone", "auto")
    alone.train(range(2))
    with pytest.raises(ValueError, match=r"has shape.*torch\.distributed\.checkpoint"):
        Training("fsdp2", "auto").scheduler.load_state_dict(alone.scheduler.state_dict())
    return True


def test_whole_averages_are_no_shards(pool: Callable[[int], Pool]) -> None:
    assert pool(2).run(whole_state_refused) == [True, True]


# ---------------------------------------------------------------------------- on another number of ranks

LEGS = [("fsdp2", 4), ("fsdp2", 2), ("fsdp2", 3), ("ddp", 2), ("replica", 3), ("alone", 1)]
LONG, SHORT = [0, 8, 15, 21, 28, 34, STEPS], [0, 4, 7, 10, 13, 16, 18]
# The raw rule multiplies rounding errors at every step, cut or not, and finite differences begin with larger ones.
ENDS = {"exact": SHORT, "approx": SHORT, "auto": LONG, "verified": LONG}
TOLERANCE = {"exact": 1e-10, "approx": 1e-8, "auto": 1e-10, "verified": 1e-10}


def leg(kind: str, name: str, folder: str, number: int) -> Result:
    """Train one part of a run, from the checkpoint of the part before."""
    run = Training(kind, name)
    if number:
        dcp.load({"app": run}, checkpoint_id=f"{folder}/{number - 1}")
    run.train(range(*ENDS[name][number : number + 2]))
    dcp.save({"app": run}, checkpoint_id=f"{folder}/{number}")
    return run.result()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_one_run_on_ever_other_ranks(pool: Callable[[int], Pool], tmp_path: Path, name: str) -> None:
    """Four shards, two, three, two ranks in DDP, three replicas, one process: the result is that of one process."""
    uncut = Training("alone", name)
    uncut.train(range(ENDS[name][-1]))
    expected = uncut.result()
    for number, (kind, ranks) in enumerate(LEGS):
        here = (kind, name, str(tmp_path), number)
        results = pool(ranks).run(leg, *here) if kind != "alone" else [leg(*here)]
        first, last = ENDS[name][number : number + 2]
        for result in results:
            assert result.rates == results[0].rates, "rates must be bitwise equal on all ranks"
            assert result.rates == pytest.approx(expected.rates[first:last], rel=TOLERANCE[name])
    for seen, there in zip(result.weights + result.averages, expected.weights + expected.averages, strict=True):
        torch.testing.assert_close(seen, there, rtol=TOLERANCE[name], atol=TOLERANCE[name])
