"""The program that test_multihost.py runs under torchrun: `train`, `cut` or `delay`, and a folder for its results."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from problems import BATCH, criterion, data, new_model, parallel
from training import train

import gen_dist as gen

TIMEOUT = 10.0  # seconds that a collective may take


def equality(folder: Path) -> None:
    for kind in ("ddp", "fsdp2"):
        torch.save(train(kind, "exact", "adamw", "equal"), folder / f"{kind}-{dist.get_rank()}.pt")


def scheduler_and_step(kind: str, group: dist.ProcessGroup | None = None) -> tuple[Callable[[], None], ...]:
    """One update of the rate, and the training step around it."""
    model = parallel(new_model(), kind)
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters())
    scheduler = gen.ExactGen(optimizer, model, criterion, process_group=group)
    half = BATCH // dist.get_world_size()
    x, y = (t[half * dist.get_rank() :][:half] for t in data()[0])

    def backward() -> None:
        optimizer.zero_grad()
        criterion(model(x), y).backward()

    return backward, lambda: scheduler.step(x, y), optimizer.step


def endless(kind: str) -> None:
    backward, update, step = scheduler_and_step(kind)
    while True:
        for part in (backward, update, step):
            part()
        print("step", flush=True)


def cost(folder: Path) -> None:
    """Measure the least seconds of an all-reduce, of an update on one rank, and of an update on all ranks."""

    def least(part: Callable[[], None], before: Callable[[], None] = lambda: None) -> float:
        times = []
        for _ in range(6):
            before()
            dist.all_reduce(numbers)  # so that all start together
            start = time.perf_counter()
            part()
            times.append(time.perf_counter() - start)
        return min(times[1:])  # what else runs on the machine only adds

    numbers = torch.zeros(16, dtype=torch.float64)
    found = {"all_reduce": least(lambda: dist.all_reduce(numbers))}
    own_groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    backward, update, _ = scheduler_and_step("replica", own_groups[dist.get_rank()])
    found["alone"] = least(update, before=backward)
    for kind in ("ddp", "fsdp2"):
        backward, update, _ = scheduler_and_step(kind)
        found[kind] = least(update, before=backward)
    model = parallel(new_model(), "fsdp2")
    x, _ = data()[0]
    found["forward pass of fsdp2"] = least(lambda: model(x))
    if dist.get_rank() == 0:
        torch.save(found, folder / "cost.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    _, what, argument = sys.argv
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    {"train": equality, "delay": cost}.get(what, lambda _: endless(argument))(Path(argument))
    gc.collect()  # a DDP or FSDP2 model, kept in a cycle, that outlives the group may abort the process at its end
    dist.barrier()  # a rank that left early would take the others' connections with it
    dist.destroy_process_group()
