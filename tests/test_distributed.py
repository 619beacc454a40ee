"""On N ranks, the rate and the parameters equal those of one process on the union batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import reference
import torch
import torch.distributed as dist
from effects import Collectives
from problems import KINDS, criterion, data, new_model, parallel, shard, slice_here
from rank_pool import Pool
from torch import Tensor, nn
from training import OPTIMIZERS, assert_same, expected, train

import gen_dist as gen


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
    assert max(oracle.rates) < 1, "no rate may reach the clamp, which would hide differences"
    for run in runs:
        assert run.rates == runs[0].rates, "rates must be bitwise equal on all ranks"
        assert_same(run, oracle, 1e-10)


# ------------------------------------------------------------------------------------ the other estimators


def first_update(kind: str, curvature: str, probes: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The numbers of the first update on ranks, and the same numbers from the reference on the union batch."""
    x, y = data()[0]
    here = slice_here()
    model = parallel(new_model(), kind)
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), lr=1e-2)
    scheduler = gen.GenScheduler(optimizer, model, criterion, curvature=curvature, probes=probes)
    criterion(model(x[here]), y[here]).backward()
    scheduler.step(x[here], y[here])
    assert scheduler.last is not None

    plain = new_model()
    criterion(plain(x), y).backward()
    d = reference.direction(plain, torch.optim.AdamW(plain.parameters(), lr=1.0))
    oracle = reference.estimate(plain, criterion, x, y, d, curvature, 1e-2, probes)
    return (scheduler.last.numerator, scheduler.last.denominator), oracle


@pytest.mark.parametrize(("curvature", "probes"), [("gauss-newton", 0), ("forward", 1), ("forward", 2)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_other_estimators_equal_one_process(
    pool: Callable[[int], Pool], ranks: int, kind: str, curvature: str, probes: int
) -> None:
    for seen, oracle in pool(ranks).run(first_update, kind, curvature, probes or 2):
        assert seen == pytest.approx(oracle, rel=1e-9)


# ---------------------------------------------------------------------------------------- what is communicated


def collectives(kind: str, curvature: str, probes: int) -> list[list[tuple[str, int]]]:
    """The collectives of three calls of `scheduler.step`. The second call is no update."""
    model = parallel(new_model(), kind)
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters())
    scheduler = gen.GenScheduler(
        optimizer,
        model,
        criterion,
        curvature=curvature,
        probes=probes,
        update_every=2,
        companions=[gen.SelfCheck(None)],
    )
    steps = []
    for x, y in data()[:3]:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        with Collectives() as collectives:
            scheduler.step(x, y, loss=loss)
        steps.append(collectives.seen)
        optimizer.step()
    return steps


PACKED = ("allreduce", 128)
FINITE = ("allreduce", 4)  # of shards: whether every gradient is finite must be agreed upon first


@pytest.mark.parametrize("curvature", ["exact", "gauss-newton", "forward"])
def test_replicas_and_ddp_communicate_one_small_reduction_an_update(
    pool: Callable[[int], Pool], curvature: str
) -> None:
    assert pool(2).run(collectives, "ddp", curvature, 2)[0] == [[PACKED], [], [PACKED]]
    # replicas: the gradients, in one bucket here, at every step
    weights = new_model()
    count = sum(p.numel() for p in weights.parameters()) + len([*weights.parameters()]) + 1
    bucket = ("allreduce", 8 * count)
    assert pool(2).run(collectives, "replica", curvature, 2)[0] == [[bucket, PACKED], [bucket], [bucket, PACKED]]


def units_gathered(ranks: int) -> list[tuple[str, int]]:
    """One gather for each unit of FSDP2, in the order in which the units run: the root, and then each block."""
    model = new_model()
    blocks = [[*block.parameters()] for block in model.blocks]
    of_blocks = {id(p) for block in blocks for p in block}
    units = [[p for p in model.parameters() if id(p) not in of_blocks], *blocks]
    padded = [[-(-len(p) // ranks) * ranks * p[0].numel() * 8 for p in unit] for unit in units]
    return [("allgather_base", sum(sizes)) for sizes in padded]


@pytest.mark.parametrize("ranks", [2, 4])
def test_fsdp2_probes_communicate_what_forward_passes_do(pool: Callable[[int], Pool], ranks: int) -> None:
    forward = units_gathered(ranks)
    for probes in (1, 2):
        update = [FINITE, *(probes * forward), PACKED]
        assert pool(ranks).run(collectives, "fsdp2", "forward", probes)[0] == [update, [FINITE], update]


@pytest.mark.parametrize("curvature", ["exact", "gauss-newton"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_fsdp2_jets_gather_each_block_and_its_direction_once(
    pool: Callable[[int], Pool], ranks: int, curvature: str
) -> None:
    each_twice = [gather for gather in units_gathered(ranks) for _ in range(2)]
    update = [FINITE, *each_twice, PACKED]
    assert pool(ranks).run(collectives, "fsdp2", curvature, 2)[0] == [update, [FINITE], update]


def gathers_around_blocks(curvature: str) -> list[list[str]]:
    """The gathers of two updates and the starts of blocks, in the order in which they happen."""
    model = parallel(new_model(), "fsdp2")
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters())
    unchecked = [gen.SelfCheck(None)]
    scheduler = gen.GenScheduler(optimizer, model, criterion, curvature=curvature, companions=unchecked)
    updates = []
    for x, y in data()[:2]:
        criterion(model(x), y).backward()
        with Collectives() as collectives:
            hooks = [
                block.register_forward_pre_hook(lambda *_, seen=collectives.seen: seen.append(("block", 0)))
                for block in model.blocks
            ]
            scheduler.step(x, y)
            for hook in hooks:
                hook.remove()
        updates.append([name for name, _ in collectives.seen if name != "allreduce"])
        optimizer.step()
    return updates


@pytest.mark.parametrize("curvature", ["exact", "gauss-newton"])
def test_fsdp2_jets_gather_the_next_direction_before_a_block_computes(
    pool: Callable[[int], Pool], curvature: str
) -> None:
    gather = "allgather_base"
    blocks = len(new_model().blocks)
    first, second = pool(2).run(gathers_around_blocks, curvature)[0]
    # weights and direction of the root, then of each block; a hook of the user's sees the weights, not the direction
    assert first == [gather, gather] + blocks * [gather, "block", gather]
    assert second == [gather, gather, gather] + (blocks - 1) * [gather, "block", gather] + [gather, "block"]


def averaged(dtype: torch.dtype, weight_here: list[float], bucket_elements: int) -> list[Tensor | None]:
    from gen_dist.parallel import Ranks
    from gen_dist.parallel import gradients as module

    rank = dist.get_rank()
    everywhere, somewhere, nowhere, sparse = (nn.Parameter(torch.ones(3, 2, dtype=dtype)) for _ in range(4))
    everywhere.grad = torch.full((3, 2), float(rank), dtype=dtype)
    if rank == 0:
        somewhere.grad = torch.ones(3, 2, dtype=dtype)
    index = torch.tensor([[rank]])
    sparse.grad = torch.sparse_coo_tensor(index, torch.ones(1, 2, dtype=dtype), (3, 2))
    before = module.BUCKET_ELEMENTS
    module.BUCKET_ELEMENTS = bucket_elements
    parameters = [everywhere, somewhere, nowhere, sparse]
    module.average_gradients(parameters, Ranks(), weight_here[rank])
    module.BUCKET_ELEMENTS = before
    return [p.grad for p in parameters]


@pytest.mark.parametrize("bucket_elements", [1, 12, 10**6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("weights", "shares"), [([1, 1], [0.5, 0.5]), ([3, 1], [0.75, 0.25]), ([0, 2], [0, 1])])
def test_gradients_of_replicas_are_averaged_with_their_weights(
    pool: Callable[[int], Pool], weights: list[float], shares: list[float], dtype: torch.dtype, bucket_elements: int
) -> None:
    for everywhere, somewhere, nowhere, sparse in pool(2).run(averaged, dtype, weights, bucket_elements):
        assert torch.equal(everywhere, torch.full((3, 2), shares[1], dtype=dtype))
        assert torch.equal(somewhere, torch.full((3, 2), shares[0], dtype=dtype))
        assert nowhere is None
        assert torch.equal(sparse, torch.tensor([[shares[0]] * 2, [shares[1]] * 2, [0, 0]], dtype=dtype))


# ----------------------------------------------------------------------------------------- one outcome for all


def fails_on_one_rank(kind: str, curvature: str) -> str:
    rank = dist.get_rank()
    model = parallel(new_model(), kind)
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters())
    scheduler = gen.GenScheduler(optimizer, model, criterion, curvature=curvature)
    x, y = data()[0]
    before = [p.detach().clone() for p in model.parameters()]

    def closure() -> Tensor:
        if rank == 1:
            raise OSError("disk full")
        return criterion(model(x), y)

    criterion(model(x), y).backward()
    try:
        scheduler.step(closure=closure)
    except Exception as error:
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        scheduler.step(x, y)  # training can go on
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize("curvature", ["exact", "forward"])
@pytest.mark.parametrize("kind", ["replica", "ddp"])
def test_an_error_on_one_rank_is_raised_on_all(pool: Callable[[int], Pool], kind: str, curvature: str) -> None:
    here, there = pool(2).run(fails_on_one_rank, kind, curvature)
    assert there == "OSError: disk full"
    assert here.startswith("RuntimeError")
    assert "rank 1 (OSError: disk full)" in here


def disagrees() -> str:
    model = new_model()
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters())
    scheduler = gen.ExactGen(optimizer, model, criterion, lr_max=1.0 + dist.get_rank())
    x, y = data()[0]
    criterion(model(x), y).backward()
    try:
        scheduler.step(x, y)
    except ValueError as error:
        return str(error)
    return "no error"


def test_ranks_that_disagree_on_settings_are_told(pool: Callable[[int], Pool]) -> None:
    for message in pool(2).run(disagrees):
        assert "disagree" in message
        assert "rank 0: lr_min=0.0, lr_max=1.0" in message
        assert "rank 1: lr_min=0.0, lr_max=2.0" in message


def one_bad_gradient(kind: str) -> tuple[str, float, list[bool]]:
    model = parallel(new_model(), kind)
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), lr=0.01)
    scheduler = gen.ExactGen(optimizer, model, criterion)
    x, y = data()[0]
    criterion(model(x), y).backward()
    if dist.get_rank() == 1:  # in this rank's shard, or its copy, alone
        gradient = next(p.grad for p in model.parameters() if p.grad is not None)
        shard(gradient).view(-1)[0] = float("nan")
    before = [p.detach().clone() for p in model.parameters()]
    scheduler.step(x, y)
    optimizer.step()
    assert scheduler.last is not None
    same = [torch.equal(shard(p), shard(b)) for p, b in zip(model.parameters(), before, strict=True)]
    return scheduler.last.reason, scheduler.last.lr, same


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_not_finite_on_one_rank_stops_all(pool: Callable[[int], Pool], kind: str) -> None:
    for reason, lr, same in pool(2).run(one_bad_gradient, kind):
        assert reason == "not finite"
        assert lr == 0.01
        assert all(same)


def empty_slice(pass_it: bool) -> tuple[float, ...]:
    """Rank 1 has no samples: its mean loss is NaN, and its weight is 0."""
    model = new_model()
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters())
    scheduler = gen.ExactGen(optimizer, model, criterion)
    x, y = data()[0]
    if dist.get_rank() == 1:
        x, y = x[:0], y[:0]
    if len(x) or pass_it:
        criterion(model(x), y).backward()
        scheduler.step(x, y, weight=len(x))
    else:
        scheduler.step(weight=0)
    assert scheduler.last is not None
    return scheduler.last[:4]


@pytest.mark.parametrize("pass_it", [True, False])
def test_a_rank_without_samples(pool: Callable[[int], Pool], pass_it: bool) -> None:
    model = new_model()
    x, y = data()[0]
    criterion(model(x), y).backward()
    d = reference.direction(model, torch.optim.AdamW(model.parameters()))
    loss, slope, curvature = reference.derivatives(lambda: criterion(model(x), y), [*model.parameters()], d)
    for lr, *seen in pool(2).run(empty_slice, pass_it):
        assert lr == pytest.approx(slope / curvature, rel=1e-10)
        assert seen == pytest.approx([slope, curvature, loss], rel=1e-10)


def half_of_the_model(kind: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """An optimizer over some parameters, with the others frozen."""
    inner, plain = new_model(), new_model()
    for model in (inner, plain):
        model.embedding.weight.requires_grad_(False)
        model.blocks[1].norm.requires_grad_(False)
    model = parallel(inner, kind)
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, [p for p in model.parameters() if p.requires_grad])
    scheduler = gen.ExactGen(optimizer, model, criterion)
    x, y = data()[0]
    here = slice_here()
    criterion(model(x[here]), y[here]).backward()
    scheduler.step(x[here], y[here])
    criterion(plain(x), y).backward()
    weights = [p for p in plain.parameters() if p.requires_grad]
    twin = torch.optim.AdamW(weights, lr=1.0)
    d = [v for v, p in zip(reference.direction(plain, twin), plain.parameters(), strict=True) if p.requires_grad]
    assert scheduler.last is not None
    return scheduler.last[1:4], reference.derivatives(lambda: criterion(plain(x), y), weights, d)


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_over_part_of_the_model(pool: Callable[[int], Pool], kind: str) -> None:
    for (numerator, denominator, loss), oracle in pool(2).run(half_of_the_model, kind):
        assert (loss, numerator, denominator) == pytest.approx(oracle, rel=1e-10)


def in_a_subgroup() -> list[float]:
    """Two pairs of ranks train independently, each pair in its own group and on its own data."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair = dist.get_rank() // 2
    model = new_model()
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters())
    scheduler = gen.ExactGen(optimizer, model, criterion, process_group=pairs[pair])
    for x, y in data()[3 * pair : 3 * pair + 2]:
        here = slice(8 * (dist.get_rank() % 2), 8 * (dist.get_rank() % 2) + 8)
        optimizer.zero_grad()
        criterion(model(x[here]), y[here]).backward()
        scheduler.step(x[here], y[here])
        optimizer.step()
    return scheduler.get_last_lr()


def test_process_groups_keep_to_themselves(pool: Callable[[int], Pool]) -> None:
    a, b, c, d = pool(4).run(in_a_subgroup)
    assert a == b
    assert c == d
    for pair, rates in ((0, a), (1, c)):
        model = new_model()
        batches = data()[3 * pair : 3 * pair + 2]
        run = reference.train(model, criterion, torch.optim.AdamW(model.parameters()), batches)
        assert rates == pytest.approx(run.rates[-1:], rel=1e-10)
