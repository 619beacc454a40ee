"""A long run with random faults. Memory, descriptors and processes must not grow, and ranks must never differ.

    torchrun --standalone --nproc_per_node=2 tests/benchmarks/soak.py [--steps 20000 --minutes 10 --seed 0]

Tiny models train in turn, as plain replicas and in DDP, with `GenScheduler` and `AutoGen`. About every fifth step has a
fault, which all ranks draw together and which hits one of them (an interrupt hits all). At every hundredth step the
program compares the rates of all ranks, and calls `check_in_sync`. It exits with 1 if memory, descriptors or processes
have grown, or if ranks differ.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gen_dist as gen

NAN_IN_THE_GRADIENT = "NaN in the gradient"
NAN_IN_A_PROBE = "NaN in a probe"
OVERFLOW_IN_A_PROBE = "overflow in a probe"
CLOSURE_RAISES = "closure raises"
NO_SAMPLES = "no samples"
INTERRUPT = "interrupt"
FAULTS = [NAN_IN_THE_GRADIENT, NAN_IN_A_PROBE, OVERFLOW_IN_A_PROBE, CLOSURE_RAISES, NO_SAMPLES, INTERRUPT]
SHARE_OF_FAULTS = 0.2

COMPARE_EVERY = 100
WARM_UP = 0.1  # of the run
GROWTH, GROWTH_MIB = 0.05, 20.0  # of memory: what both together are too much


class Interrupt(KeyboardInterrupt):
    """Ctrl-C on all ranks at once."""


class Footprint(NamedTuple):
    """The resources that this process uses."""

    mib: float
    descriptors: int
    children: int

    @classmethod
    def now(cls) -> Footprint:
        gc.collect()
        own = Path("/proc/self")
        pages = int((own / "statm").read_text().split()[1])
        children = [child for task in (own / "task").iterdir() for child in (task / "children").read_text().split()]
        return cls(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir(own / "fd")), len(children))


class Training:
    """A classifier in training, on other data on each rank."""

    def __init__(self, make: Any, ddp: bool, **options: Any) -> None:
        torch.manual_seed(0)
        model: nn.Module = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))
        self.ddp = ddp
        self.model = DistributedDataParallel(model) if ddp else model
        self.optimizer = gen.make_gen_optimizer(torch.optim.AdamW, self.model.parameters(), lr=1e-3)
        group = None if ddp else dist.new_group()  # plain copies may train in a group of their own
        self.scheduler: gen.GenScheduler = make(
            self.optimizer, self.model, lr_min=1e-9, lr_max=0.1, process_group=group, **options
        )
        self.data = torch.Generator().manual_seed(dist.get_rank())
        self.happened: Counter[str] = Counter()

    def step(self, fault: str | None) -> None:
        """Take a step, with or without a fault on this rank."""
        x = torch.randn(8, 4, generator=self.data)
        y = x[:, :3].argmax(1)
        self.optimizer.zero_grad()
        self._backward(x, y, fault)

        def loss() -> Tensor:
            value = nn.functional.cross_entropy(self.model(x), y)
            if fault in (NAN_IN_A_PROBE, OVERFLOW_IN_A_PROBE, CLOSURE_RAISES, INTERRUPT):
                self.happened[fault] += 1
            if fault == CLOSURE_RAISES:
                raise OSError("disk full")
            if fault == INTERRUPT:
                raise Interrupt
            return value + {NAN_IN_A_PROBE: math.nan, OVERFLOW_IN_A_PROBE: math.inf}.get(fault or "", 0.0)

        try:
            self.scheduler.step(closure=loss, weight=0 if fault == NO_SAMPLES else len(x))
        except (OSError, RuntimeError) as error:
            if "disk full" not in str(error):
                raise
            return  # the batch is skipped
        except Interrupt:
            return
        self.optimizer.step()

    def _backward(self, x: Tensor, y: Tensor, fault: str | None) -> None:
        if fault in (NAN_IN_THE_GRADIENT, NO_SAMPLES):
            self.happened[fault] += 1
        if fault == NO_SAMPLES and not self.ddp:
            nn.functional.cross_entropy(self.model(x[:0]), y[:0]).backward()  # the mean of nothing is NaN
            return
        poisoned = next(self.model.parameters()).register_hook(lambda g: g * math.nan)  # before any reduction
        if fault != NAN_IN_THE_GRADIENT:
            poisoned.remove()
        (nn.functional.cross_entropy(self.model(x), y) * (fault != NO_SAMPLES)).backward()
        poisoned.remove()

    def is_finite(self) -> bool:
        state = [v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        return all(bool(t.isfinite().all()) for t in [*self.model.parameters(), *state])


def trainings() -> list[Training]:
    forward: dict[str, Any] = {"curvature": "forward", "update_every": 2}
    return [
        Training(gen.GenScheduler, ddp=False, companions=[gen.Verification(every=3), gen.GradientNoise()]),
        Training(gen.GenScheduler, ddp=True, **forward),
        Training(gen.AutoGen, ddp=True, update_every=2),
        Training(gen.AutoGen, ddp=False, **forward),
    ]


def equal_on_all_ranks(numbers: list[float]) -> bool:
    here = torch.tensor(numbers, dtype=torch.float64)
    everywhere = [torch.empty_like(here) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, here)
    return all(torch.equal(each, here) for each in everywhere)


def largest_of_ranks(number: float) -> float:
    values = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.item()


def soak(steps: int, minutes: float, seed: int) -> int:
    """Run, print a report on rank 0, and return the exit code, which is the same on all ranks."""
    chance = random.Random(seed)  # drawn from alike on all ranks
    rank, ranks = dist.get_rank(), dist.get_world_size()
    runs = trainings()
    rates: list[float] = []
    first: Footprint | None = None
    differed, done, start, elapsed = 0, 0, time.monotonic(), 0.0
    while done < steps and elapsed < 60 * minutes:
        fault = chance.choice(FAULTS) if chance.random() < SHARE_OF_FAULTS else None
        victim = chance.randrange(ranks)
        run = runs[done % len(runs)]
        run.step(fault if victim == rank or fault == INTERRUPT else None)
        rates += run.scheduler.get_last_lr()
        done += 1
        if done % COMPARE_EVERY == 0 or done == steps:
            differed += not equal_on_all_ranks(rates)
            for each in runs:
                each.scheduler.check_in_sync()
            rates.clear()
            elapsed = largest_of_ranks(time.monotonic() - start)
            if first is None and max(done / steps, elapsed / (60 * minutes)) >= WARM_UP:
                first = Footprint.now()
    return report(runs, done, elapsed, differed, first or Footprint.now(), Footprint.now())


def report(runs: list[Training], steps: int, elapsed: float, differed: int, first: Footprint, last: Footprint) -> int:
    happened = sum((run.happened for run in runs), Counter())
    finite = all(run.is_finite() for run in runs)
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, (happened, finite, first, last))
    print_on_first(f"{steps} steps in {elapsed:.0f} s on {len(reports)} ranks")
    for fault in FAULTS:
        counts = [counts[fault] for counts, *_ in reports]
        print_on_first(f"  {fault:<22}{sum(counts):6}   by rank: {', '.join(map(str, counts))}")
    grown = False
    for rank, (_, _, before, after) in enumerate(reports):
        growth = after.mib - before.mib
        grown |= growth > GROWTH_MIB and growth > GROWTH * before.mib
        grown |= after.descriptors > before.descriptors or after.children > before.children
        print_on_first(
            f"rank {rank}: memory {before.mib:.1f} -> {after.mib:.1f} MiB, descriptors {before.descriptors} -> "
            f"{after.descriptors}, child processes {before.children} -> {after.children}"
        )
    all_finite = all(finite for _, finite, *_ in reports)
    print_on_first(f"rates equal on all ranks throughout: {'no' if differed else 'yes'}")
    print_on_first(f"parameters and optimizer state finite: {'yes' if all_finite else 'no'}")
    return int(grown or differed > 0 or not all_finite)


def print_on_first(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--minutes", type=float, default=10.0, help="at most")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    code = soak(arguments.steps, arguments.minutes, arguments.seed)
    dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
