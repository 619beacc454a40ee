"""Every way to spread a model over ranks: the first updates equal those of one process on the union batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rank_pool import Pool
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import gen_dist as gen
from gen_dist.parallel import Layout

STEPS = 3
BATCH = 8


class Block(nn.Module):
    """A feed-forward network beside a residual; widths that 4 ranks divide evenly here and not elsewhere."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 12)
        self.contract = nn.Linear(12, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.contract(F.gelu(self.expand(self.norm(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 6)
        self.blocks = nn.ModuleList([Block(6), Block(6)])
        self.head = nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.tensor([1.3]))  # one element: empty shards

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x) * self.scale


def new_model() -> Model:
    torch.manual_seed(1)
    return Model().double()


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(BATCH, 5, generator=generator).double(), torch.randint(0, 3, (BATCH,), generator=generator))
        for _ in range(STEPS)
    ]


# Each makes a model parallel and says how many ways the batch is cut and which part is this rank's.
Parallel = Callable[[Model], tuple[nn.Module, int, int]]


def over_all(model: nn.Module) -> tuple[nn.Module, int, int]:
    return model, dist.get_world_size(), dist.get_rank()


def replica(model: Model) -> tuple[nn.Module, int, int]:
    return over_all(model)


def ddp(**arguments: Any) -> Parallel:
    return lambda model: over_all(DistributedDataParallel(model, **arguments))


def fsdp2(mesh: DeviceMesh | None = None, blocks: bool = True, **arguments: Any) -> Parallel:
    def apply(model: Model) -> tuple[nn.Module, int, int]:
        for block in model.blocks if blocks else ():
            fully_shard(block, mesh=mesh, **arguments)
        return over_all(fully_shard(model, mesh=mesh, **arguments))

    return apply


def fsdp2_columns(model: Model) -> tuple[nn.Module, int, int]:
    """Cut along the second dimension where it can be divided evenly, which FSDP2 asks for."""

    def dimension(p: nn.Parameter) -> Shard:
        return Shard(1 if p.ndim > 1 and p.shape[1] % dist.get_world_size() == 0 else 0)

    return fsdp2(shard_placement_fn=dimension)(model)


def fsdp2_nested(model: Model) -> tuple[nn.Module, int, int]:
    for block in model.blocks:
        fully_shard(block.expand)
        fully_shard(block)
    fully_shard([model.embed, model.head])
    return over_all(fully_shard(model))


def fsdp1(**arguments: Any) -> Parallel:
    def apply(model: Model) -> tuple[nn.Module, int, int]:
        policy = ModuleWrapPolicy({Block})
        return over_all(FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id="cpu", **arguments))

    return apply


def hsdp(model: Model) -> tuple[nn.Module, int, int]:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    return fsdp2(mesh)(model)


def tensor_parallel(model: Model, mesh: DeviceMesh | None = None) -> tuple[nn.Module, int, int]:
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        parallelize_module(block, mesh, {"expand": ColwiseParallel(), "contract": RowwiseParallel()})
    return model, 1, 0


def fsdp2_tensor_parallel(model: Model) -> tuple[nn.Module, int, int]:
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))
    tensor_parallel(model, mesh["tensor"])
    fsdp2(mesh["data"])(model)
    return model, mesh["data"].size(), mesh["data"].get_local_rank()


KINDS: dict[str, Parallel] = {
    "replicas": replica,
    "ddp": ddp(),
    "ddp static graph": ddp(static_graph=True),
    "ddp bucket views": ddp(gradient_as_bucket_view=True),
    "ddp find unused": ddp(find_unused_parameters=True),
    "fsdp2": fsdp2(),
    "fsdp2 root only": fsdp2(blocks=False),
    "fsdp2 nested": fsdp2_nested,
    "fsdp2 columns": fsdp2_columns,
    "fsdp2 no reshard": fsdp2(reshard_after_forward=False),
    "fsdp2 reshard": fsdp2(reshard_after_forward=True),
    "fsdp2 reshard to 2": fsdp2(reshard_after_forward=2),
    "fsdp1": fsdp1(use_orig_params=True),
    "fsdp1 flat": fsdp1(use_orig_params=False),
    "fsdp1 grad op": fsdp1(use_orig_params=True, sharding_strategy=ShardingStrategy.SHARD_GRAD_OP),
    "hsdp": hsdp,
    "tp": tensor_parallel,
    "fsdp2 x tp": fsdp2_tensor_parallel,
}
ESTIMATORS = {
    "exact": ("exact", 2),
    "gauss-newton": ("gauss-newton", 2),
    "forward-2": ("forward", 2),
    "forward-1": ("forward", 1),
}


def train(kind: str, curvature: str, probes: int) -> list[tuple[float, ...]]:
    model, parts, part = KINDS[kind](new_model())
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), lr=1e-2)
    scheduler = gen.GenScheduler(optimizer, model, F.cross_entropy, curvature=curvature, probes=probes)
    updates = []
    for x, y in data():
        here = slice(BATCH * part // parts, BATCH * (part + 1) // parts)
        optimizer.zero_grad()
        F.cross_entropy(model(x[here]), y[here]).backward()
        scheduler.step(x[here], y[here])
        optimizer.step()
        assert scheduler.last is not None
        updates.append(scheduler.last[:4])
    return updates


@functools.cache
def expected(curvature: str, probes: int) -> list[tuple[float, ...]]:
    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rate, updates = 1e-2, []
    for x, y in data():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        d = reference.direction(model, optimizer)
        slope, curve = reference.estimate(model, F.cross_entropy, x, y, d, curvature, rate, probes)
        loss = F.cross_entropy(model(x), y).item()
        rate = min(slope / curve, 1.0) if curve > 0 else rate
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        updates.append((rate, slope, curve, loss))
    return updates


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_equals_one_process(pool: Callable[[int], Pool], ranks: int, kind: str, estimator: str) -> None:
    oracle = expected(*ESTIMATORS[estimator])
    results = pool(ranks).run(train, kind, *ESTIMATORS[estimator])
    for updates in results:
        assert updates == results[0], "bitwise equal on all ranks"
        for seen, true in zip(updates, oracle, strict=True):
            assert seen == pytest.approx(true, rel=1e-9)


def lets_go_before_the_first_forward(kind: str) -> tuple[float, float]:
    """Losses of one model that let go of its gathered weights before it had any, and of one that did not."""
    x, y = data()[0]
    models = [KINDS[kind](new_model())[0] for _ in range(2)]
    Layout(models[0]).reshard()
    here, there = (F.cross_entropy(model(x), y).item() for model in models)
    return here, there


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp1 flat", "fsdp2"])
def test_a_resumed_run_may_evaluate_first(pool: Callable[[int], Pool], kind: str) -> None:
    for here, there in pool(2).run(lets_go_before_the_first_forward, kind):
        assert here == there
