"""`check_in_sync`: one flipped bit on one rank is named on all of them, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from effects import Collectives
from rank_pool import Pool
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import gen_dist as gen
from gen_dist.watch import drift

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Network(nn.Module):
    """Widths that no number of ranks divides, a weight without dimensions, one that is frozen, one in bfloat16."""

    def __init__(self, half: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.second = nn.Linear(5, 2)
        self.scale = nn.Parameter(torch.tensor(1.0) if half else torch.ones(1))
        self.shift = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16 if half else torch.float32))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x * self.frozen))) * self.scale + self.shift.float()


def distributed(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = Network(half=kind in ("replica", "ddp"))
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "fsdp1":
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    if kind in ("fsdp2", "hsdp"):
        shape = (2, 2) if kind == "hsdp" else (dist.get_world_size(),)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])
        for module in (model.first, model):
            fully_shard(module, mesh=mesh)
    return model


class Training:
    """A model in training, each rank on data of its own."""

    def __init__(self, kind: str, make: Any = gen.GenScheduler, **options: Any) -> None:
        self.model = distributed(kind)
        self.optimizer = gen.make_gen_optimizer(torch.optim.AdamW, self.model.parameters(), lr=1e-2)
        self.scheduler = make(self.optimizer, self.model, nn.functional.cross_entropy, lr_max=0.1, **options)
        self.generator = torch.Generator().manual_seed(dist.get_rank())

    def step(self) -> None:
        x = torch.randn(6, 3, generator=self.generator)
        y = torch.randint(0, 2, (6,), generator=self.generator)
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(x), y).backward()
        self.scheduler.step(x, y)
        self.optimizer.step()

    def complaint(self) -> str:
        try:
            self.scheduler.check_in_sync()
        except RuntimeError as error:
            return str(error)
        return "none"


def flip(tensor: Tensor, place: int = -1, bit: int = 0) -> None:
    part = tensor.detach()
    part = part.to_local() if hasattr(part, "to_local") else part
    part.view(-1).view(INTEGERS[part.element_size()])[place] ^= 1 << bit


def flip_in(training: Training, what: str, key: str = "") -> None:
    parameter = dict(training.model.named_parameters())[what]
    flip(training.optimizer.state[parameter][key] if key else parameter)


# ---------------------------------------------------------------------------------------------- no false alarm


def ten_steps(kind: str, automatic: bool) -> list[tuple[str, int]]:
    """The collectives, with their bytes, of a check after ten steps that were each checked."""
    make: Any = gen.AutoGen if automatic else gen.GenScheduler
    training = Training(kind, make)
    if kind != "fsdp1":  # it has its shards from the first forward pass on
        training.scheduler.check_in_sync()
    for _ in range(10):
        training.step()
        training.scheduler.check_in_sync()
    with Collectives() as collectives:
        training.scheduler.check_in_sync()
    return collectives.seen


@pytest.mark.parametrize("automatic", [False, True], ids=["raw", "auto"])
@pytest.mark.parametrize("kind", ["replica", "ddp", "fsdp1", "fsdp2", "hsdp"])
@pytest.mark.timeout(60)
def test_ranks_in_sync_cost_one_small_reduction(pool: Callable[[int], Pool], kind: str, automatic: bool) -> None:
    assert pool(4).run(ten_steps, kind, automatic) == [[("allreduce", 16)]] * 4


def test_one_process_is_in_sync_with_itself() -> None:
    model = nn.Linear(2, 1)
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=0.1)
    gen.GenScheduler(optimizer, model).check_in_sync()


# ------------------------------------------------------------------------------------------------- a flipped bit


def after_a_flip(kind: str, what: str, key: str, where: int) -> str:
    training = Training(kind)
    training.step()
    training.step()
    if dist.get_rank() == where:
        flip_in(training, what, key)
    found = training.complaint()
    assert training.complaint() == found, "the check itself changes nothing"
    return found


CASES = [
    ("replica", "second.weight", "", "'second.weight'"),
    ("replica", "scale", "", "'scale'"),
    ("replica", "shift", "", "'shift'"),
    ("replica", "frozen", "", "'frozen'"),
    ("replica", "first.bias", "exp_avg", "state 'exp_avg' of 'first.bias'"),
    ("replica", "shift", "exp_avg_sq", "state 'exp_avg_sq' of 'shift'"),
    ("replica", "scale", "step", "state 'step' of 'scale'"),
    ("ddp", "module.first.weight", "", "'module.first.weight'"),
    ("ddp", "module.scale", "exp_avg", "state 'exp_avg' of 'module.scale'"),
    ("fsdp2", "first.weight", "step", "state 'step' of 'first.weight'"),
]


@pytest.mark.parametrize(("kind", "what", "key", "named"), CASES)
@pytest.mark.timeout(60)
def test_one_bit_on_one_rank_is_named_on_all(
    pool: Callable[[int], Pool], kind: str, what: str, key: str, named: str
) -> None:
    said = pool(4).run(after_a_flip, kind, what, key, 1)
    assert set(said) == {
        f"ranks out of sync: {named} on rank 1 differs from the other 3. "
        "Load the last checkpoint that is good on all ranks."
    }


@pytest.mark.parametrize(("key", "named"), [("", "'second.weight'"), ("exp_avg", "state 'exp_avg' of 'second.weight'")])
@pytest.mark.timeout(60)
def test_shards_are_compared_between_the_replicas_of_a_mesh(pool: Callable[[int], Pool], key: str, named: str) -> None:
    for said in pool(4).run(after_a_flip, "hsdp", "second.weight", key, 3):
        assert f"{named} on rank 3 differs from rank 1; no majority" in said


def test_a_shard_that_no_other_rank_holds_cannot_be_compared(pool: Callable[[int], Pool]) -> None:
    assert pool(4).run(after_a_flip, "fsdp2", "first.weight", "", 1) == ["none"] * 4


def differing(training: Training, what: str) -> None:
    """Let one of the numbers that decide the next rate differ on rank 2, in its last bit where it is a float."""
    scheduler, here = training.scheduler, dist.get_rank() == 2
    state, group = scheduler.state, training.optimizer.param_groups[0]
    if what == "the learning rate":
        rate = torch.tensor(group["lr"], dtype=torch.float64)
        if here:
            flip(rate)
        group["lr"] = rate.item()
    elif what == "the base learning rates":
        scheduler.base_lrs[0] += here
    elif what == "the companions' state":
        next(c for c in scheduler.companions if isinstance(c, gen.Verification)).updates += here
    else:
        scheduler.state = state._replace(**{what: getattr(state, what) + here})


def other_numbers(kind: str, what: str) -> str:
    training = Training(kind, companions=[gen.Verification()])
    training.step()
    differing(training, what)
    return training.complaint()


NUMBERS = ["the learning rate", "the base learning rates", "the companions' state", "rate", "probe", "step"]


@pytest.mark.parametrize("what", NUMBERS)
@pytest.mark.parametrize("kind", ["replica", "fsdp2"])
@pytest.mark.timeout(60)
def test_numbers_that_decide_the_next_rate_are_compared(pool: Callable[[int], Pool], kind: str, what: str) -> None:
    for said in pool(4).run(other_numbers, kind, what):
        named = what if what.startswith("the ") else "the scheduler's state"
        assert said.startswith(f"ranks out of sync: {named} on rank 2 differs from the other 3.")


def two_differences() -> str:
    training = Training("replica")
    training.step()
    differing(training, "the learning rate")
    differing(training, "rate")
    return training.complaint()


def test_the_first_of_several_differences_is_named(pool: Callable[[int], Pool]) -> None:
    for said in pool(4).run(two_differences):
        assert "the learning rate on rank 2 differs from the other 3 (the first of 2 differences)" in said


# ------------------------------------------------------------------------------------------------- in training


def raises_in_training(every: int) -> tuple[int, str, bool]:
    """The step after which a check raises for a bit that flipped in the first, what it says, what it has changed."""
    training = Training("replica")
    for step in range(8):
        before = training.scheduler.state_dict()
        try:
            if step and step % every == 0:
                training.scheduler.check_in_sync()
        except RuntimeError as error:
            return step, str(error), training.scheduler.state_dict() == before
        training.step()
        if step == 0 and dist.get_rank() == 0:
            flip_in(training, "second.bias")
    return -1, "", False


@pytest.mark.parametrize(("every", "at"), [(1, 1), (3, 3)])
@pytest.mark.timeout(60)
def test_a_check_in_the_loop_after_every_so_many_steps(pool: Callable[[int], Pool], every: int, at: int) -> None:
    for step, said, unchanged in pool(4).run(raises_in_training, every):
        assert step == at
        if every == 1:
            assert "'second.bias' on rank 0 differs from the other 3" in said
        assert unchanged


# --------------------------------------------------------------------------------------------------- the hash


def hash_of(tensor: Tensor) -> int:
    return int(drift._hashes([tensor])[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_hash_sees_every_bit(dtype: torch.dtype) -> None:
    tensor = torch.randn(7).to(dtype)
    seen = {hash_of(tensor)}
    for place in range(7):
        for bit in range(tensor.element_size() * 8 - 1):
            flip(tensor, place, bit)
            seen.add(hash_of(tensor))
            flip(tensor, place, bit)
    assert len(seen) == 1 + 7 * (tensor.element_size() * 8 - 1)


def test_the_hash_sees_places_across_its_chunks() -> None:
    tensor = torch.zeros(2 * drift.CHUNK + 3)
    seen = set()
    for place in (0, 1, drift.CHUNK - 1, drift.CHUNK, 2 * drift.CHUNK, -1):
        tensor[place] = 1
        seen.add(hash_of(tensor))
        tensor[place] = 0
    assert len(seen) == 6


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(1.5),
        torch.zeros(0),
        torch.tensor([True, False]),
        torch.tensor([1 + 2j]),
        torch.randn(4, 4).t()[1:],
        torch.eye(3).to_sparse(),
    ],
    ids=["no dimensions", "empty", "boolean", "complex", "strided", "sparse"],
)
def test_the_hash_takes_any_tensor(tensor: Tensor) -> None:
    assert hash_of(tensor) == hash_of(tensor.clone())
    if tensor.numel():
        assert hash_of(tensor) != hash_of(torch.zeros_like(tensor))
