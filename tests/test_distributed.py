"""On N ranks the rate and the parameters are those of one process on the union batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import Pool
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gen_dist as gen

STEPS = 10
BATCH = 16
KINDS = ("replica", "ddp", "fsdp2")
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.01}),
}


class Block(nn.Module):
    """Pre-norm attention and perceptron; widths that no number of ranks divides evenly."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        # no bias: the gradient of a key's bias is zero but for rounding, which Adam would blow up to a direction
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.expand = nn.Linear(width, 13)
        self.contract = nn.Linear(13, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.contract(F.gelu(self.expand(x)))


class Model(nn.Module):
    """A tiny language model: embedding, two blocks, an output layer tied to the embedding."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList([Block(6), Block(6)])
        self.head = nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def criterion(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def new_model() -> Model:
    torch.manual_seed(1)
    return Model().double()


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 11, (STEPS, BATCH, 6), generator=generator)
    return [(t[:, :-1], t[:, 1:]) for t in tokens]


def parallel(model: nn.Module, kind: str) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "fsdp2":
        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block)
        fully_shard(model)
    return model


def boundaries(ranks: int, slices: str) -> list[int]:
    """Where a batch is cut: evenly, or so that the ranks' shares differ."""
    if slices == "equal":
        return [BATCH * r // ranks for r in range(ranks + 1)]
    return [0, *{1: [], 2: [5], 4: [1, 4, 9]}[ranks], BATCH]


def train(kind: str, curvature: str, optimizer_name: str, slices: str, probes: int = 2) -> reference.Run:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    inner = new_model()
    model = parallel(inner, kind)
    cls, arguments = OPTIMIZERS[optimizer_name]
    optimizer = gen.make_gen_optimizer(cls, model.parameters(), **arguments)
    scheduler = gen.GenScheduler(optimizer, model, criterion, curvature=curvature, probes=probes)
    cuts = boundaries(ranks, slices)
    run = reference.Run()
    for x, y in data():
        here = slice(cuts[rank], cuts[rank + 1])
        x, y = x[here], y[here]
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        share = len(x) / BATCH
        # DDP and FSDP average gradients evenly: unequal slices are weighted in the loss.
        (loss if kind == "replica" else loss * share * ranks).backward()
        scheduler.step(x, y, weight=len(x))
        optimizer.step()
        assert scheduler.last is not None
        run.rates.append(scheduler.last.lr)
        run.numerators.append(scheduler.last.numerator)
        run.denominators.append(scheduler.last.denominator)
        run.losses.append(scheduler.last.loss)
    for name, p in inner.named_parameters():
        whole = p.full_tensor() if hasattr(p, "full_tensor") else p
        run.parameters[name] = whole.detach().clone()
    return run


def expected(optimizer_name: str) -> reference.Run:
    model = new_model()
    cls, arguments = OPTIMIZERS[optimizer_name]
    return reference.train(model, criterion, cls(model.parameters(), **arguments), data())


def assert_same(run: reference.Run, oracle: reference.Run, tolerance: float) -> None:
    for name in ("losses", "numerators", "denominators", "rates"):
        torch.testing.assert_close(
            torch.tensor(getattr(run, name)), torch.tensor(getattr(oracle, name)), rtol=tolerance, atol=0
        )
    for name, p in oracle.parameters.items():
        torch.testing.assert_close(run.parameters[name], p, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("slices", ["equal", "unequal"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_exact_training_equals_one_process(
    pool: Callable[[int], Pool], ranks: int, kind: str, slices: str, optimizer: str
) -> None:
    runs = pool(ranks).run(train, kind, "exact", optimizer, slices)
    oracle = expected(optimizer)
    assert min(oracle.rates) > 0
    assert max(oracle.rates) < 1, "the clamp would hide differences"
    for run in runs:
        assert run.rates == runs[0].rates, "rates must be bitwise equal on all ranks"
        assert_same(run, oracle, 1e-10)
