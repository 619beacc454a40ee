"""The GPU benchmark, by its smoke form on the CPU: all rows are there, and the counts are those of the code."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import gpu_rates
import pytest
import torch
from gpu_cases import MODELS, PEERS, SMOKE_CASES, methods
from programs import run
from quality_losses import cross_entropy
from quality_tasks import Task, evaluated, sampled
from torch import nn

CPU = torch.device("cpu")
PROGRAM = Path(__file__).parent / "benchmarks" / "gpu.py"
HEADING = ["model", "method", "ms", "ratio", "peak MiB", "operators", "reads", "attention"]
ESTIMATORS = {"one probe": 1, "two probes": 2, "gauss-newton": 0, "exact": 0}  # and their probes

pytestmark = [
    pytest.mark.timeout(400),  # programs and compilers on busy machines
    pytest.mark.skipif(torch.cuda.is_available(), reason="the smoke form runs on the GPU there, whose counts differ"),
]

Rows = dict[tuple[str, str], list[str]]


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    done = run(PROGRAM, "--smoke", cwd=tmp_path_factory.mktemp("gpu"), timeout=380)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def rows(printed: list[str]) -> Rows:
    """The cells of each row, by model and method."""
    cells = [split(line) for line in printed if line.startswith("|")]
    assert cells[0] == HEADING
    return {(row[0], row[1]): row[2:] for row in cells[2:]}


def split(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def ran(rows: Rows, column: str) -> dict[tuple[str, str], str]:
    """The cells of a column, of what was not left out."""
    place = HEADING.index(column) - 2
    return {key: row[place] for key, row in rows.items() if not row[0].startswith("left out")}


def test_the_table_is_of_a_named_device_and_has_all_methods_of_all_cases(printed: list[str], rows: Rows) -> None:
    assert printed[0].startswith("no GPU")
    assert torch.__version__ in printed[0]
    wanted = [(str(case), method.name) for case in SMOKE_CASES for method in methods(case, CPU, "eager")]
    assert list(rows) == wanted
    assert all(len(row) == len(HEADING) - 2 for row in rows.values())
    left_out = {method for _, method in rows.keys() - ran(rows, "ms").keys()}
    assert left_out <= set(PEERS), "packages that are not installed, or fail in half precision"
    cells = {(*key, column): cell for column in ("ms", "ratio", "peak MiB") for key, cell in ran(rows, column).items()}
    assert {key: cell for key, cell in cells.items() if not float(cell) > 0} == {}


def expected_reads(model: str, method: str) -> int:
    """What the host waits for in an update: whether the gradients are finite, and the reduced numbers.

    Between updates it waits for nothing, since AdamW is fused.
    To them come, with bfloat16 weights, whether they arrived at each probe, and, in float16, the unit of the jets.
    """
    name, *every = method.split(",")
    if name not in ESTIMATORS or every:
        return 0
    probes = ESTIMATORS[name]
    return 2 + probes * ("bf16 weights" in model) + (probes == 0 and "GPT, fp16" in model)


def test_the_host_waits_as_often_as_the_code_says(rows: Rows) -> None:
    found = {key: int(cell) for key, cell in ran(rows, "reads").items() if key[1] not in PEERS}
    assert found == {key: expected_reads(*key) for key in found}


@pytest.mark.parametrize("case", [str(case) for case in SMOKE_CASES])
def test_operators_grow_with_the_passes_of_the_model(rows: Rows, case: str) -> None:
    counts = {method: int(cell) for (model, method), cell in ran(rows, "operators").items() if model == case}
    order = [counts[method] for method in ("plain", "one probe", "two probes")]
    assert order == sorted(set(order))
    assert counts["plain"] < counts["gauss-newton"] < counts["exact"]
    between = {count for method, count in counts.items() if "every" in method}
    assert len(between) <= 1, "between two updates all estimators do the same"
    assert all(counts["plain"] < count < counts["one probe"] for count in between)


def test_attention_is_flash_attention_but_in_double_backward(rows: Rows) -> None:
    attention = {key: cell for key, cell in ran(rows, "attention").items() if "GPT" in key[0]}
    assert all("flash" in cell for cell in attention.values())
    assert {method for (_, method), cell in attention.items() if "math" in cell} <= {"double backward", "curvlinops"}


@pytest.mark.parametrize(
    ("make", "millions"),
    [
        (lambda: MODELS["GPT 124M"]()[0], "124"),
        (lambda: MODELS["GPT 350M"]()[0], "355"),
        (lambda: gpu_rates.LADDER_HERE["gpt-124m"].model(84), "126"),
        (lambda: gpu_rates.LADDER_HERE["gpt-350m"].model(84), "353"),
    ],
)
def test_the_models_have_about_the_parameters_of_their_names(make: Callable[[], nn.Module], millions: str) -> None:
    with torch.device("meta"):
        model = make()
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f}" == millions


# -------------------------------------------------------------------------------------------------------- rates


def options(results: Path, budget: float = 60.0) -> argparse.Namespace:
    return argparse.Namespace(smoke=True, budget=budget, results=results, data_dir=results.parent)


def test_each_method_has_a_loss_and_rates_and_is_not_run_again(tmp_path: Path) -> None:
    results = tmp_path / "rates.jsonl"
    text = gpu_rates.run(options(results), CPU)
    rows = [split(line) for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == ["method", *(f"{name}, 0.0M" for name in gpu_rates.SMOKE_LADDER)]
    assert [row[0] for row in rows[2:]] == gpu_rates.NAMES
    assert all(len(row) == 3 and float(cell.split()[0]) > 0 for row in rows[2:] for cell in row[1:])
    lines = results.read_text().splitlines()
    assert {json.loads(line)["steps"] for line in lines} == {gpu_rates.SMOKE_STEPS}

    results.write_text("\n".join(lines[1:]) + "\n")
    assert gpu_rates.run(options(results), CPU) == text
    again = results.read_text().splitlines()
    assert again[:-1] == lines[1:]
    first, repeated = json.loads(lines[0]), json.loads(again[-1])
    assert [first.pop("seconds") > 0, repeated.pop("seconds") > 0] == [True, True]
    assert first == repeated


def test_a_run_stops_when_its_time_is_over(tmp_path: Path) -> None:
    text = gpu_rates.run(options(tmp_path / "rates.jsonl", budget=0), CPU)
    assert text.count("stopped at step 1") == len(gpu_rates.NAMES) * len(gpu_rates.SMOKE_LADDER)


def test_a_tuned_rate_is_that_of_a_plain_script() -> None:
    """AdamW at 1e-3, warmed over a tenth of the steps, then linear to zero, from equal weights on equal batches."""
    task: Task = gpu_rates.SMOKE_LADDER["gpt-width-32"]
    examples = gpu_rates.standing_in()
    found = gpu_rates.perform(task, "adamw-warmed-0.001", examples, budget=60)
    torch.manual_seed(gpu_rates.SEED)
    model = task.model(examples.classes)
    optimizer = torch.optim.AdamW(model.parameters())
    for step, (x, y) in enumerate(task.batches(examples, task.steps, gpu_rates.SEED)):
        done = step / task.steps
        optimizer.param_groups[0]["lr"] = 1e-3 * min(done / 0.1, (1 - done) / 0.9)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    loss, _ = evaluated(task, model, *sampled(examples.test_x, examples.test_y, task.sample))
    assert found["test_loss"] == pytest.approx(loss, rel=1e-6)
