"""What an update costs: a whole training iteration with each estimator, as a multiple of a plain AdamW iteration.

All methods take turns in one run, round by round, so that a machine that slows down slows all of them; each round gives
one ratio, and the median is reported with its quartiles. Peak memory is what an iteration needs beyond what was held
before it.

    python tests/benchmarks/update_cost.py [--models mlp cnn cnn-bn gpt] [--rounds 15]

gen-optim's `lr_parabola` takes part where that package is installed (pip install "gen_dist[benchmarks]").
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).parent))
from memory import peak_memory
from models import CNN, GPT, MLP

import gen_dist as gen

Iteration = Callable[[], None]


def problem(name: str) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]:
    torch.manual_seed(0)
    if name == "mlp":
        return MLP(784, 10, width=512), F.cross_entropy, torch.randn(256, 784), torch.randint(0, 10, (256,))
    if name == "cnn":
        return conv_net(), F.cross_entropy, torch.randn(64, 1, 28, 28), torch.randint(0, 10, (64,))
    if name == "cnn-bn":
        return CNN(1, 10, width=32), F.cross_entropy, torch.randn(64, 1, 28, 28), torch.randint(0, 10, (64,))
    tokens = torch.randint(0, 96, (16, 65))
    return GPT(96, context=64, depth=4, width=128), token_cross_entropy, tokens[:, :-1], tokens[:, 1:]


def conv_net() -> nn.Module:
    """The usual one for images of 28 x 28: two convolutions, two linear layers, 1.2 million parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(3136, 384), nn.ReLU(), nn.Linear(384, 10),
    )  # fmt: skip


def token_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def plain(name: str) -> Iteration:
    model, criterion, x, y = problem(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def iteration() -> None:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()

    return iteration


def scheduled(name: str, **arguments: Any) -> Iteration:
    model, criterion, x, y = problem(name)
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), lr=1e-4)
    scheduler = gen.GenScheduler(optimizer, model, criterion, lr_max=1e-4, **arguments)

    def iteration() -> None:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        scheduler.step(x, y, loss=loss)
        optimizer.step()

    return iteration


def gen_optim(name: str) -> Iteration:
    from GeN import lr_parabola

    model, criterion, x, y = problem(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def iteration() -> None:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        lr_parabola(
            model,
            optimizer,
            criterion,
            tr_iter=iter([(x, y)]),
            device="cpu",
            task="image_cls",
            lr_factor=[-1, 0, 1],
        )
        optimizer.step()

    return iteration


METHODS: dict[str, Callable[[str], Iteration]] = {
    "plain AdamW": plain,
    "one probe": lambda name: scheduled(name, curvature="forward", probes=1),
    "two probes": lambda name: scheduled(name, curvature="forward", probes=2),
    "gauss-newton": lambda name: scheduled(name, curvature="gauss-newton"),
    "exact": lambda name: scheduled(name, curvature="exact"),
    "exact, every 8": lambda name: scheduled(name, curvature="exact", update_every=8),
    "gen-optim": gen_optim,
}
MODELS = ["mlp", "cnn", "cnn-bn", "gpt"]
GOALS: dict[str | tuple[str, str], float] = {
    "one probe": 1.5,
    "two probes": 1.9,
    "gauss-newton": 2.2,
    "exact": 2.5,
    ("exact", "gpt"): 3.3,
}


def seconds(iteration: Iteration, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        iteration()
    return (time.perf_counter() - start) / repeats


def measure(name: str, rounds: int, repeats: int) -> None:
    iterations = {}
    for method, make in METHODS.items():
        try:
            iterations[method] = make(name)
        except ImportError as error:
            print(f"{name:>4}  {method:<15} left out: {error}")
    for iteration in iterations.values():
        seconds(iteration, 2)  # warm up
    ratios: dict[str, list[float]] = {method: [] for method in iterations}
    base = []
    for _ in range(rounds):
        order = list(iterations)
        random.shuffle(order)
        took = {method: seconds(iterations[method], repeats) for method in order}
        base.append(took["plain AdamW"])
        for method, value in took.items():
            ratios[method].append(value / took["plain AdamW"])
    model = problem(name)[0]
    size = sum(p.numel() for p in model.parameters())
    print(f"{name}: {size:,} parameters, plain iteration {1e3 * statistics.median(base):.1f} ms")
    print(f"{'':>4}  {'method':<15} {'ratio':>6}  {'quartiles':<12} {'goal':>5}  peak memory")
    for method, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        goal = GOALS.get((method, name), GOALS.get(method, ""))
        memory = peak_memory(iterations[method])
        print(f"{'':>4}  {method:<15} {middle:6.2f}  {low:.2f} to {high:.2f} {goal:>5}  {memory / 2**20:7.1f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=8, help="iterations of each method a round")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), {arguments.rounds} rounds")
    for name in arguments.models:
        measure(name, arguments.rounds, arguments.repeats)


if __name__ == "__main__":
    main()
