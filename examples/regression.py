"""A regression by a fully connected network: the loss along the direction of a step, before and after GeN trains it.

python examples/regression.py
torchrun --standalone --nproc_per_node=2 examples/regression.py
"""

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from ranks import Ranks
from torch import Tensor, nn

import gen_dist as gen
from gen_dist.plots import BLACK, BLUE, GREY, ORANGE, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SAMPLES, INPUTS, NOISE, BATCH = 1000, 10, 0.1, 32
LR_MAX = 0.1
BATCHES_DRAWN, POINTS = 8, 61

criterion = nn.MSELoss()


class Curves(NamedTuple):
    """The true loss along the direction of one batch and its parabola at 0, each on a grid of learning rates."""

    rates: list[float]
    losses: list[float]
    parabola: list[float]
    best: float


class History(NamedTuple):
    """For each epoch, its mean loss and the learning rate at its end."""

    losses: list[float]
    rates: list[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs", "regression"), help="(default: %(default)s)")
    arguments = parser.parse_args()
    ranks = Ranks.from_environment()
    if BATCH % ranks.size:
        parser.error(f"batches of {BATCH} do not divide into equal slices for {ranks.size} ranks")
    with ranks.connected():
        run(arguments.epochs, arguments.output, ranks)


def run(epochs: int, output: Path, ranks: Ranks) -> History:
    torch.manual_seed(0)
    x, y = (part.to(ranks.device) for part in new_data())
    # All ranks have the same weights, from one seed, and the scheduler averages gradients: no wrapper is needed.
    model = nn.Sequential(nn.Linear(INPUTS, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))
    model.double().to(ranks.device)
    optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters())
    scheduler = gen.ExactGen(optimizer, model, criterion, lr_max=LR_MAX)

    one_batch = next(batches(x, y, ranks))
    of_batches = [loss_curve(model, optimizer, *batch) for batch in islice(batches(x, y, ranks), BATCHES_DRAWN)]
    before = curves(model, optimizer, *one_batch)
    history = History([], [])
    for _ in range(epochs):
        losses = []
        for slice_x, slice_y in batches(x, y, ranks):
            optimizer.zero_grad()
            loss = criterion(model(slice_x), slice_y)
            loss.backward()
            scheduler.step(slice_x, slice_y)
            optimizer.step()
            losses.append(loss.detach())
        history.losses.append(ranks.mean(torch.stack(losses).mean()))
        history.rates.append(scheduler.get_last_lr()[0])
    after = curves(model, optimizer, *one_batch)

    if ranks.rank == 0:
        print(f"loss {history.losses[-1]:.4f} after {epochs} epochs; the noise in the data is {NOISE**2:.4f}")
        print(draw(of_batches, before, after, history, output).resolve())
    return history


def new_data() -> tuple[Tensor, Tensor]:
    """`x` `(samples, inputs)` and `y` `(samples, 1)`, an affine function of `x` with noise."""
    x = torch.randn(SAMPLES, INPUTS, dtype=torch.float64)
    y = x @ torch.randn(INPUTS, 1, dtype=torch.float64) + torch.randn(1, dtype=torch.float64)
    return x, y + NOISE * torch.randn_like(y)


def batches(x: Tensor, y: Tensor, ranks: Ranks) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's slices of the batches of an epoch, in a random order that is the same on every rank."""
    for batch in torch.randperm(len(x))[: len(x) // BATCH * BATCH].split(BATCH):
        indices = batch.tensor_split(ranks.size)[ranks.rank].to(x.device)
        yield x[indices], y[indices]


def gradients(model: nn.Module, optimizer: gen.GenOptimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    criterion(model(x), y).backward()


def loss_curve(
    model: nn.Module, optimizer: gen.GenOptimizer, x: Tensor, y: Tensor, widest: float = 1.0
) -> tuple[list[float], list[float]]:
    """The loss of this batch along the direction of its own gradient, at rates up to `widest`."""
    gradients(model, optimizer, x, y)
    rates = [widest * i / (POINTS - 1) for i in range(POINTS)]
    return rates, gen.loss_per_learning_rate(model, criterion, optimizer, x, y, rates).tolist()


def curves(model: nn.Module, optimizer: gen.GenOptimizer, x: Tensor, y: Tensor) -> Curves:
    """The line and its parabola, up to 2.5 times the rate at the parabola's minimum."""
    gradients(model, optimizer, x, y)
    _, slope, half_curvature = gen.second_order_approximation_coeffs(model, criterion, optimizer, x, y)
    best = float(-slope / (2 * half_curvature))
    rates = [2.5 * best * i / (POINTS - 1) for i in range(POINTS)]
    losses = gen.loss_per_learning_rate(model, criterion, optimizer, x, y, rates)
    parabola = gen.second_order_approximation(model, criterion, optimizer, x, y, rates)
    return Curves(rates, losses.tolist(), parabola.tolist(), best)


def draw(
    of_batches: list[tuple[list[float], list[float]]], before: Curves, after: Curves, history: History, output: Path
) -> Path:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(10, 6), layout="constrained")
        grid = figure.add_gridspec(2, 6, hspace=0.12)
        top = [figure.add_subplot(grid[0, 2 * i : 2 * i + 2]) for i in range(3)]
        bottom = [figure.add_subplot(grid[1, 3 * i : 3 * i + 3]) for i in range(2)]
        for rates, losses in of_batches:
            top[0].plot(rates, losses, color=BLUE, alpha=0.6, linewidth=1)
        top[0].set(title=f"Untrained, {len(of_batches)} batches", xlabel="learning rate", ylabel="loss")
        draw_curves(top[1], before, "Untrained, one batch")
        draw_curves(top[2], after, "Trained, the same batch")
        epochs = range(1, len(history.losses) + 1)
        bottom[0].plot(epochs, history.losses, color=BLUE)
        bottom[0].axhline(NOISE**2, color=GREY, linestyle="--", linewidth=1, label="noise in the data")
        bottom[0].set(title="Loss", xlabel="epoch", ylabel="mean squared error", yscale="log")
        bottom[0].legend()
        bottom[1].plot(epochs, history.rates, ".-", color=BLUE, linewidth=0.6)
        bottom[1].axhline(LR_MAX, color=BLACK, linestyle=(0, (5, 3)), linewidth=1, label="lr_max")
        bottom[1].set(title="Learning rate", xlabel="epoch", ylabel="at the last step", ylim=(0, 1.15 * LR_MAX))
        bottom[1].legend(loc="lower right")
        figure.legend(*top[1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    output.mkdir(parents=True, exist_ok=True)
    figure.savefig(output / "regression.png", dpi=100)
    return output / "regression.png"


def draw_curves(axes: "Axes", curves: Curves, title: str) -> None:
    axes.plot(curves.rates, curves.losses, color=BLUE, linewidth=1.8, label="true loss")
    axes.plot(curves.rates, curves.parabola, color=ORANGE, linewidth=1.8, linestyle="--", label="parabola at 0")
    axes.axvline(curves.best, color=BLACK, linewidth=1, linestyle=":", label="its minimum")
    axes.set(title=title, xlabel="learning rate")


if __name__ == "__main__":
    main()
