"""AutoGen on several ranks gives the curves of one process on the whole batches, up to rounding."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from quality_models import VAE
from quality_tasks import TASKS, Dataset, load
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gen_dist as gen

Curves = dict[str, Tensor]  # rate and loss of every step, in float64


def compare(name: str, ranks: list[int], steps: int, seed: int, directory: Path) -> str:
    """Train with equal global batches in one process and on each number of ranks; print how far the curves differ.

    Training is in float64, so that any difference is rounding.
    """
    task = TASKS[name]
    dataset = load(task.data, directory)
    if own := unequal_by_nature(task.new_model(dataset, seed)):
        return f"{name} left out: {own} differs between ranks by nature"
    if uneven := [size for size in ranks if task.batch_size % size]:
        return f"{name} left out: batches of {task.batch_size} are not cut evenly by {uneven[0]} ranks"
    one = curves(0, 1, name, steps, seed, directory)
    lines = [f"{name}, {steps} steps, seed {seed}: last rate {one['rate'][-1]:.3g}, last loss {one['loss'][-1]:.4g}"]
    for size in ranks:
        together = on_ranks(size, name, steps, seed, directory)
        differences = ", ".join(f"of the {key} {largest_difference(together[key], one[key]):.1e}" for key in one)
        lines.append(f"  {size} ranks: largest relative difference {differences}")
    return "\n".join(lines)


def unequal_by_nature(model: nn.Module) -> str | None:
    """Why the loss of a rank is not the loss of the whole batch, restricted to its slice."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return "batch norm, over a rank's own slice,"
        if isinstance(module, nn.Dropout) and module.p:
            return "dropout"
        if isinstance(module, VAE):
            return "the random code of an autoencoder"
    return None


def largest_difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs() / expected.abs()).nan_to_num(math.inf).max().item()


def on_ranks(size: int, *arguments: Any) -> Curves:
    """The curves of `size` processes in one gloo group, each of which trains on its slice of every batch."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, (size, Path(folder), *arguments), nprocs=size)
        return torch.load(Path(folder) / "curves.pt")


def run_rank(rank: int, size: int, folder: Path, *arguments: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=size)
    found = curves(rank, size, *arguments)
    if rank == 0:
        torch.save(found, folder / "curves.pt")
    dist.destroy_process_group()


def curves(rank: int, ranks: int, name: str, steps: int, seed: int, directory: Path) -> Curves:
    """The rate of every step and its loss, averaged over the ranks."""
    task = TASKS[name]
    dataset = in_float64(load(task.data, directory))
    model = task.new_model(dataset, seed).double()
    if ranks > 1:
        model = DistributedDataParallel(model)
    optimizer = gen.as_gen_optimizer(task.optimizer(model, 1e-3))
    scheduler = gen.AutoGen(optimizer, model, task.loss)
    rates, losses = [], []
    for x, y in task.batches(dataset, steps, seed, rank, ranks):
        optimizer.zero_grad()
        loss = task.loss(model(x), y)
        loss.backward()
        task.clipped(model)
        scheduler.step(x, y, loss=loss)
        optimizer.step()
        rates.append(scheduler.get_last_lr()[0])
        losses.append(loss.detach())
    mean = torch.stack(losses) / ranks
    if ranks > 1:
        dist.all_reduce(mean)
    return {"rate": torch.tensor(rates, dtype=torch.float64), "loss": mean}


def in_float64(dataset: Dataset) -> Dataset:
    """Convert images and numbers; tokens and labels stay as they are."""
    parts = (dataset.train_x, dataset.train_y, dataset.test_x, dataset.test_y)
    return Dataset(*(part.double() if part.is_floating_point() else part for part in parts), classes=dataset.classes)
