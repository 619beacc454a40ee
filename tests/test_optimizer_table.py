"""Every optimizer works, within 1e-6 of the base optimizer at the same rates, or is refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import gen_dist as gen

WORKS: dict[str, dict[str, Any]] = {
    "Adadelta": {},
    "Adagrad": {"lr_decay": 0.1, "weight_decay": 0.01},
    "Adam": {"amsgrad": True},
    "AdamW": {"weight_decay": 0.1},
    "Adamax": {"weight_decay": 0.1},
    "Muon": {"weight_decay": 0.1},
    "NAdam": {"weight_decay": 0.01},
    "RAdam": {"weight_decay": 0.01},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "SGD": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "SparseAdam": {},
}
REFUSED = {"ASGD", "Adafactor", "LBFGS", "Rprop"}

FOREACH = [name for name in WORKS if "foreach" in inspect.signature(getattr(torch.optim, name, object)).parameters]
FUSED = [name for name in WORKS if "fused" in inspect.signature(getattr(torch.optim, name, object)).parameters]


def classes() -> dict[str, type[Optimizer]]:
    found = {name: value for name, value in vars(torch.optim).items() if inspect.isclass(value)}
    return {name: value for name, value in found.items() if issubclass(value, Optimizer) and value is not Optimizer}


def test_the_table_is_complete() -> None:
    assert set(classes()) <= WORKS.keys() | REFUSED


def layers(sparse: bool) -> nn.Module:
    torch.manual_seed(0)
    if sparse:
        return nn.Embedding(6, 4, sparse=True).double()
    return nn.Linear(4, 5, bias=False).double()


def loss_of(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    if isinstance(model, nn.Embedding):
        return model(torch.randint(0, 6, (3,), generator=generator)).square().sum()
    return model(torch.randn(8, 4, generator=generator).double()).cosh().mean()


def assert_same_steps(make: Callable[..., Optimizer], sparse: bool = False, **arguments: Any) -> None:
    """Take eight steps at changing rates, and compare with the base optimizer."""
    ours, theirs = layers(sparse), layers(sparse)
    if inspect.isclass(make):
        optimizer = gen.make_gen_optimizer(make, ours.parameters(), **arguments)
    else:
        optimizer = gen.as_gen_optimizer(make(ours.parameters(), **arguments))
    base = make(theirs.parameters(), **arguments)
    scheduler = gen.ExactGen(optimizer, ours, lr_max=0.05)
    for step in range(8):
        optimizer.zero_grad()
        base.zero_grad()
        loss_of(ours, step).backward()
        loss_of(theirs, step).backward()
        scheduler.step(closure=lambda step=step: loss_of(ours, step))  # type: ignore[misc]
        assert scheduler.last is not None
        for group in base.param_groups:
            rate = scheduler.last.lr
            group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else group.update(lr=rate)
        optimizer.step()
        base.step()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)
    assert scheduler.last is not None
    assert scheduler.last.lr > 0


@pytest.mark.parametrize("name", WORKS)
def test_works(name: str) -> None:
    if not hasattr(torch.optim, name):
        pytest.skip(f"torch {torch.__version__} has no {name}")
    assert_same_steps(getattr(torch.optim, name), sparse=name == "SparseAdam", **WORKS[name])


@pytest.mark.parametrize("name", FOREACH)
def test_foreach(name: str) -> None:
    assert_same_steps(getattr(torch.optim, name), foreach=True, **WORKS[name])


@pytest.mark.parametrize("name", FUSED)
def test_fused(name: str) -> None:
    assert_same_steps(getattr(torch.optim, name), fused=True, **WORKS[name])


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_tensor_rates(name: str) -> None:
    cls = getattr(torch.optim, name)
    assert_same_steps(lambda params, **kw: cls(params, lr=torch.tensor(1e-3, dtype=torch.float64), **kw), foreach=False)


def test_sparse_gradients_of_sgd() -> None:
    assert_same_steps(lambda params, **kw: torch.optim.SGD(params, lr=1e-2, **kw), sparse=True)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_by_name(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}.*use SGD"):
        gen.make_gen_optimizer(getattr(torch.optim, name), layers(False).parameters())


# -------------------------------------------------------------------------------- from outside of PyTorch

#           package, class, arguments, and the verdict
OUTSIDE = [
    ("pytorch_optimizer", "Lion", {"lr": 1e-3}, "works"),
    ("pytorch_optimizer", "Tiger", {"lr": 1e-3}, "works"),
    ("pytorch_optimizer", "AdaBelief", {"lr": 1e-3}, "works"),
    ("pytorch_optimizer", "Lamb", {"lr": 1e-3}, "works"),
    ("pytorch_optimizer", "AdEMAMix", {"lr": 1e-3}, "works"),
    ("pytorch_optimizer", "SOAP", {"lr": 1e-3}, "refused"),
    ("pytorch_optimizer", "SAM", {}, "refused"),
    ("pytorch_optimizer", "DAdaptAdam", {"lr": 1.0}, "refused"),
    ("schedulefree", "AdamWScheduleFree", {"lr": 1e-3}, "refused"),
    ("schedulefree", "SGDScheduleFree", {"lr": 1e-3}, "refused"),
    ("prodigyopt", "Prodigy", {}, "refused"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("package", "name", "arguments", "verdict"), OUTSIDE, ids=lambda v: v if isinstance(v, str) else ""
)
def test_outside_optimizers(package: str, name: str, arguments: dict[str, Any], verdict: str) -> None:
    cls = getattr(pytest.importorskip(package, reason=f"{package} is not installed"), name)
    if verdict == "works":
        assert_same_steps(cls, **arguments)
    else:
        with pytest.raises(TypeError):
            gen.make_gen_optimizer(cls, layers(False).parameters(), **arguments)
