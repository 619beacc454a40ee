"""How well models train with different methods to choose a learning rate, from equal weights and on equal batches.

    python tests/benchmarks/quality.py run --data-dir data [--tasks cnn gpt] [--methods 'adamw-*' autogen] [--seeds 1 2]
    python tests/benchmarks/quality.py summary [--tasks design]
    python tests/benchmarks/quality.py ablations --tasks design --seeds 0 10
    python tests/benchmarks/quality.py methods [--tasks sentences]
    python tests/benchmarks/quality.py ranks --tasks mlp --ranks 2 4 --data-dir data
    python tests/benchmarks/quality.py cost --tasks cnn vit gpt --steps 600 --methods autogen --data-dir data

A run is one task, method, seed and length, and appends one JSON line to `--results`. Runs whose line is there already
are not repeated, so you can stop a benchmark and continue it later. `--part 1/2` and `--part 2/2` share the runs
between two processes. `--length 4` takes four times as many steps, and `--steps 10000` takes that number of steps. A
summary is of one length; what has to be in one table with other lengths is a task of its own (`cnn-40`, `vae-x4`).

Half of the tasks are for design, and half are held out (quality_tasks.py). `--tasks` takes `design`, `held-out` and
`ladder` for their tasks. Methods are designed on the first half with seeds 0, 10 and 20 (earlier also 11 and 21), and
results are reported on other seeds. On one core, a seed of all tasks takes the oracle (`adamw-linear-*`) about an hour,
and any other method a quarter of one; half of that is the ladder above 3M.

`ablations` compares the runs of AutoGen with one constant of its rule changed (quality_ablations.py) with its own.
`ranks` compares AutoGen's curves on several ranks with those of one process. `cost` trains with all methods in turns,
step by step, and prints their processor time over AdamW's.

quality_tasks.py has the tasks and quality_methods.py the methods. Other methods, and the weights of the task
`sentences`, need pip install "gen_dist[benchmarks]". Methods that are not installed and tasks without data are left
out.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent))
from quality_cost import cost
from quality_methods import METHODS, Training, takes_part
from quality_plots import draw, draw_ladder
from quality_ranks import compare
from quality_report import ablations, table
from quality_tasks import DESIGN_TASKS, HELD_OUT_TASKS, LADDER, TASKS, Dataset, MissingDataError, load, measured

RATES_KEPT = 100  # of a run
RUNS = Path("runs")
GROUPS = {"design": DESIGN_TASKS, "held-out": HELD_OUT_TASKS, "ladder": LADDER}


class Run(NamedTuple):
    """What identifies a run in the results."""

    task: str
    method: str
    seed: int
    length: float


def perform(run: Run, directory: Path) -> dict[str, Any]:
    """Train and measure. `seconds` is the CPU time of training in this process, without the time of other readings."""
    task = TASKS[run.task]
    examples = load(task.data, directory)
    steps = round(task.steps * run.length)
    model = task.new_model(examples, run.seed)
    training = METHODS[run.method](task, model, steps)
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
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": round(spent - training.reading_seconds, 3),
        "reading_seconds": round(training.reading_seconds, 3),
        "readings": readings(training, run, examples),
        "rates": rates,
        "torch": torch.__version__,
    }


def readings(training: Training, run: Run, examples: Dataset) -> dict[str, dict[str, float | None]]:
    task = TASKS[run.task]
    found = {name: asdict(measured(task, examples, state)) for name, state in training.readings().items()}
    return {name: {key: finite(value) for key, value in reading.items()} for name, reading in found.items()}


def finite(value: float) -> float | None:
    """Replace infinity and NaN, for which JSON has no word."""
    return value if math.isfinite(value) else None


def chosen(lengths: dict[str, float], patterns: list[str], seeds: list[int]) -> Iterator[Run]:
    """The requested runs, seed by seed and task by task; `lengths` are those of the tasks."""
    for seed in seeds:
        for task, length in lengths.items():
            for method in methods_of(task, patterns):
                yield Run(task, method, seed, length)


def methods_of(task: str, patterns: list[str]) -> list[str]:
    found = dict.fromkeys(method for pattern in patterns for method in fnmatch.filter(METHODS, pattern))
    return [method for method in found if takes_part(method, TASKS[task])]


def recorded(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def run_missing(runs: list[Run], results: Path, directory: Path) -> None:
    """Perform the runs that are missing in the results, and append a line for each."""
    results.parent.mkdir(parents=True, exist_ok=True)
    done = {Run(*(record[key] for key in Run._fields)) for record in recorded(results)}
    missing = [run for run in runs if run not in done]
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are there already")
    for number, run in enumerate(missing, 1):
        try:
            record = perform(run, directory)
        except (ImportError, MissingDataError) as error:
            print(f"{run.task} {run.method} left out: {error}")
            continue
        with results.open("a") as file:
            print(json.dumps(record), file=file)
        losses = ", ".join(
            f"{name} {reading[TASKS[run.task].measure] or math.nan:.4f}" for name, reading in record["readings"].items()
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
    parser.add_argument(
        "command", choices=["run", "summary", "ablations", "methods", "ranks", "cost"], help="methods lists their names"
    )
    parser.add_argument("--tasks", nargs="+", choices=[*TASKS, *GROUPS], default=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=["*"], metavar="PATTERN", help="names, or patterns with *")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--length", type=float, default=1.0, help="multiplies the number of steps")
    length.add_argument("--steps", type=int, help="the number of steps itself, in place of a length")
    parser.add_argument("--part", type=part, default=(1, 1), help="1/2: every second run, for two processes")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4], help="numbers of ranks; the first of the seeds")
    parser.add_argument("--results", type=Path, default=RUNS / "quality.jsonl")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # a saturated LSTM would take thirty times as long
    tasks = [task for name in options.tasks for task in GROUPS.get(name, (name,))]
    lengths = {task: length_of(task, options) for task in tasks}
    if options.command == "methods":
        print("\n".join(dict.fromkeys(method for task in lengths for method in methods_of(task, options.methods))))
    elif options.command == "ranks":
        for task, length in lengths.items():
            print(compare(task, options.ranks, round(TASKS[task].steps * length), options.seeds[0], options.data_dir))
    elif options.command == "cost":
        for task, length in lengths.items():
            steps, methods = round(TASKS[task].steps * length), methods_of(task, options.methods)
            print(cost(task, methods, steps, options.seeds[0], options.data_dir), flush=True)
    elif options.command == "run":
        number, of = options.part
        runs = list(chosen(lengths, options.methods, options.seeds))[number - 1 :: of]
        run_missing(runs, options.results, options.data_dir)
    else:
        records = [r for r in recorded(options.results) if lengths.get(r["task"]) == r["length"]]
        records = [r for r in records if r["seed"] in options.seeds and shown(r["method"], options.methods)]
        if options.command == "ablations":
            print(ablations(records, options.seeds))
            return
        print(table(records, options.seeds))
        print(draw(records, options.seeds, plot_path(options)))
        print(draw_ladder(records, options.seeds, plot_path(options, "-ladder")))


def shown(method: str, patterns: list[str]) -> bool:
    """Whether a summary has this method; it always has the oracle."""
    return any(fnmatch.fnmatch(method, pattern) for pattern in ("adamw-linear-*", *patterns))


def length_of(task: str, options: argparse.Namespace) -> float:
    return options.steps / TASKS[task].steps if options.steps else options.length


def plot_path(options: argparse.Namespace, what: str = "") -> Path:
    """The path of a plot, next to the results; its name holds the length if that is not the usual one."""
    results: Path = options.results
    usual = "" if options.length == 1 else f"-x{options.length:g}"
    length = f"-{options.steps}-steps" if options.steps else usual
    return results.with_name(f"{results.stem}{what}{length}.png")


if __name__ == "__main__":
    main()
