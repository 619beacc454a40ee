"""What an update costs on many GPUs, from bytes, flops and link speeds, and a small run to check the formulas.

    python tests/benchmarks/scaling.py                                             # the tables of launch/scaling.md
    torchrun --standalone --nproc_per_node=2 tests/benchmarks/scaling.py --check   # predicted and measured, here

`launch/scaling.md` explains the formulas of `predicted`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

sys.path[:0] = [str(Path(__file__).parents[2] / "examples"), str(Path(__file__).parent)]
from models import GPT
from update_cost import ESTIMATORS, keep_freed_memory, token_cross_entropy, training


class Machine(NamedTuple):
    """What one rank can do: flops, bytes of memory and bytes of the link in a second, and the seconds of a message."""

    flops: float
    memory: float
    link: float
    latency: float
    overlaps: bool  # whether it computes while it communicates


class Job(NamedTuple):
    """A transformer under FSDP2. Each block is a unit and is gathered again for the backward pass."""

    parameters: float
    layers: int
    width: int
    sequence: int
    tokens: int  # of a rank, a step
    ranks: int
    weight_bytes: int  # as they are computed with and gathered


def predicted(machine: Machine, job: Job) -> dict[str, float]:
    """The seconds of a plain iteration, and the seconds that an update adds to it."""

    def together(compute: float, communication: float) -> float:
        return max(compute, communication) if machine.overlaps else compute + communication

    products = 2 * job.parameters * job.tokens / machine.flops
    attention = 4 * job.layers * job.width * job.sequence * job.tokens / machine.flops
    hops, units = job.ranks - 1, job.layers + 1
    gather = job.weight_bytes * job.parameters * hops / job.ranks / machine.link + units * hops * machine.latency
    small = 2 * math.ceil(math.log2(job.ranks)) * machine.latency
    shard = job.parameters / job.ranks / machine.memory

    forward = products + attention / 2  # causal: half of the scores
    plain = together(forward, gather) + together(2 * forward, 2 * gather) + 28 * shard
    probe = together(forward, gather) + 80 * shard + 2 * small
    gauss_newton = together(3 * products + 4 * attention, 2 * gather) + 52 * shard + 2 * small
    exact = together(5 * products + 6 * attention, 2 * gather) + 52 * shard + 2 * small
    two_probes = probe + together(forward, gather) + 12 * shard
    return {
        "plain": plain,
        "one probe": probe,
        "two probes": two_probes,
        "gauss-newton": gauss_newton,
        "exact": exact,
    }


H100 = Machine(flops=4e14, memory=2.7e12, link=4e10, latency=5e-6, overlaps=True)
JOBS = {
    "7B": Job(7e9, 32, 4096, 4096, 8192, 64, 2),
    "70B": Job(70e9, 80, 8192, 4096, 8192, 64, 2),
}


def tables() -> None:
    methods = [method for method in predicted(H100, JOBS["7B"]) if method != "plain"]
    print("| model | GPUs | plain, s | " + " | ".join(methods) + " |")
    print("|---" * (3 + len(methods)) + "|")
    for name, job in JOBS.items():
        for ranks in (64, 1024):
            found = predicted(H100, job._replace(ranks=ranks))
            row = [f"{found[m] / found['plain']:.2f}, {found[m] / found['plain'] / 8:.0%}" for m in methods]
            print(f"| {name} | {ranks:,} | {found['plain']:.1f} | " + " | ".join(row) + " |")


# ------------------------------------------------------------------------------------------------ the small run


def median_seconds(work: Callable[[], object], repeats: int = 15) -> float:
    """The processor time of the work; the ranks begin together."""
    took = []
    for _ in range(repeats):
        dist.barrier()
        start = time.process_time()
        work()
        took.append(time.process_time() - start)
    return statistics.median(took)


def machine_here(job: Job) -> Machine:
    """What this rank does in a second, measured on pieces of the size that the job uses."""
    x, w = torch.randn(job.tokens, job.width), torch.randn(job.width, 4 * job.width)
    flops = 2 * x.numel() * w.size(1) / median_seconds(lambda: x @ w)
    block = torch.randn(12 * job.width**2 // job.ranks)
    whole = torch.empty(len(block) * job.ranks)
    copied = median_seconds(lambda: torch.add(block, 1.0))
    with_bytes = median_seconds(lambda: dist.all_gather_into_tensor(whole, block))
    latency = median_seconds(lambda: dist.all_reduce(torch.zeros(16)))
    link = block.nbytes * (job.ranks - 1) / max(with_bytes - latency, 1e-9)
    return Machine(flops, 2 * block.nbytes / copied, link, latency, overlaps=False)


def check() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 has renamed its collectives
    keep_freed_memory()
    dist.init_process_group("gloo")
    layers, width, sequence, batch = 4, 384, 64, 8
    methods = {"plain": None, **ESTIMATORS}
    tokens = torch.randint(0, 96, (batch, sequence + 1))
    x, y = tokens[:, :-1], tokens[:, 1:]
    iterations: dict[str, Callable[[], None]] = {}
    for method, how in methods.items():
        torch.manual_seed(0)
        model = GPT(96, sequence, layers, width)
        size = sum(p.numel() for p in model.parameters())
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        iterations[method] = training(model, token_cross_entropy, x, y, how)
    job = Job(size, layers, width, sequence, batch * sequence, dist.get_world_size(), 4)
    machine = machine_here(job)
    expected = predicted(machine, job)
    found: dict[str, list[float]] = {method: [] for method in methods}
    for number in range(9):
        for method, iteration in iterations.items():
            took = median_seconds(iteration, 1)
            if number:
                found[method].append(took)
    if dist.get_rank() == 0:
        print(f"{size:,} parameters, {job.ranks} ranks: {machine}")
        print(f"{'':<14}{'predicted ms':>14}{'measured ms':>14}{'':>6}{'ratio: predicted':>18}{'measured':>10}")
        for method, seconds in expected.items():
            ratios = [a / b for a, b in zip(found[method], found["plain"], strict=True)]
            total = seconds if method == "plain" else expected["plain"] + seconds
            row = f"{method:<14}{1e3 * total:14.1f}{1e3 * statistics.median(found[method]):14.1f}"
            print(f"{row}{total / expected['plain']:24.2f}{statistics.median(ratios):10.2f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check() if parser.parse_args().check else tables()
