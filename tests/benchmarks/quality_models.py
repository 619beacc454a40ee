"""The models of the quality benchmark that the examples do not have: each is what a beginner's page would build."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

PIXELS = 28 * 28


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
        nn.Linear(PIXELS, 256), nn.ReLU(), nn.Dropout(0.3),
        nn.Linear(256, 256), nn.ReLU(), nn.Dropout(0.3),
        nn.Linear(256, 10),
    )  # fmt: skip


def regression_net(inputs: int, width: int) -> nn.Sequential:
    """Inputs `(batch, inputs)` -> one output `(batch, 1)`, with two hidden layers."""
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))


def zero_at_first(net: nn.Sequential) -> nn.Sequential:
    """The net with a last layer of zeros, so that its output is zero until it learns."""
    last = net[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return net


class PostNormTransformer(nn.Module):
    """Tokens `(batch, time)` -> logits `(batch, time, vocabulary)`, by PyTorch's encoder layer with its own defaults.

    They are a layer norm after each residual connection, ReLU, and dropout of 0.1.
    """

    def __init__(self, vocabulary: int, context: int = 64, depth: int = 2, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.1 * torch.randn(context, width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)
        nn.init.uniform_(self.token.weight, -0.1, 0.1)
        nn.init.uniform_(self.head.weight, -0.1, 0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        time, width = tokens.size(1), self.position.size(1)
        x = self.token(tokens) * math.sqrt(width) + self.position[:time]
        mask = nn.Transformer.generate_square_subsequent_mask(time, device=x.device, dtype=x.dtype)
        return self.head(self.encoder(x, mask, is_causal=True))


class LSTM(nn.Module):
    """Tokens `(batch, time)` -> logits `(batch, time, vocabulary)`."""

    def __init__(self, vocabulary: int, width: int = 128) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width // 2)
        self.lstm = nn.LSTM(width // 2, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.lstm(self.token(tokens))
        return self.head(states)


class VAE(nn.Module):
    """Images -> `(batch, 784 + 2 * latent)`: logits of the pixels, then means and log-variances of the code.

    The code is drawn at random in training and in evaluation, as the loss is defined by an expectation.
    """

    def __init__(self, width: int = 400, latent: int = 20) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(PIXELS, width), nn.ReLU(), nn.Linear(width, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, PIXELS))

    def forward(self, images: Tensor) -> Tensor:
        mean, log_variance = self.encoder(images.flatten(1)).chunk(2, dim=1)
        code = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        return torch.cat([self.decoder(code), mean, log_variance], dim=1)


class ResidualBlock(nn.Module):
    """Two convolutions with batch norms, and a shortcut past them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.convolutions(x) + self.shortcut(x))


def resnet(classes: int, width: int = 16) -> nn.Module:
    """Images `(batch, 1, 28, 28)` -> logits `(batch, classes)`, at 14 x 14, 7 x 7 and 4 x 4 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        ResidualBlock(width, width, 1), ResidualBlock(width, 2 * width, 2), ResidualBlock(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes),
    )  # fmt: skip


class ViT(nn.Module):
    """Images `(batch, 1, 28, 28)` -> logits `(batch, classes)`, from 16 patches of 7 x 7 pixels."""

    def __init__(self, classes: int, depth: int = 4, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, kernel_size=7, stride=7)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
                )
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.layers(x)).mean(dim=1))
