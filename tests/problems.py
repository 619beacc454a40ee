"""What the tests train: models, data and criteria, and the ways to spread a model over ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

STEPS = 10
BATCH = 16
KINDS = ("replica", "ddp", "fsdp2")

# ------------------------------------------------------------------------------------------- a language model


class Block(nn.Module):
    """Pre-norm attention and a perceptron, with widths that no number of ranks divides evenly."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        # no bias: the gradient of a key's bias is zero up to rounding, and Adam would make a direction of it
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.expand = nn.Linear(width, 13)
        self.contract = nn.Linear(13, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.contract(F.gelu(self.expand(x)))


class Model(nn.Module):
    """A tiny language model: an embedding, two blocks, and an output layer that is tied to the embedding."""

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


def new_model() -> Model:
    """The language model in float64, with the same weights at every call."""
    torch.manual_seed(1)
    return Model().double()


def criterion(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy, averaged over all tokens."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def data(steps: int = STEPS, batch: int = BATCH, seed: int = 2) -> list[tuple[Tensor, Tensor]]:
    """A batch of random tokens for each step, and as its targets the tokens that follow."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 11, (steps, batch, 6), generator=generator)
    return [(t[:, :-1], t[:, 1:]) for t in tokens]


# --------------------------------------------------------------------------------------------- small problems


def perceptron(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Two linear layers with a tanh between them."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def noisy_regression(training: bool = True) -> tuple[nn.Module, Tensor, Tensor]:
    """A network with buffers and with random numbers, and a batch for the mean square error."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(0.3), nn.Linear(7, 3)).double()
    return model.train(training), torch.randn(8, 5).double(), torch.randn(8, 3).double()


def half_mean_square(output: Tensor, target: Tensor) -> Tensor:
    """`1/(2M) sum |e|^2` over the `M` samples of the batch, as in the paper."""
    return (output - target).square().sum() / (2 * len(target))


class OfDict(nn.Module):
    """A model that takes its batch as a dictionary, like the models of transformers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.inner(batch["input"])


# ----------------------------------------------------------------------------------------------------- on ranks


def parallel(model: nn.Module, kind: str) -> nn.Module:
    """`model` as this kind of parallelism has it; "replica" leaves it as it is."""
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "ddp bucket views":
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    if kind in ("fsdp1", "fsdp1 flat"):
        options: dict[str, Any] = {"use_orig_params": kind == "fsdp1", "device_id": torch.device("cpu")}
        return FullyShardedDataParallel(model, **options)
    if kind == "fsdp2":
        for block in getattr(model, "blocks", ()):
            fully_shard(block)
        fully_shard(model)
    return model


def boundaries(ranks: int, slices: str) -> list[int]:
    """Where a batch is cut: evenly, or so that the ranks have different shares of it."""
    if slices == "equal":
        return [BATCH * r // ranks for r in range(ranks + 1)]
    return [0, *{1: [], 2: [5], 4: [1, 4, 9]}[ranks], BATCH]


def slice_here(slices: str = "equal") -> slice:
    """This rank's part of a batch; the whole batch if there are no ranks."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    cuts = boundaries(ranks, slices)
    return slice(cuts[rank], cuts[rank + 1])


def whole(p: Tensor) -> Tensor:
    """A copy of the whole parameter, gathered from all ranks if it is sharded."""
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()


def shard(p: Tensor) -> Tensor:
    """The part of a parameter that this rank holds."""
    return getattr(p, "_local_tensor", p)
