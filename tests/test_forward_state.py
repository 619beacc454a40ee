"""A measuring pass changes nothing: a twin that never measured has the same weights, state and losses, bit for bit."""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Callable
from typing import Any, Optional

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from problems import shard
from rank_pool import Pool
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gen_dist as gen
from gen_dist.jets import Jet

# --------------------------------------------------------------------------------------------------------- the zoo


def mlp(width: int = 4, out: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 5), nn.Tanh(), nn.Linear(5, out))


class Teacher(nn.Module):
    """A momentum teacher that follows in forward."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.student, self.teacher, self.how = mlp(), mlp(), how
        if how != "not frozen":
            self.teacher.requires_grad_(False)
        if how == "outweighs":  # and is not copied whole for each pass
            self.base = nn.Linear(20, 20).requires_grad_(False)
        if how == "hidden":
            self.hidden = [self.teacher]
            del self.teacher

    def follow(self, module: nn.Module, name: str, to: Tensor) -> None:
        at = getattr(module, name)
        match self.how:
            case "assigned":
                at.data = 0.9 * at.data + 0.1 * to.data
            case "data in place" | "outweighs":
                at.data.mul_(0.9).add_(to.data, alpha=0.1)
            case "replaced":
                setattr(module, name, nn.Parameter(0.9 * at + 0.1 * to.detach(), requires_grad=False))
            case "lerp":
                torch._foreach_lerp_([at], [to.detach()], 0.1)
            case _:
                at.copy_(0.9 * at + 0.1 * to)

    def forward(self, x: Tensor) -> Tensor:
        teacher = self.hidden[0] if self.how == "hidden" else self.teacher
        with torch.no_grad():
            for of_student, module in zip(self.student.modules(), teacher.modules(), strict=True):
                for name, to in list(of_student.named_parameters(recurse=False)):
                    self.follow(module, name, to)
            target = teacher(x)
        return self.student(x) - 0.1 * target


class Recurrent(nn.Module):
    """The state of a stream in an attribute, made at the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.RNNCell(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.h = self.cell(x, self.h.detach() if hasattr(self, "h") else torch.zeros(6, 5))
        return self.out(self.h)


class Memory(nn.Module):
    """Keeps what it has seen in a list, a deque, a dict, a set, an object with slots, and an attribute of its class."""

    shared: dict[str, Any] = {}  # noqa: RUF012
    calls = 0

    class Slots:
        __slots__ = ("last",)

    def __init__(self) -> None:
        super().__init__()
        self.f, self.listed, self.dict, self.seen = mlp(), [], {"k": {}}, set()  # type: ignore[var-annotated]
        self.recent: deque[Tensor] = deque(maxlen=3)
        self.object, self.array = self.Slots(), np.zeros(3)
        self.of_this_call: Tensor | None = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        past = [*self.listed[-2:], *self.recent, *self.dict["k"].values()]
        past += [self.object.last] if hasattr(self.object, "last") else []
        self.listed.append(y)
        self.listed[-1] = y.detach()
        self.recent.append(y.detach() + 1)
        self.dict["k"]["moving" if len(self.seen) % 2 else "other"] = y.detach()
        self.dict.setdefault("jet", y)  # not detached: must not survive
        self.dict["jet"] = y
        self.seen.add(len(self.seen))
        self.object.last = y.detach()
        self.array += 1
        self.kept = (y, [y])
        if hasattr(self, "of_this_call"):
            del self.of_this_call
        else:
            self.of_this_call = y
        type(self).calls += 0
        return y + 0.01 * sum(past) + 0.001 * float(self.array.sum())


class Queue(nn.Module):
    """MoCo's queue and pointer, written in place; a count that is an int; a schedule inside forward."""

    queue: Tensor
    pointer: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.f, self.calls, self.plain = mlp(), 0, torch.zeros(6, 3)
        self.register_buffer("queue", torch.randn(24, 3))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        logits = y @ self.queue.clone().t()
        with torch.no_grad():
            at = int(self.pointer)
            self.queue[at : at + 6] = y
            self.pointer.fill_((at + 6) % 24)
            self.plain.copy_(y)
        self.calls += 1
        self.train(self.calls % 4 > 0)
        return y * (1 + (self.calls % 3)) + 0.01 * logits.sum(1, keepdim=True) + self.plain


class Codebook(nn.Module):
    """VQ-VAE's codebook with moving averages, and ActNorm's initialisation by the first data."""

    codes: Tensor
    counts: Tensor
    ready: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.f, self.shift = mlp(), nn.Parameter(torch.zeros(3))
        self.register_buffer("codes", torch.randn(4, 3))
        self.register_buffer("counts", torch.ones(4))
        self.register_buffer("ready", torch.tensor(False))
        self.scale: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        with torch.no_grad():
            if not bool(self.ready):
                self.scale = 1 / y.std(0)
                self.ready.fill_(True)
            chosen = F.one_hot(torch.cdist(y, self.codes).argmin(1), 4).to(y)
            self.counts = 0.9 * self.counts + 0.1 * chosen.sum(0)
            self.codes.mul_(0.9).add_(0.1 * (chosen.t() @ y) / self.counts[:, None])
        return (y + self.shift) * self.scale + 0.1 * (chosen @ self.codes)


class Noisy(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.f, self.how, self.python, self.bits = mlp(), how, random.Random(0), np.random.default_rng(0)
        self.generators = {"torch": torch.Generator().manual_seed(0)}

    def forward(self, x: Tensor) -> Tensor:
        match self.how:
            case "torch":
                noise = torch.randn(6, 4)
            case "generator":
                noise = torch.randn(6, 4, generator=self.generators["torch"])
            case "numpy":
                noise = torch.from_numpy(np.random.randn(6, 4)).float()
            case "numpy generator":
                noise = torch.from_numpy(self.bits.normal(size=(6, 4))).float()
            case "random":
                noise = torch.tensor([[random.gauss(0, 1) for _ in range(4)] for _ in range(6)])
            case _:
                noise = torch.tensor([[self.python.gauss(0, 1)] * 4] * 6)
        return self.f(x + 0.3 * noise)


class Clipped(nn.Module):
    """Moves its own weights in forward, also those that are trained."""

    def __init__(self, assigned: bool) -> None:
        super().__init__()
        self.f, self.assigned = mlp(), assigned

    def forward(self, x: Tensor) -> Tensor:
        weight = self.f[0].weight
        if self.assigned:
            weight.data = 0.999 * weight.data
        else:
            weight.data.mul_(0.999)
        return self.f(x)


def materialised() -> nn.Module:
    model = nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.Linear(5, 3))
    model(torch.zeros(1, 4))
    return model


def spectral() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.2), nn.Linear(5, 3))


class Counting(nn.Module):
    """What TorchScript can keep: a buffer that is replaced, a frozen weight that is written, and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.frozen = normalised(), nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("mean", torch.zeros(3))
        self.calls, self.sizes, self.named = 0, [0], {"first": torch.zeros(3)}
        self.last = torch.jit.Attribute(None, Optional[Tensor])  # noqa: UP045 - what TorchScript knows

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x) + 0.01 * self.frozen(self.mean) + 0.01 * self.named["first"]
        last = self.last
        if last is not None:
            y = y + 0.01 * last * self.sizes[-1]
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        self.named["first"] = y.detach()[0]
        self.named["first"].mul_(0.5)
        self.calls += 1
        self.sizes.append(self.calls % 3)
        self.last = y.detach()
        with torch.no_grad():
            self.frozen.weight.mul_(0.99)
        return y * (1 + self.calls % 2)


def scripted() -> nn.Module:
    return torch.jit.script(Counting())


def traced() -> nn.Module:
    return torch.jit.trace(normalised(), torch.randn(6, 4), check_trace=False)


class Centred(nn.Module):
    """A criterion with a state of its own, as that of DINO."""

    centre: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(3))
        self.losses: list[Tensor] = []

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        loss = F.mse_loss(output - self.centre, y)
        self.centre = 0.9 * self.centre + 0.1 * output.detach().mean(0)
        self.losses.append(loss.detach())
        return loss


TEACHERS = ["assigned", "data in place", "replaced", "lerp", "copied", "not frozen", "outweighs", "hidden"]
NOISE = ["torch", "generator", "numpy", "numpy generator", "random", "python"]
ZOO: dict[str, Callable[[], nn.Module]] = {
    **{f"teacher {how}": functools.partial(Teacher, how) for how in TEACHERS},
    **{f"noise of {how}": functools.partial(Noisy, how) for how in NOISE},
    "recurrent": Recurrent,
    "memory": Memory,
    "queue": Queue,
    "codebook": Codebook,
    "lazy": materialised,
    "spectral norm": spectral,
    "batch norm": normalised,
    "scripted": scripted,
    "scripted inside": lambda: nn.Sequential(scripted(), nn.Linear(3, 3)),
    "traced": traced,
    "clips": functools.partial(Clipped, False),
    "clips by assignment": functools.partial(Clipped, True),
}


def discriminator(kind: str) -> nn.Module:
    if kind == "batch norm":
        return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
    norm = nn.utils.spectral_norm if kind == "old" else nn.utils.parametrizations.spectral_norm
    return nn.Sequential(norm(nn.Linear(3, 5)), nn.Tanh(), nn.Linear(5, 1))


# ----------------------------------------------------------------------------------------------------- the property


def state_of(value: Any, seen: dict[int, int]) -> Any:
    """Everything in a value that can be compared, and that holds no jet."""
    assert not isinstance(value, Jet), "a jet survived"
    if isinstance(value, Tensor):
        return tuple(value.shape), shard(value).detach().double().flatten().tolist()
    if isinstance(value, nn.Module):
        if id(value) in seen:
            return None
        seen[id(value)] = 1
        if isinstance(value, torch.jit.ScriptModule):
            kept: Any = {name: getattr(value, name) for name in value._concrete_type.get_attributes()}
            return state_of([kept, *value.children()], seen)
        return {name: state_of(v, seen) for name, v in value.__dict__.items() if "hook" not in name}
    if isinstance(value, (list, tuple, deque)):
        return [state_of(v, seen) for v in value]
    if isinstance(value, dict):
        return [(name, state_of(v, seen)) for name, v in value.items()]
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, Memory.Slots):
        return state_of(getattr(value, "last", None), seen)
    return value if isinstance(value, (int, float, str, bool, set, type(None))) else None


def seed() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def trained(
    make: Callable[[], nn.Module], curvature: str | None, probes: int = 2, steps: int = 20, kind: str = "criterion"
) -> tuple[list[float], Any, Any]:
    """Losses, the state of all modules, and the random state after some steps, at one rate; measured or not."""
    seed()
    model: nn.Module = make()
    if kind == "fsdp2":
        fully_shard(model)
    elif kind == "ddp":
        model = DistributedDataParallel(model)
    frozen = "teacher" if hasattr(model, "teacher") else "-"
    moving = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith(frozen)]
    criterion: Any = Centred() if kind == "criterion" else F.mse_loss
    other = discriminator(kind) if kind in ("batch norm", "old", "new") else None
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, moving, lr=0.01, momentum=0.9)
    # a model that replaces its trained weights in forward is one that exact curvature does not follow: refused
    unchecked = [gen.SelfCheck(None)] if isinstance(model, Clipped) else []
    scheduler = curvature and gen.GenScheduler(
        optimizer,
        model,
        criterion,
        0.01,
        0.01,
        curvature=curvature,
        probes=probes,
        update_every=2,
        companions=unchecked,
    )
    data = torch.Generator().manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    losses = []
    for _ in range(steps):
        x, y = torch.randn(6, 4, generator=data), torch.randn(6, 3, generator=data)

        def loss(x: Tensor = x, y: Tensor = y) -> Tensor:
            output = model(x)
            return criterion(output, y) if other is None else F.softplus(-other(output)).mean()

        optimizer.zero_grad()
        value = loss()
        value.backward()
        if scheduler and other is None:
            scheduler.step(x, y)
        elif scheduler:
            scheduler.step(closure=loss)
        optimizer.step()
        losses.append(value.item())
    if scheduler:
        assert scheduler.last.denominator != 0
        assert scheduler.last.reason != "not finite"
    randomness = torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())
    return losses, state_of([model, other, criterion if isinstance(criterion, nn.Module) else None], {}), randomness


ESTIMATORS = [("exact", 2), ("gauss-newton", 2), ("forward", 2), ("forward", 1)]


@pytest.mark.filterwarnings("ignore:.*is deprecated", "ignore:Converting a tensor to a Python")
@pytest.mark.parametrize("name", ZOO)
def test_a_measuring_pass_changes_nothing(name: str) -> None:
    twin = trained(ZOO[name], None)
    for curvature, probes in ESTIMATORS:
        assert trained(ZOO[name], curvature, probes) == twin, (curvature, probes)


@pytest.mark.parametrize("kind", ["batch norm", "old", "new"])
def test_a_measuring_pass_does_not_change_modules_of_a_closure(kind: str) -> None:
    twin = trained(mlp, None, kind=kind)
    for curvature, probes in [("exact", 2), ("forward", 2), ("forward", 1)]:
        assert trained(mlp, curvature, probes, kind=kind) == twin, (curvature, probes)


def on_ranks(names: list[str], kind: str) -> list[bool]:
    same = []
    for name in names:
        twin = trained(ZOO[name], None, steps=6, kind=kind)
        same += [trained(ZOO[name], curvature, steps=6, kind=kind) == twin for curvature in ("exact", "forward")]
    return same


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("ddp", ["teacher data in place", "teacher assigned", "queue", "recurrent", "noise of numpy", "memory"]),
        ("ddp", ["scripted", "traced"]),
        ("fsdp2", ["queue", "recurrent", "noise of numpy", "memory", "batch norm"]),
    ],
)
def test_on_two_ranks(pool: Callable[[int], Pool], kind: str, names: list[str]) -> None:
    for same in pool(2).run(on_ranks, names, kind):
        assert all(same), same
