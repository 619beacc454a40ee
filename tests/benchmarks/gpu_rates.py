"""How well a language model trains on a GPU by each method, as it grows to 350M parameters, and at which rates.

The models are those of the ladder of quality_tasks.py and two larger ones, on the text that the quality benchmark has:
500 steps of 8 times 128 characters, weights in float32, in autocast to bfloat16 on a GPU. AdamW has three rates, each
with warm-up and linear decay; the other methods choose.

A run appends one JSON line to `--results`, and is not repeated while the line is there: to go on after a stop, give the
same command again. A run that is longer than `--budget` seconds stops, and the table says at which step.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parents[2] / "examples"), str(Path(__file__).parent)]
from data import windows
from gpu_cases import in_autocast
from quality import RUNS, finite, recorded
from quality_data import Dataset, MissingDataError, load, with_long_context
from quality_methods import AVERAGED, LAST, METHODS
from quality_report import heading, line, number
from quality_tasks import LADDER, TASKS, Task, ladder, measured

SEED = 1
STEPS, SMOKE_STEPS = 500, 6
SAMPLE = 512  # examples that a result is measured on
RATES_KEPT = 100  # of a run
NAMES = [*(f"adamw-warmed-{rate:g}" for rate in (1e-4, 3e-4, 1e-3)), "schedule-free", "prodigy", "autogen"]
LADDER_HERE: dict[str, Task] = {
    **{name: replace(TASKS[name], steps=STEPS, sample=SAMPLE) for name in LADDER},
    "gpt-124m": ladder("124M", 10, 1024, STEPS, (), SAMPLE),
    "gpt-350m": ladder("350M", 28, 1024, STEPS, (), SAMPLE),
}
SMOKE_LADDER: dict[str, Task] = {
    f"gpt-width-{width}": ladder(f"of width {width}", 1, width, SMOKE_STEPS, (), 8) for width in (16, 32)
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("rates")
    group.add_argument("--budget", type=float, default=120, help="seconds of a run; after that it stops")
    group.add_argument("--results", type=Path, default=RUNS / "gpu-rates.jsonl")
    group.add_argument("--data-dir", type=Path, default=Path("data"))


def run(options: argparse.Namespace, device: torch.device) -> str:
    """Perform the runs that are missing in the results; the table of all."""
    tasks = SMOKE_LADDER if options.smoke else LADDER_HERE
    try:
        text = standing_in() if options.smoke else load("shakespeare-128", options.data_dir)
    except MissingDataError as error:
        return f"no rates: {error}"
    examples = text.to(device)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    for name, task in tasks.items():
        done = {record["method"] for record in recorded(options.results) if record["task"] == name}
        for method in [method for method in NAMES if method not in done]:
            try:
                record = {"task": name, "method": method} | perform(task, method, examples, options.budget)
            except (ImportError, RuntimeError) as error:  # not installed, or out of memory
                print(f"{name} {method} left out: {error}".splitlines()[0], file=sys.stderr)
                continue
            with options.results.open("a") as file:
                print(json.dumps(record), file=file)
    return table([record for record in recorded(options.results) if record["task"] in tasks], list(tasks))


def perform(task: Task, method: str, examples: Dataset, budget: float) -> dict[str, Any]:
    """Train and measure; `seconds` is the time on the wall, with that of the waits for the GPU."""
    device = examples.train_x.device
    model = task.new_model(examples, SEED)
    if device.type == "cuda":
        in_autocast(model, device, torch.bfloat16)
    training = METHODS[method](task, model, task.steps)
    rates: list[float | None] = []
    start, steps = time.perf_counter(), 0
    for x, y in task.batches(examples, task.steps, SEED):
        training.step(x, y)
        steps += 1
        if steps % max(1, task.steps // RATES_KEPT) == 0:
            rates.append(finite(training.rate()))  # waits for the GPU where the rate is there
            if time.perf_counter() - start > budget:
                break
    took = time.perf_counter() - start
    readings = training.readings()
    quality = asdict(measured(task, examples, readings[AVERAGED if method == "autogen" else LAST]))
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": steps,
        "of_steps": task.steps,
        "seconds": round(took, 3),
        "rates": rates,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        **{name: finite(value) for name, value in quality.items()},
    }


def table(records: list[dict[str, Any]], tasks: list[str]) -> str:
    """The test loss after the last step, with the largest rate and the last one."""
    cells = {(record["task"], record["method"]): cell(record) for record in records}
    sizes = {record["task"]: f", {record['parameters'] / 1e6:.1f}M" for record in records}
    lines = ["Test loss (largest rate, last rate):", ""]
    lines += heading(["method", *(name + sizes.get(name, "") for name in tasks)])
    lines += [line([method, *(cells.get((task, method), "") for task in tasks)]) for method in NAMES]
    return "\n".join(lines)


def cell(record: dict[str, Any]) -> str:
    known = [rate for rate in record["rates"] if rate is not None]
    rates = f" ({max(known):.1e}, {known[-1]:.1e})" if known else ""
    stopped = "" if record["steps"] == record["of_steps"] else f", stopped at step {record['steps']}"
    return (number(record["test_loss"]) or "not finite") + rates + stopped


def standing_in() -> Dataset:
    """A text that comes with Python, by characters, in the place of one that has to be downloaded."""
    from pydoc_data.topics import topics

    text = "".join(chain.from_iterable(sorted(topics.items())))
    codes = {character: code for code, character in enumerate(sorted(set(text)))}
    train, test = torch.tensor([codes[character] for character in text]).tensor_split([-20_000])
    return with_long_context(Dataset(*windows(train), *windows(test), classes=len(codes)))
