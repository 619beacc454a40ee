"""How the cost of an update grows with parameters, batch, ranks and `update_every`, compared with that of training.

    python tests/benchmarks/growth.py [--sweeps parameters batch update_every ranks] [--largest 1e8]

Each row trains a perceptron of four square layers with AdamW. Times are processor times of one rank, because with more
ranks than cores the wall clock says nothing. All methods of a row take turns. Each turn gives one ratio, and the
program prints medians with quartiles. After each sweep it prints how the plain iteration and the cost of an update
grow: the exponent `b` of a fit `c n^b`. The cost of an update must not grow faster than the plain iteration.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
from update_cost import ESTIMATORS, Iteration, keep_freed_memory, seconds, training

METHODS = ["one probe", "exact"]
Times = dict[str, list[float]]
LAYERS = 4


def iteration(parameters: int, batch: int, kind: str, method: str, update_every: int) -> Iteration:
    torch.manual_seed(0)
    width = max(round(math.sqrt(parameters / LAYERS)), 1)
    model: nn.Module = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(LAYERS)))
    if kind == "ddp":
        model = DistributedDataParallel(model)
    if kind == "fsdp2":
        for layer in model.children():
            fully_shard(layer)
        fully_shard(model)
    x, y = torch.randn(batch, width), torch.randn(batch, width)
    how = None if method == "plain" else ESTIMATORS[method] | {"update_every": update_every}
    return training(model, F.mse_loss, x, y, how)


def times(parameters: int, batch: int, kind: str, update_every: int, rounds: int) -> Times:
    """The seconds of an iteration of each method, one number for each round."""
    iterations = {m: iteration(parameters, batch, kind, m, update_every) for m in ("plain", *METHODS)}
    for each in iterations.values():
        seconds(each, update_every)
    found: Times = {method: [] for method in iterations}
    for _ in range(rounds):
        for method, each in iterations.items():
            found[method].append(seconds(each, update_every))
    return found


def on_ranks(ranks: int, kind: str, parameters: int, batch: int, rounds: int) -> Times:
    """The same on several ranks; each round counts the time of the rank that worked most."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, folder, kind, parameters, batch, rounds)
        mp.start_processes(_rank, arguments, nprocs=ranks, start_method="spawn")
        of_ranks = [torch.load(f"{folder}/{rank}.pt") for rank in range(ranks)]
    return {method: list(map(max, zip(*(each[method] for each in of_ranks), strict=True))) for method in of_ranks[0]}


def _rank(rank: int, ranks: int, folder: str, kind: str, parameters: int, batch: int, rounds: int) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.save(times(parameters, batch, kind, 1, rounds), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def exponent(sizes: list[float], values: list[float]) -> float:
    """The exponent `b` of the least-squares fit `c n^b`."""
    x, y = [math.log(n) for n in sizes], [math.log(max(v, 1e-9)) for v in values]
    return statistics.linear_regression(x, y).slope


def sweep(title: str, sizes: list[int], measured: Callable[[int], Times]) -> None:
    print(
        f"\n{title:<16}{'plain ms':>10}" + "".join(f"{method + ', ratio':>18}  {'quartiles':<12}" for method in METHODS)
    )
    plain, added = [], {method: [] for method in METHODS}  # type: ignore[var-annotated]
    for size in sizes:
        found = measured(size)
        plain.append(statistics.median(found["plain"]))
        row = f"{size:<16,}{1e3 * plain[-1]:10.1f}"
        for method in METHODS:
            ratios = [a / b for a, b in zip(found[method], found["plain"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            added[method].append((middle - 1) * plain[-1])
            row += f"{middle:18.2f}  {f'{low:.2f} to {high:.2f}':<12}"
        print(row, flush=True)
    fits = [f"{method} adds n^{exponent(sizes, values):.2f}" for method, values in added.items()]  # type: ignore[arg-type]
    print(f"  grows as: plain n^{exponent(sizes, plain):.2f}, {', '.join(fits)}")  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sweeps = ["parameters", "batch", "update_every", "ranks"]
    parser.add_argument("--sweeps", nargs="+", choices=sweeps, default=sweeps)
    parser.add_argument("--largest", type=float, default=1e8, help="parameters; 1e8 take 6 GB")
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    print(f"torch {torch.__version__}, {chosen.rounds} rounds, {os.cpu_count()} cores, load {load}")
    if "parameters" in chosen.sweeps:
        sizes = [n for n in (10**5, 10**6, 10**7, 10**8) if n <= chosen.largest]
        sweep("parameters", sizes, lambda n: times(n, 64, "", 1, chosen.rounds))
    if "batch" in chosen.sweeps:
        sweep("batch", [8, 32, 128, 512], lambda n: times(10**6, n, "", 1, chosen.rounds))
    if "update_every" in chosen.sweeps:
        sweep("update_every", [1, 2, 4, 8, 16], lambda n: times(10**6, 64, "", n, chosen.rounds))
    if "ranks" in chosen.sweeps:
        for kind in ("ddp", "fsdp2"):
            sweep(f"ranks, {kind}", [1, 2, 4, 8], lambda n, kind=kind: on_ranks(n, kind, 10**6, 64, chosen.rounds))  # type: ignore[misc]


if __name__ == "__main__":
    main()
