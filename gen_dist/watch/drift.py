"""Checks that ranks still hold equal values: a hash of every bit, compared by one small reduction."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from gen_dist.parallel import Layout, Ranks, local
from gen_dist.torch_private import tree_leaves

__all__ = ["check_in_sync"]

CHUNK = 2**20  # elements hashed at a time, 8 MiB
HALF = 2**32 - 1
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Number = bool | int | float


class Held(NamedTuple):
    """Something that this rank holds, and the ranks, this one among them, that hold the same."""

    what: str
    value: Tensor | str
    holders: tuple[int, ...]


@torch.no_grad()
def check_in_sync(layout: Layout, ranks: Ranks, optimizer: Optimizer, numbers: Mapping[str, object]) -> None:
    """Compare parameters, optimizer state and `numbers`, which all ranks hold. Collective.

    Costs one all-reduce of 16 bytes if all are equal. Raises `RuntimeError` on every rank, naming the first difference.
    """
    if ranks.size == 1:
        return
    layout.reshard()  # the root of an FSDP model would show its gathered weights
    everyone = tuple(range(ranks.size))
    held = [Held(what, repr(number), everyone) for what, number in numbers.items()]
    held += _tensors(layout, ranks, optimizer)
    hashes = _hashes([entry.value for entry in held])
    if ranks.sum(_zero_where_equal(held, hashes, ranks.rank)).any():
        raise RuntimeError(_difference(held, hashes, ranks))


def _zero_where_equal(held: list[Held], hashes: Tensor, rank: int) -> Tensor:
    """This rank's share of two sums over ranks that are zero where those that hold the same have equal hashes.

    The first holder of a part takes its hash `1 - n` times and the other `n - 1` once each. Halves of 32 bits add up
    exactly.
    """
    parts: dict[tuple[int, ...], list[int]] = {}
    for index, entry in enumerate(held):
        parts.setdefault(entry.holders, []).append(index)
    share = torch.zeros(2, dtype=torch.int64, device=hashes.device)
    for holders, indices in parts.items():
        of_part = hashes[torch.tensor(indices, device=hashes.device)]
        total = _mix((of_part * _odd(len(indices), hashes.device)).sum())
        times = 1 - len(holders) if rank == holders[0] else 1
        if len(holders) > 1:
            share += times * torch.stack([total & HALF, (total >> 32) & HALF])
    return share


def _difference(held: list[Held], hashes: Tensor, ranks: Ranks) -> str:
    """What differs first, and on which ranks. Collective."""
    # a part is known by its holders, who may be many
    own = [(e.what, zlib.crc32(repr(e.holders).encode()), h) for e, h in zip(held, hashes.tolist(), strict=True)]
    found: dict[str, dict[int, dict[int, int]]] = {}
    members: dict[int, set[int]] = {}
    for rank, text in enumerate(ranks.texts(json.dumps(own))):
        for what, part, value in json.loads(text):
            found.setdefault(what, {}).setdefault(part, {})[rank] = value
            members.setdefault(part, set()).add(rank)
    texts = []
    for what, parts in found.items():
        for part, values in parts.items():
            of_ranks = {rank: values.get(rank) for rank in sorted(members[part])}
            if len(set(of_ranks.values())) > 1:
                texts.append(f"{what} on {_apart(of_ranks)}")
    more = f" (the first of {len(texts)} differences)" if len(texts) > 1 else ""
    return f"ranks out of sync: {texts[0]}{more}. Load the last checkpoint that is good on all ranks."


def _apart(values: Mapping[int, int | None]) -> str:
    (usual, most), (_, second) = Counter(values.values()).most_common(2)
    apart = [str(rank) for rank, value in values.items() if value != usual]
    rest = [str(rank) for rank, value in values.items() if value == usual]
    others = f"the other {most}" if most > second else f"{_ranks(rest)}; no majority tells which is right"
    return f"{_ranks(apart)} {'differs' if len(apart) == 1 else 'differ'} from {others}"


def _ranks(names: list[str]) -> str:
    return f"rank{'s' * (len(names) > 1)} {', '.join(names)}"


# ---------------------------------------------------------------------------------------------- who holds what


def _tensors(layout: Layout, ranks: Ranks, optimizer: Optimizer) -> Iterator[Held]:
    """Every parameter of the model and of the optimizer, each followed by its state."""
    names = {parameter: name for name, parameter in layout.model.named_parameters()}
    for i, group in enumerate(optimizer.param_groups):
        for j, parameter in enumerate(group["params"]):
            names.setdefault(parameter, f"parameter {j} of group {i}")
    for parameter, name in names.items():
        of_parameter = layout.holders(parameter, ranks)
        yield Held(repr(name), parameter, of_parameter)
        state = optimizer.state.get(parameter, {})
        for key in sorted(state, key=str):
            for index, value in enumerate(tree_leaves(state[key])):
                what = f"state {key!r} of {name!r}" + f", value {index}" * (index > 0)
                if isinstance(value, Tensor) and local(value) is not value:  # it has a placement of its own
                    yield Held(what, value, layout.holders(value, ranks))
                elif isinstance(value, Tensor | Number):
                    counted = layout.holders_counting_steps(parameter, ranks) if key == "step" else of_parameter
                    yield Held(what, value if isinstance(value, Tensor) else repr(value), counted)


# ------------------------------------------------------------------------------------------------------ hashes


def _hashes(values: list[Tensor | str]) -> Tensor:
    """One int64 for each value, on the device of the tensors."""
    parts = [local(value.detach()) if isinstance(value, Tensor) else value for value in values]
    tensors = [part for part in parts if isinstance(part, Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    longest = max((t.numel() for t in tensors), default=0)
    factors = {each: _odd(min(longest, CHUNK), each) for each in {t.device for t in tensors}}
    hashes = [
        _of_text(part) if isinstance(part, str) else _of_tensor(part, factors[part.device]).to(device) for part in parts
    ]
    return torch.stack([torch.as_tensor(h, dtype=torch.int64, device=device) for h in hashes])


def _of_tensor(tensor: Tensor, factors: Tensor) -> Tensor:
    """From `sum_i f_i b_i` modulo 2^64 over the bits `b_i` of each element, `f_i` odd: no change of one goes unseen."""
    tensor = tensor if tensor.layout is torch.strided else tensor.to_dense()
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    bits = tensor.flatten().view(BITS[tensor.element_size()])
    # of 64 bits the highest alone would leave just one in the sum
    chunks = [((_fold(c) if c.dtype == torch.int64 else c) * factors[: len(c)]).sum() for c in bits.split(CHUNK)]
    return _mix((_mix(torch.stack(chunks)) * _odd(len(chunks), tensor.device)).sum() + len(bits) + 1)


def _of_text(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _odd(count: int, device: torch.device) -> Tensor:
    """Odd numbers without a pattern, the same everywhere."""
    return _mix(torch.arange(1, count + 1, device=device)) | 1


def _mix(x: Tensor) -> Tensor:
    """Scramble int64 one to one, after splitmix64, so that differences do not cancel in a sum."""
    for factor in (0x2545F4914F6CDD1D, 0x5851F42D4C957F2D):
        x = _fold(x) * factor
    return _fold(x)


def _fold(x: Tensor) -> Tensor:
    return x ^ ((x >> 32) & HALF)
