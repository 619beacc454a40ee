"""Is my learning rate too low, or too high? Watches AdamW under warm-up and cosine, at several largest rates.

python examples/watching.py
torchrun --standalone --nproc_per_node=2 examples/watching.py --lr 1e-3
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from data import load_digits, training_batches
from models import CNN
from ranks import Ranks
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

import gen_dist as gen
from gen_dist.plots import watch_figure

BATCH, WARM_UP = 64, 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--lr", type=float, nargs="+", default=[1e-3, 3e-2, 1.0], help="largest rates (default: %(default)s)")
    add("--epochs", type=int, default=15, help="(default: %(default)s)")
    add("--every", type=int, default=5, help="steps between two looks (default: %(default)s)")
    add("--output", type=Path, default=Path("runs", "watching"), help="(default: %(default)s)")
    arguments = parser.parse_args()
    ranks = Ranks.from_environment()
    with ranks.connected():
        runs = {f"Largest rate {lr:g}": train(lr, arguments.epochs, arguments.every, ranks) for lr in arguments.lr}
        if ranks.rank == 0:
            arguments.output.mkdir(parents=True, exist_ok=True)
            watch_figure(runs).savefig(arguments.output / "watching.png", dpi=100)
            print((arguments.output / "watching.png").resolve())


def train(lr: float, epochs: int, every: int, ranks: Ranks) -> list[gen.Watched]:
    """Train a small convolutional network on digits as any script does; what was seen of its steps."""
    torch.manual_seed(0)
    dataset = load_digits().to(ranks.device)
    network = CNN(channels=1, classes=dataset.classes).to(ranks.device)
    model = DistributedDataParallel(network) if ranks.launched else network
    steps = epochs * (len(dataset.train_x) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = LambdaLR(optimizer, lambda step: min(step / (WARM_UP * steps), cosine(step / steps)))
    watch = gen.Watch(optimizer, model, F.cross_entropy, every=every)  # 1 of 2
    for epoch in range(epochs):
        losses = []
        for x, y in training_batches(dataset, BATCH, epoch, seed=0, rank=ranks.rank, ranks=ranks.size):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            with watch.step(x, y):  # 2 of 2
                optimizer.step()
            schedule.step()
            losses.append(loss.detach())
    loss_of_epoch = ranks.mean(torch.stack(losses).mean())
    if ranks.rank == 0:
        high = sum(seen.edge is not None and seen.lr > seen.edge for seen in watch.history)
        print(f"largest rate {lr:g}: loss {loss_of_epoch:.3g}, above the edge at {high} of {len(watch.history)} looks")
    return watch.history


def cosine(share: float) -> float:
    return (1 + math.cos(math.pi * share)) / 2


if __name__ == "__main__":
    main()
