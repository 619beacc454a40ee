"""The tasks of the quality benchmark, and how a result is measured.

The width ladder (`LADDER`) is one language model in four sizes. Its measure is the test loss; elsewhere it is the train
loss in evaluation mode, which tells optimizers apart without the noise of generalization. Names that end in a number of
steps, or in `x4`, are other lengths of a task.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from quality_data import TEACHER_INPUTS, Dataset, MissingDataError, load
from quality_losses import cross_entropy, negative_elbo, squared_error
from quality_models import LSTM, VAE, PostNormTransformer, ViT, conv_net, dropout_mlp, regression_net, resnet
from quality_models import zero_at_first as zero
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from data import training_batches
from models import CNN, GPT, MLP
from sentences import SentenceClassifier

__all__ = [
    "DESIGN_SEEDS",
    "DESIGN_TASKS",
    "HELD_OUT_TASKS",
    "LADDER",
    "TASKS",
    "Dataset",
    "MissingDataError",
    "Reading",
    "Task",
    "ladder",
    "load",
    "measured",
]

Batch = tuple[Tensor, Tensor]
State = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]

CHUNK = 256  # examples in one forward pass of an evaluation
STATISTICS = 16  # such passes that make the statistics of batch norms
TRAIN_LOSS, TEST_LOSS = "train_loss", "test_loss"

ADAMW_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FINE_TUNING_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
LARGE_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # for regressions and short runs
RECURRENT_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SGD_RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


@dataclass(frozen=True)
class Task:
    """A training problem. With `sgd`, its optimizer is SGD with momentum instead of AdamW, also for GeN.

    `sample` is the number of training examples that a result is measured on, and the largest number of test examples.
    `adamw_rates` are the rates that AdamW is tuned over. The best should not be at an end. `clip` is the largest norm
    of a gradient. `measure` is the reading that counts. The targets grow from nothing to their full size over the first
    `drift` steps, as a loss does that another player makes harder.
    """

    title: str
    data: str
    model: Callable[[int], nn.Module]  # from the number of classes
    steps: int
    batch_size: int
    sample: int
    sgd: bool = False
    adamw_rates: tuple[float, ...] = ADAMW_RATES
    loss: Loss = cross_entropy
    clip: float | None = None
    measure: str = TRAIN_LOSS
    drift: int = 0

    def optimizer(self, model: nn.Module, rate: float) -> torch.optim.Optimizer:
        make = partial(torch.optim.SGD, momentum=0.9) if self.sgd else torch.optim.AdamW
        return make(model.parameters(), lr=rate)

    def new_model(self, dataset: Dataset, seed: int) -> nn.Module:
        """The model where the data is, with the weights of this seed, which also fixes the masks of dropout."""
        torch.manual_seed(seed)
        return self.model(dataset.classes).to(dataset.train_x.device)

    def batches(self, dataset: Dataset, steps: int, seed: int, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """This rank's slices of `steps` batches, epoch after epoch, which are the same for the same seed."""
        epochs = (training_batches(dataset, self.batch_size, e, seed=seed, rank=rank, ranks=ranks) for e in count())
        for step, (x, y) in enumerate(islice((batch for epoch in epochs for batch in epoch), steps), 1):
            yield x, (y * (step / self.drift) if step < self.drift else y)

    def clipped(self, model: nn.Module) -> float:
        """Clip the gradients, and return the factor by which they shrank: 1 where they are short enough."""
        if self.clip is None:
            return 1.0
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), self.clip))
        return min(1.0, self.clip / norm) if norm else 1.0


FASHION, PIXELS, TEXT, LONG_TEXT, REVIEWS = (
    "fashion-mnist", "fashion-mnist-pixels", "shakespeare", "shakespeare-128", "film-reviews"
)  # fmt: skip


def fashion(title: str, model: Callable[[int], nn.Module], steps: int, **others: Any) -> Task:
    """Images of clothes in batches of 64."""
    return replace(Task(f"Fashion-MNIST {title}", FASHION, model, steps, 64, 10_000), **others)


def text(title: str, model: Callable[[int], nn.Module], steps: int, **others: Any) -> Task:
    """Characters of Shakespeare in batches of 32 times 64."""
    return replace(Task(f"Shakespeare {title}", TEXT, model, steps, 32, 1_024), **others)


def ladder(size: str, depth: int, width: int, steps: int, rates: tuple[float, ...], sample: int) -> Task:
    """A GPT with heads of 64 (of 16 in the smallest), in batches of 8 times 128 characters."""
    heads = max(4, width // 64)
    model = partial(GPT, context=128, depth=depth, width=width, heads=heads)
    return Task(f"GPT {size}", LONG_TEXT, model, steps, 8, sample, adamw_rates=rates, measure=TEST_LOSS)


def regression(title: str, data: str, model: Callable[[], nn.Module], steps: int, batch_size: int) -> Task:
    return Task(title, data, lambda _: model(), steps, batch_size, 10_000, adamw_rates=LARGE_RATES, loss=squared_error)


SINGLE = {
    "cnn": fashion("CNN", lambda _: conv_net(), 600),
    "mlp": fashion("MLP, SGD", lambda k: MLP(784, k, width=256), 800, sgd=True),
    "gpt": text("GPT", lambda k: GPT(k, depth=2, width=64), 500),
    "digits": Task("digits, BatchNorm", "digits", lambda k: CNN(1, k, width=16), 500, 64, 2_000),
    "dropout": fashion("MLP, dropout", lambda _: dropout_mlp(), 800),
    "sentences": Task(
        "film reviews, fine-tuned MiniLM", REVIEWS, SentenceClassifier, 120, 16, 512, adamw_rates=FINE_TUNING_RATES
    ),
    "post-norm": text("post-norm transformer", PostNormTransformer, 300, batch_size=16),
    "lstm": text("LSTM, clipped", LSTM, 400, clip=0.25, adamw_rates=RECURRENT_RATES),
    "vae": fashion("VAE", lambda _: VAE(), 600, data=PIXELS, loss=negative_elbo),
    "resnet": fashion("ResNet", resnet, 300),
    "vit": fashion("ViT", ViT, 400),
    "diabetes": regression("diabetes, noisy", "diabetes", lambda: regression_net(10, 4), 300, 32),
    "friedman": regression("Friedman 1, noisy", "friedman", lambda: regression_net(10, 64), 500, 64),
    "drift": replace(
        regression("teacher, drifting", "teacher", lambda: zero(regression_net(TEACHER_INPUTS, 64)), 500, 64), drift=30
    ),
    "gpt-0.1m": ladder("0.1M", 2, 64, 150, (1e-3, 3e-3, 1e-2, 3e-2), 512),
    "gpt-3m": ladder("3M", 4, 256, 150, (3e-4, 1e-3, 3e-3), 256),
    "gpt-25m": ladder("25M", 8, 512, 80, (3e-5, 1e-4, 3e-4, 1e-3), 64),
    "gpt-43m": ladder("43M", 6, 768, 60, (3e-5, 1e-4, 3e-4, 1e-3), 64),
}
LADDER = ("gpt-0.1m", "gpt-3m", "gpt-25m", "gpt-43m")


def of_length(name: str, suffix: str, steps: int, **others: Any) -> dict[str, Task]:
    task = SINGLE[name]
    return {f"{name}-{suffix}": replace(task, title=f"{task.title}, {steps:,} steps", steps=steps, **others)}


SHORT_RATES = {"cnn": LARGE_RATES, "friedman": LARGE_RATES, "lstm": RECURRENT_RATES, "vit": LARGE_RATES}
SHORT = {
    key: task
    for name, rates in SHORT_RATES.items()
    for steps in (40, 100)
    for key, task in of_length(name, str(steps), steps, adamw_rates=rates).items()
}
LONG = {
    key: task
    for name in ("dropout", "vae", "gpt-3m")
    for key, task in of_length(name, "x4", 4 * SINGLE[name].steps).items()
}
TASKS = SINGLE | SHORT | LONG

# Methods are designed on half of the tasks and on three seeds, named before any of them was run. The other half was
# never looked at while a method was made. What was looked at before there were halves is for design.
DESIGN_SEEDS = (0, 10, 20)
DESIGN_TASKS = (
    "cnn", "mlp", "gpt", "digits", "dropout", "sentences", "post-norm", "diabetes", "gpt-0.1m", "gpt-3m", "gpt-43m",
    "cnn-40", "cnn-100", "dropout-x4", "gpt-3m-x4",
)  # fmt: skip
HELD_OUT_TASKS = (
    "lstm", "vae", "resnet", "vit", "friedman", "drift", "gpt-25m",
    "lstm-40", "lstm-100", "friedman-40", "friedman-100", "vit-40", "vit-100", "vae-x4",
)  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """The quality of weights: mean losses over fixed samples in eval mode, and the share of correct test answers.

    The share is NaN where there are no answers to be right or wrong.
    """

    train_loss: float
    test_loss: float
    accuracy: float


def measured(task: Task, dataset: Dataset, state: State) -> Reading:
    """The quality of these weights. Statistics of batch norms come from training data, for every method."""
    model = task.model(dataset.classes).to(dataset.train_x.device)
    model.load_state_dict(state)
    train_x, train_y = sampled(dataset.train_x, dataset.train_y, task.sample)
    test_x, test_y = sampled(dataset.test_x, dataset.test_y, task.sample)
    update_bn(train_x.split(CHUNK)[:STATISTICS], model)
    train_loss, _ = evaluated(task, model, train_x, train_y)
    return Reading(train_loss, *evaluated(task, model, test_x, test_y))


def sampled(x: Tensor, y: Tensor, size: int) -> Batch:
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:size]
    return x[chosen], y[chosen]


@torch.no_grad()
def evaluated(task: Task, model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """The mean loss and the share of correct answers. A model that draws random numbers draws the same each time."""
    model.eval()
    loss = right = 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for inputs, targets in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            output = model(inputs)
            loss += task.loss(output, targets).item() * len(inputs)
            right += correct(output, targets) * len(inputs)
    return loss / len(x), right / len(x)


def correct(output: Tensor, targets: Tensor) -> float:
    """The share of correct answers; NaN if the targets are no classes."""
    return math.nan if targets.is_floating_point() else (output.argmax(-1) == targets).double().mean().item()
