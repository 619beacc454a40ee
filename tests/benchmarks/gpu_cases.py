"""The models of the GPU benchmark, in each precision, eager and compiled, and their training iterations by method."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path[:0] = [str(Path(__file__).parents[2] / "examples"), str(Path(__file__).parent)]
import peers
import quality_models
from models import GPT
from update_cost import ESTIMATORS, Iteration, token_cross_entropy, training

Problem = tuple[nn.Module, Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]

BF16, BF16_WEIGHTS, FP16 = "bf16 autocast", "bf16 weights", "fp16 autocast, scaled"
AUTOCAST = {BF16: torch.bfloat16, FP16: torch.float16}
TOLERANCE = 0.1  # of a peer's d'Hd in bfloat16, against double backward's in the same precision
PEERS = ("gen-optim", "double backward", "curvlinops")


def gpt(vocabulary: int, context: int, depth: int, width: int, heads: int, batch: int) -> Problem:
    tokens = torch.randint(vocabulary, (batch, context + 1))
    return GPT(vocabulary, context, depth, width, heads), token_cross_entropy, tokens[:, :-1], tokens[:, 1:]


def images(model: nn.Module, size: int, channels: int, classes: int, batch: int) -> Problem:
    x = torch.randn(batch, channels, size, size).to(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model, nn.functional.cross_entropy, x, torch.randint(classes, (batch,))


def resnet50() -> Problem:
    try:
        from torchvision.models import resnet50
    except (ImportError, RuntimeError) as error:  # not there, or made for another PyTorch
        raise ImportError(f"ResNet-50 is part of torchvision: pip install torchvision ({error})") from error
    return images(resnet50(), 224, 3, 1000, batch=64)


MODELS: dict[str, Callable[[], Problem]] = {
    "GPT 124M": partial(gpt, 50304, 1024, depth=12, width=768, heads=12, batch=8),
    "GPT 350M": partial(gpt, 50304, 1024, depth=24, width=1024, heads=16, batch=4),
    "ResNet-50": resnet50,
    "tiny GPT": partial(gpt, 64, 16, depth=2, width=32, heads=2, batch=2),
    "tiny ResNet": lambda: images(quality_models.resnet(10, width=4), 16, 1, 10, batch=2),
}


@dataclass(frozen=True)
class Case:
    """A model in one of the settings that it is trained in.

    Attributes:
        strides: the estimators measure at every so many steps.
        peers: other packages take part. They know nothing of FSDP2, the compiler and scalers, so they have the plain
            model, and are compared with training of that.
    """

    model: str
    precision: str = BF16
    compiled: bool = False
    strides: tuple[int, ...] = (1,)
    peers: bool = False

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 has the model, block by block; a ResNet stays in one piece."""
        return "GPT" in self.model

    def __str__(self) -> str:
        return f"{self.model}, {self.precision}, {'compiled' if self.compiled else 'eager'}"

    def problem(self, device: torch.device, backend: str, sharded: bool) -> Problem:
        """The model and its data."""
        torch.manual_seed(0)
        with device:
            model, criterion, x, y = MODELS[self.model]()
        if self.precision == BF16_WEIGHTS:
            model.to(torch.bfloat16)
            x = x.to(torch.bfloat16) if x.is_floating_point() else x
        blocks = [*model.blocks] if isinstance(model, GPT) else []
        for part in (blocks or [model]) if self.compiled else []:
            part.compile(backend=backend)
        if sharded:
            mesh = init_device_mesh(device.type, (1,))
            for part in (*blocks, model):
                fully_shard(part, mesh=mesh)
        return model, criterion, x, y


def in_autocast(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model, which runs itself in autocast from now on, and gives its output in float32, as losses want it."""
    forward = torch.autocast(device.type, dtype)(model.forward)
    model.forward = lambda x: forward(x).float()  # type: ignore[method-assign]
    return model


@dataclass(frozen=True)
class Method:
    """A row of the table: the training iteration, how often it updates, and which plain training it compares with."""

    name: str
    make: Callable[[], Iteration]
    stride: int = 1
    unsharded: bool = False


def methods(case: Case, device: torch.device, backend: str) -> list[Method]:
    """Plain training first, then each estimator at each stride, then plain training of one piece and the peers."""

    dtype = AUTOCAST.get(case.precision)

    def train(estimator: str | None = None, stride: int = 1, sharded: bool = True) -> Iteration:
        how = None if estimator is None else ESTIMATORS[estimator] | {"update_every": stride}
        around = partial(torch.autocast, device.type, dtype, enabled=dtype is not None)
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10) if case.precision == FP16 else None
        problem = case.problem(device, backend, sharded and case.sharded)
        return training(*problem, how, fused=True, around=around, scaler=scaler)

    def peer(name: str) -> Iteration:
        model, *others = case.problem(device, backend, sharded=False)
        model = model if dtype is None else in_autocast(model, device, dtype)
        return peers.iteration(name, model, *others, tolerance=TOLERANCE, fused=True)

    found = [Method("plain", train)]
    for stride in case.strides:
        every = "" if stride == 1 else f", every {stride}"
        found += [Method(name + every, partial(train, name, stride), stride) for name in ESTIMATORS]
    if case.peers and case.sharded:
        found.append(Method("plain, no FSDP2", partial(train, sharded=False), unsharded=True))
    if case.peers:
        found += [Method(name, partial(peer, name), unsharded=case.sharded) for name in PEERS]
    return found


EVERY = (1, 8, 16)
CASES = [  # in the order of their weight, should the time not be enough
    Case("GPT 124M", strides=EVERY, peers=True),
    Case("GPT 124M", strides=EVERY, compiled=True),
    Case("GPT 350M", strides=EVERY, peers=True),
    Case("ResNet-50", strides=EVERY, peers=True),
    Case("GPT 350M", strides=EVERY, compiled=True),
    Case("ResNet-50", strides=EVERY, compiled=True),
    Case("GPT 124M", BF16_WEIGHTS, peers=True),
    Case("GPT 124M", FP16),
    Case("GPT 350M", BF16_WEIGHTS),
    Case("ResNet-50", FP16),
]
SMOKE_CASES = [
    Case("tiny GPT", strides=(1, 4), peers=True),
    Case("tiny GPT", compiled=True),
    Case("tiny GPT", BF16_WEIGHTS, peers=True),
    Case("tiny GPT", FP16),
    Case("tiny ResNet"),
]
