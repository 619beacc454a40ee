"""The data sets of the quality benchmark: those of the examples, and others made from them or by formulas."""

from __future__ import annotations

import math
import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import data
from data import Dataset, MissingDataError

LONG_CONTEXT = 128
NOISE = 1.0  # of Friedman's targets, whose own standard deviation is about 4.9
TRAIN, TEST = 20_000, 4_000  # examples of the generated data sets
TEACHER_INPUTS = 20


@cache
def load(name: str, directory: Path) -> Dataset:
    """The data set of that name. Raises `MissingDataError`, which says what to type, if it is missing."""
    match name:
        case "shakespeare-128":
            return with_long_context(data.load("shakespeare", directory))
        case "fashion-mnist-pixels":
            return with_pixels_as_targets(data.load("fashion-mnist", directory))
        case "diabetes":
            return load_diabetes()
        case "friedman":
            return generated_friedman()
        case "teacher":
            return generated_by_teacher()
    return data.load(name, directory)


def with_long_context(text: Dataset) -> Dataset:
    """The same text in examples of `LONG_CONTEXT` characters. Windows of text lie one after the other."""

    def joined(windows: Tensor) -> Tensor:
        whole = windows.numel() // LONG_CONTEXT
        return windows.flatten()[: whole * LONG_CONTEXT].view(whole, LONG_CONTEXT)

    return Dataset(*map(joined, (text.train_x, text.train_y, text.test_x, text.test_y)), classes=text.classes)


def with_pixels_as_targets(images: Dataset) -> Dataset:
    """For autoencoders: the targets are the pixels of the image itself."""
    return Dataset(images.train_x, images.train_x.flatten(1), images.test_x, images.test_x.flatten(1), classes=0)


def load_diabetes(test_share: float = 0.2) -> Dataset:
    """442 patients, part of scikit-learn: ten measurements, and how the disease went on, which they hardly foretell."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise MissingDataError('diabetes is part of scikit-learn: pip install "gen_dist[examples]"') from error
    bunch = datasets.load_diabetes()
    x, y = (torch.as_tensor(part, dtype=torch.float32) for part in (bunch.data, bunch.target))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    test, train = order.tensor_split([round(test_share * len(y))])
    x, y = standardised(x), standardised(y.unsqueeze(1))
    return Dataset(x[train], y[train], x[test], y[test], classes=0)


def generated_friedman() -> Dataset:
    """Friedman's first regression problem (1991) with its noise, below which no loss can fall for long."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(TRAIN + TEST, 10, generator=generator)
    clean = 10 * torch.sin(math.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    y = clean + NOISE * torch.randn(len(x), generator=generator)
    return parted(standardised(x), standardised(y.unsqueeze(1)))


def generated_by_teacher() -> Dataset:
    """The targets are the outputs of a random network, without noise."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TRAIN + TEST, TEACHER_INPUTS, generator=generator)
    first = torch.randn(TEACHER_INPUTS, 64, generator=generator) / math.sqrt(TEACHER_INPUTS)
    second = torch.randn(64, 1, generator=generator)
    return parted(x, standardised(nn.functional.relu(2 * x @ first) @ second))


def standardised(columns: Tensor) -> Tensor:
    """Each column with mean zero and variance one."""
    return (columns - columns.mean(0)) / columns.std(0)


def parted(x: Tensor, y: Tensor) -> Dataset:
    return Dataset(x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:], classes=0)
