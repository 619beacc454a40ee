"""Every optimizer works, within 1e-6 of the base optimizer at the same rates, or is refused by name."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from typing import Any

import numpy as np
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
    """Take 27 steps at changing rates, and compare with the base optimizer."""
    ours, theirs = layers(sparse), layers(sparse)
    if inspect.isclass(make):
        optimizer = gen.make_gen_optimizer(make, ours.parameters(), **arguments)
    else:
        optimizer = gen.as_gen_optimizer(make(ours.parameters(), **arguments))
    base = make(theirs.parameters(), **arguments)
    scheduler = gen.ExactGen(optimizer, ours, lr_max=0.05)
    for step in range(27):
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

# Each package, with its classes that work and those that are refused.
PACKAGES = {
    "pytorch_optimizer": (
        """
        ADOPT APOLLO AdEMAMix AdaBelief AdaBound AdaDelta AdaGC AdaMax AdaMuon AdaNorm AdaPNM AdaShift AdaSmooth
        AdaTAM Adai Adalite Adam AdamC AdamP AdamS AdamW AdamWSN Adan AggMo Aida Alice Ano AvaGrad BCOS CAME
        Conda DASH DiffGrad DualAdam EXAdam EmoFact EmoLynx EmoNavi FAdam FOCUS Fira FlashAdamW GaLore Grams
        GrokFastAdamW Kate Kron LARS Lamb Lion MARS MSVAG Muon MuonClip NAdam NorMuon NovoGrad PAdam PID PNM
        QHAdam QHM RACS RAdam RMSprop ROSE SCION SCIONLight SGD SGDP SGDSaI SGDW SM3 SOAP SPAM SaRA
        ScalableShampoo Shampoo SignSGD SimplifiedAdEMAMix SpectralSphere StableAdamW StableSPAM TAM Tiger VSGD
        Yogi
        """,
        """
        A2Grad ASGD AccSGD AdaFactor AdaGO AdaHessian AdaLOMO AdaMod AdamG AdamMini AliG Amos ApolloDQN BSAM
        DAdaptAdaGrad DAdaptAdam DAdaptAdan DAdaptLion DAdaptSGD DeMo DistributedMuon FTRL FriendlySAM Fromage
        GSAM Gravity LBFGS LOMO LaProp LoRARite LookSAM Lookahead MADGRAD Magma Nero OrthoGrad PCGrad Prodigy
        Ranger Ranger21 SAM SPlus SRMM SWATS SafeFP16Optimizer ScheduleFreeAdamW ScheduleFreeRAdam
        ScheduleFreeSGD ScheduleFreeWrapper SophiaH TRAC WSAM
        """,
    ),
    "torch_optimizer": (
        """
        AdaBelief AdaBound AdamP AggMo Apollo DiffGrad LARS Lamb NovoGrad PID QHAdam QHM SGDP SGDW Shampoo Yogi
        """,
        """
        A2GradExp A2GradInc A2GradUni AccSGD AdaMod Adafactor Adahessian Lookahead MADGRAD RAdam Ranger RangerQH
        RangerVA SWATS
        """,
    ),
    "lion_pytorch": (
        "Lion",
        "",
    ),
    "dadaptation": (
        "",
        "DAdaptAdaGrad DAdaptAdam DAdaptAdan DAdaptLion DAdaptSGD",
    ),
    "prodigyopt": (
        "",
        "Prodigy",
    ),
    "schedulefree": (
        "",
        """
        AdamWScheduleFree AdamWScheduleFreeClosure AdamWScheduleFreePaper AdamWScheduleFreeReference
        RAdamScheduleFree RAdamScheduleFreeClosure SGDScheduleFree SGDScheduleFreeClosure
        SGDScheduleFreeReference
        """,
    ),
}
OUTSIDE = [
    (package, name, works)
    for package, names in PACKAGES.items()
    for works, listed in zip((True, False), names, strict=True)
    for name in listed.split()
]

# What a class needs to be made at all, other than the parameters.
ARGUMENTS: dict[str, Callable[[nn.Module], list[Any]]] = {
    **dict.fromkeys(["AdaLOMO", "AdamMini", "LOMO"], lambda model: [model]),
    **dict.fromkeys(
        ["Lookahead", "OrthoGrad", "PCGrad", "SafeFP16Optimizer", "ScheduleFreeWrapper", "TRAC"],
        lambda model: [torch.optim.AdamW(model.parameters())],
    ),
    **dict.fromkeys(["FriendlySAM", "LookSAM", "SAM"], lambda model: [model.parameters(), torch.optim.SGD]),
    **dict.fromkeys(["BSAM", "Ranger21"], lambda model: [model.parameters(), 100]),
    "GSAM": lambda model: [model.parameters(), torch.optim.SGD, model, None],
    "WSAM": lambda model: [model, model.parameters(), torch.optim.SGD],
    **dict.fromkeys(
        ["AdaGO", "AdaMuon", "Muon", "MuonClip", "NorMuon"],
        lambda model: [[{"params": [p], "use_muon": p.ndim > 1} for p in model.parameters()]],
    ),
}
# These are refused with weight decay, and work without.
WITHOUT_DECAY = "APOLLO AdamWSN Adan Conda FOCUS Fira GaLore Lamb SOAP SPAM SpectralSphere".split()
FLOAT32 = ["FAdam"]  # does not know float64
MATRICES = ["SpectralSphere"]  # knows nothing else
NEEDS_RANKS = ["DeMo", "DistributedMuon"]


def perceptron(name: str) -> nn.Module:
    torch.manual_seed(0)
    bias = name not in MATRICES
    layers = nn.Sequential(nn.Linear(4, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3, bias=bias))
    return layers.to(torch.float32 if name in FLOAT32 else torch.float64)


def arguments_of(cls: type[Optimizer], model: nn.Module) -> tuple[list[Any], dict[str, Any]]:
    parameters = inspect.signature(cls.__init__).parameters
    named: dict[str, Any] = {}
    if "weight_decay" in parameters and cls.__name__ not in ARGUMENTS:
        named["weight_decay"] = 0.0 if cls.__name__ in WITHOUT_DECAY else 0.1
    if "lr" in parameters and parameters["lr"].default is inspect.Parameter.empty:
        named["lr"] = 1e-2
    make = ARGUMENTS.get(cls.__name__, lambda model: [list(model.parameters())])
    return make(model), named


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("package", "name", "works"), OUTSIDE, ids=lambda v: v if isinstance(v, str) else "")
def test_outside_optimizers(package: str, name: str, works: bool) -> None:
    """Its steps along held directions are those of the class itself, or it is refused by name."""
    cls = getattr(pytest.importorskip(package, reason=f"{package} is not installed"), name)
    if name in NEEDS_RANKS:
        pytest.skip(f"{name} needs torch.distributed")
    ours, theirs = perceptron(name), perceptron(name)
    if not works:
        given, named = arguments_of(cls, ours)
        # a class that cannot be made by itself says so itself
        with pytest.raises((TypeError, AttributeError), match=rf"{name}.*use SGD|\b__init__\b|has no attribute"):
            gen.make_gen_optimizer(cls, *given, **named)
        return
    (given, named), (others, _) = arguments_of(cls, ours), arguments_of(cls, theirs)
    optimizer, plain = gen.make_gen_optimizer(cls, *given, **named), cls(*others, **named)
    dtype = next(theirs.parameters()).dtype
    x, y = torch.randn(6, 4, dtype=dtype), torch.randn(6, 3, dtype=dtype)
    for step in range(27):
        loss = nn.functional.mse_loss(theirs(x), y)
        gradients = torch.autograd.grad(loss, [*theirs.parameters()])
        for p, q, g in zip(ours.parameters(), theirs.parameters(), gradients, strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        for group in (*optimizer.param_groups, *plain.param_groups):
            group["lr"] = 0.02 * 2.0 ** (step * 3 % 5 - 2)
        seed(step)
        optimizer.compute_param_updates()
        optimizer.step()
        seed(step)
        plain.step()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4 if name in FLOAT32 else 1e-7, atol=1e-6)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_tables_of_packages_are_complete(package: str) -> None:
    found = vars(pytest.importorskip(package, reason=f"{package} is not installed"))
    names = {name for name, value in found.items() if inspect.isclass(value) and issubclass(value, Optimizer)}
    assert names - {"Optimizer"} <= {name for listed in PACKAGES[package] for name in listed.split()}


# ---------------------------------------------------------------------------- what goes wrong late, or in the state


class Odd(torch.optim.SGD):
    """Plain descent, with something of its own before and after each step."""

    def __init__(self, params: Any, lr: float = 0.1, **more: Any) -> None:
        super().__init__(params, lr=lr, **more)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.each(self.before)
        super().step(closure)
        self.each(self.afterwards)

    def each(self, act: Callable[[Tensor, dict[str, Any], dict[str, Any]], None]) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                act(p, self.state[p], group)

    def before(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["n"] = state.get("n", 0) + 1

    def afterwards(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        pass


class SlowWeights(Odd):
    def before(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        super().before(p, state, group)
        state.setdefault("slow", p.clone())

    def afterwards(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if state["n"] % 20 == 0:
            p.copy_(state["slow"].lerp_(p, 0.5))


class KeepsTheRate(Odd):
    def afterwards(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["nested"] = {"sums": [state.get("nested", {"sums": [0.0]})["sums"][0] + group["lr"]]}


class KeepsAnAverage(Odd):
    def afterwards(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state.setdefault("average", torch.zeros_like(p)).lerp_(p, 0.1)


class KeepsInTheGroup(Odd):
    def afterwards(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        group["travelled"] = group.get("travelled", 0.0) + group["lr"]


class KeepsInAnAttribute(Odd):
    def afterwards(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        self.norm = float(p.norm())


class WarmsUp(Odd):
    def afterwards(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if state["n"] > 15 and p.grad is not None:
            p.add_(p.grad, alpha=-(group["lr"] ** 2))


class DecaysAlone(Odd):
    def before(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        p.mul_(1 - 1e-4 * group["weight_decay"])


class KeepsWhatRoundingLoses(Odd):
    def afterwards(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if p.dtype == torch.bfloat16:
            state["lost"] = p.float() - 0.5


class MovesWithoutGradient(Odd):
    def afterwards(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if p.grad is None:
            p.mul_(1 - 0.1 * group["lr"])


@pytest.mark.parametrize(
    ("cls", "dtype"),
    [
        *((c, torch.float32) for c in (SlowWeights, KeepsTheRate, KeepsAnAverage, KeepsInTheGroup, KeepsInAnAttribute)),
        *((c, torch.float32) for c in (WarmsUp, MovesWithoutGradient)),
        (KeepsWhatRoundingLoses, torch.bfloat16),
    ],
)
def test_what_goes_wrong_late_or_in_the_state_is_refused(cls: type[Odd], dtype: torch.dtype) -> None:
    parameters = [nn.Parameter(torch.ones(3, 2, dtype=dtype)), nn.Parameter(torch.ones(2, dtype=dtype))]
    with pytest.raises(TypeError, match=f"{cls.__name__}.*use SGD"):
        gen.make_gen_optimizer(cls, parameters)
    with pytest.raises(TypeError, match=f"{cls.__name__}.*use SGD"):
        gen.as_gen_optimizer(cls(parameters))


def test_a_class_is_judged_by_the_settings_of_its_groups() -> None:
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match="DecaysAlone"):
        gen.make_gen_optimizer(DecaysAlone, [{"params": [p]}, {"params": [q], "weight_decay": 0.1}])
    optimizer = gen.make_gen_optimizer(DecaysAlone, [p])
    with pytest.raises(TypeError, match="DecaysAlone"):
        optimizer.add_param_group({"params": [q], "weight_decay": 0.1})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [q]})


def test_a_trial_leaves_no_trace() -> None:
    seeds, of_python = torch.get_rng_state(), random.getstate()
    gen.make_gen_optimizer(Odd, [nn.Parameter(torch.ones(3))])
    assert torch.equal(torch.get_rng_state(), seeds)
    assert random.getstate() == of_python


def test_an_optimizer_that_draws_from_numpy_is_tried_with_the_same_numbers_and_leaves_the_stream() -> None:
    class Noisy(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
                p.grad.mul_(float(np.random.random()))
            return super().step(closure)

    before = np.random.get_state()[1].copy()
    gen.make_gen_optimizer(Noisy, [nn.Parameter(torch.ones(3))], lr=0.1)
    assert (np.random.get_state()[1] == before).all()
