"""Three small models. Each keeps in `blocks` the submodules that FSDP2 wraps one by one."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """Images `(batch, channels, height, width)` -> logits `(batch, classes)`."""

    def __init__(self, inputs: int, classes: int, width: int = 128) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(inputs, width), nn.ReLU()),
                nn.Sequential(nn.Linear(width, width), nn.ReLU()),
            ]
        )
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class CNN(nn.Module):
    """Images `(batch, channels, height, width)` of 8 x 8 pixels or more -> logits `(batch, classes)`."""

    def __init__(self, channels: int, classes: int, width: int = 16) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                convolution(channels, width),
                convolution(width, 2 * width),
                convolution(2 * width, 4 * width),
            ]
        )
        self.head = nn.Linear(4 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=(2, 3)))


def convolution(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )


class GPT(nn.Module):
    """Tokens `(batch, time)`, at most `context` of them -> logits `(batch, time, vocabulary)`."""

    def __init__(self, vocabulary: int, context: int = 64, depth: int = 2, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList([TransformerBlock(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        # The token embedding is also the output layer: with the usual unit variance, logits would be huge.
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position(torch.arange(tokens.size(1), device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.token.weight)


class TransformerBlock(nn.Module):
    """Causal self-attention and a feed-forward network, each after a layer norm and with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(x)

    def attention(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        split = self.query_key_value(x).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.projection(mixed.transpose(1, 2).reshape(batch, time, width))
