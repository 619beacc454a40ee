"""Training on ranks, step by step, and the run of one process on the union batch that it must equal."""

from __future__ import annotations

import functools
from typing import Any

import reference
import torch
import torch.distributed as dist
from problems import BATCH, criterion, data, new_model, parallel, slice_here, whole

import gen_dist as gen

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.01}),
}


def train(kind: str, curvature: str, optimizer_name: str, slices: str, probes: int = 2) -> reference.Run:
    """What this rank sees when all ranks train the language model together."""
    inner = new_model()
    model = parallel(inner, kind)
    cls, arguments = OPTIMIZERS[optimizer_name]
    optimizer = gen.make_gen_optimizer(cls, model.parameters(), **arguments)
    scheduler = gen.GenScheduler(optimizer, model, criterion, curvature=curvature, probes=probes)
    here = slice_here(slices)
    run = reference.Run()
    for x, y in data():
        x, y = x[here], y[here]
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        share = len(x) / BATCH
        # DDP and FSDP average gradients evenly: unequal slices are weighted in the loss.
        (loss if kind == "replica" else loss * share * dist.get_world_size()).backward()
        scheduler.step(x, y, weight=len(x))
        optimizer.step()
        record(run, scheduler)
    run.parameters = {name: whole(p) for name, p in inner.named_parameters()}
    return run


def record(run: reference.Run, scheduler: gen.GenScheduler) -> None:
    """Append the scheduler's last update to the run."""
    assert scheduler.last is not None
    run.rates.append(scheduler.last.lr)
    run.numerators.append(scheduler.last.numerator)
    run.denominators.append(scheduler.last.denominator)
    run.losses.append(scheduler.last.loss)


@functools.cache
def expected(optimizer_name: str) -> reference.Run:
    """The run of one process, by double backward."""
    model = new_model()
    cls, arguments = OPTIMIZERS[optimizer_name]
    return reference.train(model, criterion, cls(model.parameters(), **arguments), data())


def assert_same(run: reference.Run, oracle: reference.Run, tolerance: float) -> None:
    """All numbers of the run are those of the oracle, within a relative tolerance."""
    for name in ("losses", "numerators", "denominators", "rates"):
        torch.testing.assert_close(
            torch.tensor(getattr(run, name)), torch.tensor(getattr(oracle, name)), rtol=tolerance, atol=0
        )
    for name, p in oracle.parameters.items():
        torch.testing.assert_close(run.parameters[name], p, rtol=tolerance, atol=tolerance)
