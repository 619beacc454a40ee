"""A job that is stopped or killed, or whose checkpoints are damaged, ends like a job without faults."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkpoints
import programs
import pytest
import torch
from rank_pool import Pool
from training_example import TRAIN, trained

KILLED_RUNS = int(os.environ.get("GEN_DIST_KILLED_RUNS", 1))
KILLS = 3  # in each of them
LIMIT = 100  # seconds for a run

Halves = tuple[Path, list[tuple[Any, ...]]]


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What all runs train, on a data set in files: ranks that start over and over would import scikit-learn each time.

    An epoch has 22 steps.
    """
    folder, generator = tmp_path_factory.mktemp("data"), torch.Generator().manual_seed(0)
    centres = torch.randint(0, 256, (10, 8, 8), generator=generator, dtype=torch.uint8)
    for part, size in (("train", 1437), ("t10k", 360)):
        labels = torch.randint(0, 10, (size,), generator=generator, dtype=torch.uint8)
        noise = torch.randint(0, 256, (size, 8, 8), generator=generator, dtype=torch.uint8)
        for kind, values in (("images-idx3", centres[labels.long()] // 4 + noise // 4 * 3), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, values.dim()]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + values.numpy().tobytes()))
    return ["--model", "mlp", "--data", "fashion-mnist", "--data-dir", str(folder), "--batch-size", "64", "--no-plot",
            "--checkpoint-every", "5"]  # fmt: skip


@contextlib.contextmanager
def started(*arguments: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """Start the job on two ranks, in a session of its own; at the end of the block, kill all its processes."""
    command = [*programs.torchrun(2, f"--max-restarts={KILLS}"), str(TRAIN), *arguments]
    with (cwd / "errors.txt").open("w") as errors:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=programs.ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        for pid in [process.pid, *workers_of(process.pid).values()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def run(*arguments: str, cwd: Path) -> str:
    """Run the job in one process; returns what it prints."""
    done = programs.run(TRAIN, *arguments, cwd=cwd, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def workers_of(launcher: int) -> dict[int, int]:
    """The ranks that torchrun started, and their process ids."""
    found = {}
    with contextlib.suppress(OSError):
        for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            ranks = [entry[5:] for entry in environment if entry.startswith(b"RANK=")]
            found |= {int(rank): int(pid) for rank in ranks}
    return found


def trace(folder: Path) -> list[tuple[Any, ...]]:
    """The records of a run, without times and without drawn lines, whose steps depend on the length of the run."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [tuple(v for key, v in r.items() if "seconds" not in key and key != "line") for r in records]


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


# ------------------------------------------------------------------------------------------------ killed ranks


@pytest.fixture(scope="module")
def undisturbed(
    pool: Callable[[int], Pool], tmp_path_factory: pytest.TempPathFactory, mlp: list[str]
) -> list[tuple[Any, ...]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    pool(2).run(trained, [*mlp, "--epochs", "4", "--output", str(folder)])
    return trace(folder)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks' processes in Linux's /proc")
@pytest.mark.timeout(240)  # three restarts, on a busy machine
@pytest.mark.parametrize("seed", range(KILLED_RUNS))
def test_ranks_killed_at_random_change_nothing(
    tmp_path: Path, mlp: list[str], undisturbed: list[tuple[Any, ...]], seed: int
) -> None:
    draw = random.Random(seed)
    arguments = [*mlp, "--epochs", "4", "--output", "out", "--checkpoint", "saved"]
    metrics, killed = tmp_path / "out" / "metrics.jsonl", {0}
    with started(*arguments, cwd=tmp_path) as process:
        for step in sorted(draw.sample(range(1, 80), k=KILLS)):
            rank, moment = draw.randrange(2), draw.uniform(0, 0.03)
            while lines_in(metrics) < step or workers_of(process.pid).get(rank, 0) in killed:
                assert process.poll() is None, "the run ended too early"
                time.sleep(0.002)
            time.sleep(moment)
            workers = workers_of(process.pid)
            os.kill(workers[rank], signal.SIGKILL)
            killed |= set(workers.values())
        said, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, (tmp_path / "errors.txt").read_text()
    assert trace(tmp_path / "out") == undisturbed, said
    assert not list((tmp_path / "saved").glob("*.partial"))


# --------------------------------------------------------------------------------------- stopped and gone on


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory, mlp: list[str]) -> Halves:
    """The folder of a run of one epoch, with checkpoints, and the trace of a run of two epochs."""
    folder = tmp_path_factory.mktemp("halves")
    run(*mlp, "--epochs", "2", "--output", "whole", cwd=folder)
    run(*mlp, "--epochs", "1", "--output", "out", "--checkpoint", "saved", cwd=folder)
    return folder, trace(folder / "whole")


@pytest.fixture
def go_on(mlp: list[str]) -> list[str]:
    return [*mlp, "--epochs", "2", "--output", "out", "--checkpoint", "saved"]


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, halves: Halves, go_on: list[str]) -> None:
    """The second process starts in the usual way, like the command of a user."""
    shutil.copytree(halves[0], tmp_path, dirs_exist_ok=True)
    command = [sys.executable, str(TRAIN), *go_on]
    done = subprocess.run(
        command, cwd=tmp_path, env=programs.ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr
    assert "checkpoint saved/step-00000022: going on from it" in done.stdout
    assert trace(tmp_path / "out") == halves[1]
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["step-00000040", "step-00000044"]


def truncate(newest: Path) -> None:
    data = next(newest.glob("*.distcp"))
    os.truncate(data, data.stat().st_size // 2)


def flip_a_bit(newest: Path) -> None:
    data = next(newest.glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)


def lose_a_file(newest: Path) -> None:
    next(newest.glob("*.distcp")).unlink()


def lose_the_manifest(newest: Path) -> None:
    (newest / "manifest.json").unlink()


def leave_it_partial(newest: Path) -> None:
    newest.rename(newest.with_name(newest.name + ".partial"))


def test_a_damaged_checkpoint_is_skipped(tmp_path: Path, halves: Halves, go_on: list[str]) -> None:
    shutil.copytree(halves[0], tmp_path, dirs_exist_ok=True)
    truncate(tmp_path / "saved" / "step-00000022")
    skipped, good = run(*go_on, cwd=tmp_path).splitlines()[:2]
    assert skipped == "checkpoint saved/step-00000022: skipped, its file __0_0.distcp is not as it was written"
    assert good == "checkpoint saved/step-00000020: going on from it"
    assert trace(tmp_path / "out") == halves[1]
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["step-00000040", "step-00000044"]


DAMAGE = {
    truncate: "its file __0_0.distcp is not as it was written",
    flip_a_bit: "its file __0_0.distcp is not as it was written",
    lose_a_file: "its file __0_0.distcp is missing",
    lose_the_manifest: "its manifest.json cannot be read (FileNotFoundError)",
    leave_it_partial: "it is half-written",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_of_any_kind_is_found(tmp_path: Path, halves: Halves, damage: Callable[[Path], None]) -> None:
    shutil.copytree(halves[0] / "saved", tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "step-00000022")
    newest, before = checkpoints.newest_first(tmp_path, ".partial")
    assert checkpoints.whats_wrong(newest) == DAMAGE[damage]
    assert checkpoints.whats_wrong(before) is None


def test_it_begins_anew_where_no_checkpoint_is_whole(tmp_path: Path, halves: Halves, go_on: list[str]) -> None:
    shutil.copytree(halves[0], tmp_path, dirs_exist_ok=True)
    for checkpoint in (tmp_path / "saved").iterdir():
        truncate(checkpoint)
    run(*go_on, cwd=tmp_path)
    assert trace(tmp_path / "out") == halves[1]


def test_it_goes_on_with_other_ranks(
    pool: Callable[[int], Pool], tmp_path: Path, halves: Halves, mlp: list[str]
) -> None:
    shutil.copytree(halves[0], tmp_path, dirs_exist_ok=True)
    folders = ["--output", str(tmp_path / "out"), "--checkpoint", str(tmp_path / "saved")]
    pool(2).run(trained, [*mlp, "--epochs", "2", *folders, "--parallel", "fsdp2"])
    seen, expected = trace(tmp_path / "out"), halves[1]
    assert [record[0] for record in seen] == [*range(1, 45)]
    assert seen[:22] == expected[:22]
    for mine, theirs in zip(seen[22:30], expected[22:30], strict=True):
        assert mine[1:3] == pytest.approx(theirs[1:3], rel=1e-3)  # loss and rate, in float32


def test_another_run_is_refused(tmp_path: Path, halves: Halves, go_on: list[str]) -> None:
    done = programs.run(TRAIN, *go_on, "--batch-size", "32", cwd=halves[0])
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("--checkpoint saved holds a run with --batch-size 64, not 32")
