"""What an update costs: a whole training iteration with each estimator, as a multiple of a plain AdamW iteration.

All methods take turns in one run, round by round, so that a machine that slows down slows all of them; each round gives
one ratio, and the median is reported with its quartiles. With one thread the time is that of the processor, which other
programs on the machine disturb less than the clock on the wall. Memory once freed is kept for the next iteration, or
the page faults of the C library's allocator, a matter of luck, would come on top. Passes are what an iteration takes
beyond a plain one, in forward passes of the same model without gradients. Peak memory is what an iteration needs beyond
what was held before it.

    python tests/benchmarks/update_cost.py [--models mlp cnn gpt-25m] [--rounds 15] [--methods exact ...]
    python tests/benchmarks/update_cost.py --profile     # where the time of an update goes, by part and by operator

A round of "watch, every 50" must be so long: give it --repeats 50.

Other packages take part where they are installed (pip install "gen_dist[benchmarks]"); see peers.py.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).parent))
import peers
from memory import peak_memory
from models import CNN, GPT, MLP
from torch.profiler import ProfilerActivity, profile

import gen_dist as gen
from gen_dist import scheduler
from gen_dist.direction import direction
from gen_dist.line import MicroBatch, measurement
from gen_dist.parallel import Layout

Iteration = Callable[[], None]
Options = dict[str, Any]  # of a GenScheduler


def problem(name: str) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]:
    torch.manual_seed(0)
    if name == "mlp":
        return MLP(784, 10, width=512), F.cross_entropy, torch.randn(256, 784), torch.randint(0, 10, (256,))
    if name == "cnn":
        return conv_net(), F.cross_entropy, torch.randn(64, 1, 28, 28), torch.randint(0, 10, (64,))
    if name == "cnn-bn":
        return CNN(1, 10, width=32), F.cross_entropy, torch.randn(64, 1, 28, 28), torch.randint(0, 10, (64,))
    if name == "gpt-25m":
        tokens = torch.randint(0, 96, (8, 129))
        model = GPT(96, context=128, depth=8, width=512, heads=8)
        return model, token_cross_entropy, tokens[:, :-1], tokens[:, 1:]
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


def training(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    how: Options | None = None,
    *,
    fused: bool | None = None,
    around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    scaler: torch.amp.GradScaler | None = None,
) -> Iteration:
    """An iteration of AdamW: plain, or with an update by `GenScheduler`, whose options are `how`.

    Forward passes run inside of `around()`.
    """
    optimizer, scheduler = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=fused), None
    scaler = scaler or torch.amp.GradScaler(enabled=False)  # which does nothing
    if how is not None:
        scheduler = gen.GenScheduler(gen.as_gen_optimizer(optimizer), model, criterion, lr_max=1e-5, **how)

    def iteration() -> None:
        optimizer.zero_grad()
        with around():
            loss = criterion(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if scheduler is not None:
            with around():
                scheduler.step(x, y, loss=loss)
        scaler.step(optimizer)
        scaler.update()

    return iteration


def forward_pass(name: str) -> Iteration:
    model, criterion, x, y = problem(name)

    @torch.no_grad()
    def iteration() -> None:
        criterion(model(x), y)

    return iteration


def watched(name: str, every: int) -> Iteration:
    """An iteration of AdamW whose steps `Watch` looks at."""
    model, criterion, x, y = problem(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    watch = gen.Watch(optimizer, model, criterion, every=every)

    def iteration() -> None:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        with watch.step(x, y):
            optimizer.step()

    return iteration


def scheduled(name: str, estimator: str, update_every: int = 1) -> Iteration:
    return training(*problem(name), ESTIMATORS[estimator] | {"update_every": update_every})


ESTIMATORS: dict[str, Options] = {
    "one probe": {"curvature": "forward", "probes": 1},
    "two probes": {"curvature": "forward", "probes": 2},
    "gauss-newton": {"curvature": "gauss-newton"},
    "exact": {"curvature": "exact"},
}
FORWARD = "a forward pass"
METHODS: dict[str, Callable[[str], Iteration]] = {
    "plain": lambda name: training(*problem(name)),
    FORWARD: forward_pass,
    "one probe": lambda name: scheduled(name, "one probe"),
    "one probe, every 8": lambda name: scheduled(name, "one probe", 8),
    "two probes": lambda name: scheduled(name, "two probes"),
    "gauss-newton": lambda name: scheduled(name, "gauss-newton"),
    "exact": lambda name: scheduled(name, "exact"),
    "exact, every 8": lambda name: scheduled(name, "exact", 8),
    "watch": lambda name: watched(name, 1),
    "watch, every 50": lambda name: watched(name, 50),
    **{peer: lambda name, peer=peer: peers.iteration(peer, *problem(name)) for peer in peers.PEERS},  # type: ignore[misc]
}
MODELS = ["mlp", "cnn", "cnn-bn", "gpt", "gpt-25m"]
GOALS: dict[tuple[str, str], float] = {
    ("one probe, every 8", "cnn"): 1.06,
    ("one probe, every 8", "gpt"): 1.04,
    ("gauss-newton", "mlp"): 1.9,
    ("gauss-newton", "cnn"): 1.9,
    ("gauss-newton", "gpt"): 1.9,
    ("exact", "mlp"): 2.0,
    ("exact", "cnn"): 2.2,
    ("exact", "gpt"): 2.6,
}


def keep_freed_memory() -> None:
    """Tell the C library's allocator not to give memory back to the system."""
    if sys.platform == "linux":
        trim_threshold, mmap_threshold = -1, -3
        library = ctypes.CDLL(None)
        library.mallopt(mmap_threshold, 2**30)
        library.mallopt(trim_threshold, 2**31 - 1)


def clock() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds(iteration: Iteration, repeats: int) -> float:
    start = clock()
    for _ in range(repeats):
        iteration()
    return (clock() - start) / repeats


def measure(name: str, methods: list[str], rounds: int, repeats: int) -> None:
    iterations = {}
    for method in methods:
        try:
            iterations[method] = METHODS[method](name)
        except (ImportError, peers.Unable) as error:
            print(f"{name:>4}  {method:<18} left out: {error}")
    for iteration in iterations.values():
        seconds(iteration, 2)  # warm up
    ratios: dict[str, list[float]] = {method: [] for method in iterations}
    passes: dict[str, list[float]] = {method: [] for method in iterations}
    base = []
    for _ in range(rounds):
        order = list(iterations)
        random.shuffle(order)
        took = {method: seconds(iterations[method], repeats) for method in order}
        base.append(took["plain"])
        for method, value in took.items():
            ratios[method].append(value / took["plain"])
            passes[method].append((value - took["plain"]) / took[FORWARD])
    size = sum(p.numel() for p in problem(name)[0].parameters())
    print(f"{name}: {size:,} parameters, plain AdamW iteration {1e3 * statistics.median(base):.1f} ms")
    print(f"{'':>4}  {'method':<18} {'ratio':>6}  {'quartiles':<12} {'goal':>5}  passes  peak memory")
    for method, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        memory = peak_memory(iterations[method]) / 2**20
        goal = GOALS.get((method, name), "")
        extra = "" if method in ("plain", FORWARD) else f"{statistics.median(passes[method]):.2f}"
        print(f"{'':>4}  {method:<18} {middle:6.2f}  {low:.2f} to {high:.2f} {goal:>5}  {extra:>6}  {memory:7.1f} MiB")


# ------------------------------------------------------------------------------------------- where the time goes

PARTS = {
    "plain iteration": None,
    "update": (gen.GenScheduler, "step"),
    "  gradients finite?": (Layout, "gradients_are_finite"),
    "  direction": (gen.GenOptimizer, "compute_param_updates"),
    "    the optimizer's own step": (direction, "base_step"),
    "  measurement": (scheduler, "measure"),
    "    inner products": (measurement, "inner_products"),
    "    running the model": (MicroBatch, "output"),
    "a forward pass without grad": None,
}


@contextlib.contextmanager
def timing_parts(times: dict[str, float]) -> Iterator[None]:
    """Add up the time that is spent in each part."""

    def timed(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            try:
                return function(*args, **kwargs)
            finally:
                times[part] += clock() - start

        return call

    places = {part: place for part, place in PARTS.items() if place is not None}
    before = {part: getattr(owner, name) for part, (owner, name) in places.items()}
    for part, (owner, name) in places.items():
        setattr(owner, name, timed(before[part], part))
    try:
        yield
    finally:
        for part, (owner, name) in places.items():
            setattr(owner, name, before[part])


def print_profile(name: str, methods: list[str], rounds: int) -> None:
    """Milliseconds an iteration by part, medians; then the operators of one update that take the most time."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    base, (model, criterion, x, y) = METHODS["plain"](name), problem(name)
    iterations = {}
    for method in methods:
        with timing_parts(defaultdict(float)):  # bound methods are looked up at the call
            iterations[method] = METHODS[method](name)
    for number in range(rounds + 2):
        for method, iteration in iterations.items():
            times: dict[str, float] = defaultdict(float)
            with timing_parts(times):
                iteration()
            times["plain iteration"] = seconds(base, 1)
            with torch.no_grad():
                times["a forward pass without grad"] = seconds(lambda: criterion(model(x), y), 1)
            for part, value in times.items():
                if number >= 2:
                    found[part][method].append(1e3 * value)
    print(f"\n{name}: milliseconds" + " " * 15 + "".join(f"{method:>15}" for method in iterations))
    for part in PARTS:
        if part in found:
            row = [found[part].get(method) for method in iterations]
            print(f"  {part:<30}" + "".join(f"{statistics.median(v) if v else 0:15.2f}" for v in row))
    for method, iteration in iterations.items():
        print(f"  {name}, {method}: an iteration by operator, own time")
        own = operator_times(iteration, rounds)
        total = sum(map(sum, own.values()))
        for operator in sorted(own, key=lambda operator: -sum(own[operator]))[:10]:
            took = sum(own[operator])
            print(f"    {operator[:44]:<45} {took:8.2f} ms {took / total:4.0%} {len(own[operator]):5} calls")


def operator_times(iteration: Iteration, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call of each operator, itself without what it calls: medians over the rounds."""
    calls: dict[str, list[list[float]]] = defaultdict(list)
    for _ in range(rounds):
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            iteration()
        of_round: dict[str, list[float]] = defaultdict(list)
        for event in recorded.events():
            of_round[event.name].append(event.self_cpu_time_total / 1e3)
        for operator, times in of_round.items():
            calls[operator].append(times)
    return {operator: [statistics.median(call) for call in zip(*times)] for operator, times in calls.items()}  # noqa: B905


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS[:-1])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=8, help="iterations of each method a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--profile", action="store_true", help="where the time goes, for one probe and exact by default"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), {arguments.rounds} rounds, load {load}")
    methods = ["plain", FORWARD, *(method for method in arguments.methods if method not in ("plain", FORWARD))]
    for name in arguments.models:
        if arguments.profile:
            print_profile(name, ["one probe", "exact"], arguments.rounds)
        else:
            measure(name, methods, arguments.rounds, arguments.repeats)


if __name__ == "__main__":
    main()
