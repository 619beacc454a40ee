"""What `suggest_lr` says before training, compared with the best rate of a grid: AdamW or SGD with linear decay.

    python tests/benchmarks/quality.py run --methods 'adamw-linear-*' 'sgd-linear-*' --data-dir data --seeds 1 2
    python tests/benchmarks/suggestions.py --data-dir data

Neighbouring rates of the grid differ by a factor of 3, so no factor below 2 can be resolved.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

import torch

sys.path.insert(0, str(Path(__file__).parent))
from quality_tasks import TASKS, MissingDataError, load

import gen_dist as gen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--results", type=Path, nargs="+", default=[Path("runs/quality.jsonl")])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| task | seed | best of the grid | held out | its factor | own batch | its factor | confidence | signal |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in arguments.tasks:
        try:
            rows(name, arguments.data_dir, arguments.seeds, best_rate(name, arguments.results))
        except MissingDataError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)


def rows(name: str, directory: Path, seeds: list[int], best: float | None) -> None:
    task = TASKS[name]
    dataset = load(task.data, directory)
    for seed in seeds:
        model = task.new_model(dataset, seed)
        optimizer = task.optimizer(model, 1e-3)
        batch, other = task.batches(dataset, 2, seed)
        held_out = gen.suggest_lr(model, optimizer, task.loss, *batch, held_out=other)
        own = gen.suggest_lr(model, optimizer, task.loss, *batch)
        cells = [name, str(seed), number(best)]
        for seen in (held_out, own):
            cells += [number(seen.rate), number(seen.rate / best if seen.rate and best else None)]
        print("| " + " | ".join([*cells, number(held_out.confidence), number(held_out.signal)]) + " |")


def best_rate(name: str, results: list[Path]) -> float | None:
    """The rate with the smallest mean training loss; None if there are no results."""
    losses: defaultdict[float, list[float]] = defaultdict(list)
    prefix = "sgd-linear-" if TASKS[name].sgd else "adamw-linear-"
    for path in results:
        for record in map(json.loads, path.read_text().splitlines() if path.is_file() else []):
            if record["task"] == name and record["length"] == 1 and record["method"].startswith(prefix):
                rate = float(record["method"].removeprefix(prefix))
                losses[rate].append(record["readings"]["last"]["train_loss"])
    return min(losses, key=lambda rate: mean(losses[rate])) if losses else None


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


if __name__ == "__main__":
    main()
