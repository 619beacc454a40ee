"""The losses of the quality benchmark: each is a mean over examples, of a model's output and the targets."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over examples and, for text, over positions. The last dimension of the logits is the classes."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def squared_error(output: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(output, targets)


def negative_elbo(output: Tensor, pixels: Tensor) -> Tensor:
    """A variational autoencoder's loss in nats an image: cross-entropy of its pixels, and divergence of its code.

    `output` holds the logits of the pixels, then the means and the log-variances of the code.
    """
    logits, code = output.tensor_split([pixels.size(1)], dim=1)
    mean, log_variance = code.chunk(2, dim=1)
    reconstruction = F.binary_cross_entropy_with_logits(logits, pixels, reduction="sum")
    divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()
    return (reconstruction + divergence) / len(pixels)
