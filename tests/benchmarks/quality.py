"""How well a model trains: methods that choose a learning rate, from equal weights and equal batches.

    python tests/benchmarks/quality.py run --data-dir data [--tasks cnn gpt] [--methods 'adamw-*' autogen] [--seeds 1 2]
    python tests/benchmarks/quality.py summary

A run is one task, method, seed and length, and appends one JSON line to `--results`; what stands there already is not
run again, so a benchmark can be stopped and go on. `--part 1/2` and `--part 2/2` share the runs between two processes.
`--length 4` is four times as many steps. Methods are designed on seed 0 and reported on seeds 1 and 2.

The tasks stand in quality_tasks.py and the methods in quality_methods.py. Rivals need pip install schedulefree
prodigyopt gen-optim; those not installed are left out.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent))
from quality_methods import METHODS, Training, takes_part
from quality_report import draw, table
from quality_tasks import TASKS, measured

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import data

RATES_KEPT = 100  # of a run
RUNS = Path("runs")


class Run(NamedTuple):
    """What identifies a run among the results."""

    task: str
    method: str
    seed: int
    length: float


@cache
def dataset(name: str, directory: Path) -> data.Dataset:
    return data.load(name, directory)


def perform(run: Run, directory: Path) -> dict[str, Any]:
    """Train and measure. `seconds` is the time of this process's CPU in training, without time for other readings."""
    task = TASKS[run.task]
    examples = dataset(task.data, directory)
    steps = round(task.steps * run.length)
    training = METHODS[run.method](task, task.new_model(examples, run.seed), steps)
    rates: list[tuple[int, float | None]] = []
    spent = 0.0
    for number, (x, y) in enumerate(task.batches(examples, steps, run.seed)):
        start = time.process_time()
        training.step(x, y)
        spent += time.process_time() - start
        if number % max(1, steps // RATES_KEPT) == 0:
            rates.append((number, finite(training.rate())))
    return {
        **run._asdict(),
        "steps": steps,
        "seconds": round(spent - training.reading_seconds, 3),
        "reading_seconds": round(training.reading_seconds, 3),
        "readings": readings(training, run, examples),
        "rates": rates,
        "torch": torch.__version__,
    }


def readings(training: Training, run: Run, examples: data.Dataset) -> dict[str, dict[str, float | None]]:
    task = TASKS[run.task]
    found = {name: asdict(measured(task, examples, state)) for name, state in training.readings().items()}
    return {name: {key: finite(value) for key, value in reading.items()} for name, reading in found.items()}


def finite(value: float) -> float | None:
    """JSON has no word for infinity or not-a-number."""
    return value if math.isfinite(value) else None


def chosen(tasks: Iterable[str], patterns: list[str], seeds: list[int], length: float) -> Iterator[Run]:
    """The runs asked for, seed by seed and task by task."""
    methods = [method for pattern in patterns for method in fnmatch.filter(METHODS, pattern)]
    for seed in seeds:
        for task in tasks:
            for method in dict.fromkeys(methods):
                if takes_part(method, TASKS[task]):
                    yield Run(task, method, seed, length)


def recorded(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def run_missing(runs: list[Run], results: Path, directory: Path) -> None:
    """Perform the runs that the results lack, one line each."""
    results.parent.mkdir(parents=True, exist_ok=True)
    done = {Run(*(record[key] for key in Run._fields)) for record in recorded(results)}
    missing = [run for run in runs if run not in done]
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are there already")
    for number, run in enumerate(missing, 1):
        try:
            record = perform(run, directory)
        except ImportError as error:
            print(f"{run.method} left out: {error}")
            continue
        with results.open("a") as file:
            print(json.dumps(record), file=file)
        losses = ", ".join(
            f"{name} {reading['train_loss'] or math.nan:.4f}" for name, reading in record["readings"].items()
        )
        print(
            f"{number}/{len(missing)} {run.task} {run.method} seed {run.seed}: {losses}, {record['seconds']:.1f} s",
            flush=True,
        )


def part(text: str) -> tuple[int, int]:
    """`"1/2"` -> `(1, 2)`."""
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise argparse.ArgumentTypeError(f"expected a part such as 1/2, got {text!r}")
    return int(number), int(of)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "summary", "methods"], help="methods lists their names")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=["*"], metavar="PATTERN", help="names, or patterns with *")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--length", type=float, default=1.0, help="multiplies the number of steps")
    parser.add_argument("--part", type=part, default=(1, 1), help="1/2: every second run, for two processes")
    parser.add_argument("--results", type=Path, default=RUNS / "quality.jsonl")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    if options.command == "methods":
        print("\n".join(METHODS))
    elif options.command == "run":
        number, of = options.part
        runs = list(chosen(options.tasks, options.methods, options.seeds, options.length))[number - 1 :: of]
        run_missing(runs, options.results, options.data_dir)
    else:
        records = [r for r in recorded(options.results) if r["length"] == options.length]
        records = [r for r in records if r["seed"] in options.seeds and r["task"] in options.tasks]
        print(table(records, options.seeds))
        print(draw(records, options.seeds, options.results.with_suffix(".png")))


if __name__ == "__main__":
    main()
