"""The tasks of the quality benchmark: models, data, and how a result is measured."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import count, islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import data
from data import Dataset, MissingDataError, training_batches
from models import CNN, GPT, MLP
from sentences import SentenceClassifier

__all__ = ["TASKS", "Dataset", "MissingDataError", "Reading", "Task", "cross_entropy", "load", "measured"]

Batch = tuple[Tensor, Tensor]
State = dict[str, Tensor]

CHUNK = 256  # examples in one forward pass of an evaluation
STATISTICS = 16  # such passes that make the statistics of batch norms

ADAMW_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FINE_TUNING_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
SGD_RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


def conv_net() -> nn.Module:
    """The usual network for images of 28 x 28: two convolutions and two linear layers."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def dropout_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 256), nn.ReLU(), nn.Dropout(0.3),
        nn.Linear(256, 256), nn.ReLU(), nn.Dropout(0.3),
        nn.Linear(256, 10),
    )  # fmt: skip


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over examples and, for text, over positions. The last dimension of the logits is the classes."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


@dataclass(frozen=True)
class Task:
    """A training problem. With `sgd`, its optimizer is SGD with momentum instead of AdamW, also for GeN.

    `sample` is the number of training examples that a result is measured on, and the largest number of test examples.
    `adamw_rates` are the rates that AdamW is tuned over. The best should not be at an end.
    """

    title: str
    data: str
    model: Callable[[int], nn.Module]  # from the number of classes
    steps: int
    batch_size: int
    sample: int
    sgd: bool = False
    adamw_rates: tuple[float, ...] = ADAMW_RATES

    def optimizer(self, model: nn.Module, rate: float) -> torch.optim.Optimizer:
        make = partial(torch.optim.SGD, momentum=0.9) if self.sgd else torch.optim.AdamW
        return make(model.parameters(), lr=rate)

    def new_model(self, dataset: Dataset, seed: int) -> nn.Module:
        """The model with the weights of this seed, which also fixes the random numbers of dropout."""
        torch.manual_seed(seed)
        return self.model(dataset.classes)

    def batches(self, dataset: Dataset, steps: int, seed: int, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """This rank's slices of `steps` batches, epoch after epoch, which are the same for the same seed."""
        epochs = (training_batches(dataset, self.batch_size, e, seed=seed, rank=rank, ranks=ranks) for e in count())
        return islice((batch for epoch in epochs for batch in epoch), steps)


FASHION, TEXT, REVIEWS = "fashion-mnist", "shakespeare", "film-reviews"
TASKS = {
    "cnn": Task("Fashion-MNIST CNN", FASHION, lambda _: conv_net(), 600, 64, 10_000),
    "mlp": Task("Fashion-MNIST MLP, SGD", FASHION, lambda k: MLP(784, k, width=256), 800, 64, 10_000, sgd=True),
    "gpt": Task("Shakespeare GPT", TEXT, lambda k: GPT(k, depth=2, width=64), 500, 32, 1_024),
    "digits": Task("digits, BatchNorm", "digits", lambda k: CNN(1, k, width=16), 500, 64, 2_000),
    "dropout": Task("Fashion-MNIST MLP, dropout", FASHION, lambda _: dropout_mlp(), 800, 64, 10_000),
    "sentences": Task(
        "film reviews, fine-tuned MiniLM", REVIEWS, SentenceClassifier, 120, 16, 512, adamw_rates=FINE_TUNING_RATES
    ),
}


@cache
def load(name: str, directory: Path) -> Dataset:
    """The data set of that name. Raises `MissingDataError`, which says what to type, if it is missing."""
    return data.load(name, directory)


@dataclass(frozen=True)
class Reading:
    """The quality of weights: mean losses over fixed samples in eval mode, and the share of correct test answers."""

    train_loss: float
    test_loss: float
    accuracy: float


def measured(task: Task, dataset: Dataset, state: State) -> Reading:
    """The quality of these weights. Statistics of batch norms come from training data, for every method."""
    model = task.model(dataset.classes)
    model.load_state_dict(state)
    train_x, train_y = sampled(dataset.train_x, dataset.train_y, task.sample)
    test_x, test_y = sampled(dataset.test_x, dataset.test_y, task.sample)
    update_bn(train_x.split(CHUNK)[:STATISTICS], model)
    train_loss, _ = evaluated(model, train_x, train_y)
    return Reading(train_loss, *evaluated(model, test_x, test_y))


def sampled(x: Tensor, y: Tensor, size: int) -> Batch:
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:size]
    return x[chosen], y[chosen]


@torch.no_grad()
def evaluated(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """The mean loss and the share of correct answers."""
    model.eval()
    loss = right = 0.0
    for inputs, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        logits = model(inputs)
        loss += cross_entropy(logits, labels).item() * len(inputs)
        right += (logits.argmax(-1) == labels).double().mean().item() * len(inputs)
    return loss / len(x), right / len(x)
