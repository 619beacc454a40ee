"""The modules of torch.nn, with their forms: one line is a module and the shape of its input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.utils.prune
from torch import Tensor, nn

from zoo.case import Case, case

WIDTH = 8
VECTORS = (3, WIDTH)
SEQUENCE = (2, 5, WIDTH)
LINES, IMAGE, VOLUME = (2, 4, 9), (2, 4, 8, 8), (2, 4, 4, 4, 4)
Row = tuple[Callable[[], nn.Module], tuple[int, ...]]


def _activations() -> dict[str, Row]:
    plain = (
        "CELU ELU GELU GLU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish PReLU ReLU ReLU6 RReLU "
        "SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink Identity"
    ).split()
    rows: dict[str, Row] = {name: (getattr(nn, name), VECTORS) for name in plain}
    return rows | {
        "GELU tanh": (lambda: nn.GELU("tanh"), VECTORS),
        "PReLU per channel": (lambda: nn.PReLU(4), IMAGE),
        "ReLU inplace": (lambda: nn.ReLU(inplace=True), VECTORS),
        "Softmax": (lambda: nn.Softmax(1), VECTORS),
        "Softmax2d": (nn.Softmax2d, IMAGE),
        "Softmin": (lambda: nn.Softmin(1), VECTORS),
        "LogSoftmax": (lambda: nn.LogSoftmax(1), VECTORS),
        "Threshold": (lambda: nn.Threshold(0.1, 0.5), VECTORS),
        "Softplus steep": (lambda: nn.Softplus(3, 1), VECTORS),
    }


def _layers() -> dict[str, Row]:
    return {
        "Linear": (lambda: nn.Linear(WIDTH, 5), SEQUENCE),
        "Conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), LINES),
        "Conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2), IMAGE),
        "Conv2d reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), IMAGE),
        "Conv2d same, dilated": (lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2), IMAGE),
        "Conv3d": (lambda: nn.Conv3d(4, 2, 2), VOLUME),
        "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), LINES),
        "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), IMAGE),
        "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 2, 2), VOLUME),
        "BatchNorm1d": (lambda: nn.BatchNorm1d(4), LINES),
        "BatchNorm2d": (lambda: nn.BatchNorm2d(4), IMAGE),
        "BatchNorm3d": (lambda: nn.BatchNorm3d(4), VOLUME),
        "BatchNorm2d without statistics": (lambda: nn.BatchNorm2d(4, track_running_stats=False), IMAGE),
        "GroupNorm": (lambda: nn.GroupNorm(2, 4), IMAGE),
        "InstanceNorm1d": (lambda: nn.InstanceNorm1d(4), LINES),
        "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), IMAGE),
        "InstanceNorm3d": (lambda: nn.InstanceNorm3d(4), VOLUME),
        "LayerNorm": (lambda: nn.LayerNorm(WIDTH), SEQUENCE),
        "LayerNorm of images": (lambda: nn.LayerNorm([4, 8, 8], bias=False), IMAGE),
        "RMSNorm": (lambda: nn.RMSNorm(WIDTH), SEQUENCE),
        "LocalResponseNorm": (lambda: nn.LocalResponseNorm(3), IMAGE),
        "CrossMapLRN2d": (lambda: nn.CrossMapLRN2d(3), IMAGE),
        "Dropout": (nn.Dropout, SEQUENCE),
        "Dropout1d": (nn.Dropout1d, LINES),
        "Dropout2d": (nn.Dropout2d, IMAGE),
        "Dropout3d": (nn.Dropout3d, VOLUME),
        "AlphaDropout": (nn.AlphaDropout, SEQUENCE),
        "FeatureAlphaDropout": (nn.FeatureAlphaDropout, IMAGE),
        "MaxPool1d": (lambda: nn.MaxPool1d(2), LINES),
        "MaxPool2d": (lambda: nn.MaxPool2d(3, 2, padding=1, ceil_mode=True), IMAGE),
        "MaxPool3d": (lambda: nn.MaxPool3d(2), VOLUME),
        "MaxPool and MaxUnpool1d": (lambda: _Unpooled(nn.MaxPool1d, nn.MaxUnpool1d), (*LINES[:2], 8)),
        "MaxPool and MaxUnpool2d": (lambda: _Unpooled(nn.MaxPool2d, nn.MaxUnpool2d), IMAGE),
        "MaxPool and MaxUnpool3d": (lambda: _Unpooled(nn.MaxPool3d, nn.MaxUnpool3d), VOLUME),
        "AvgPool1d": (lambda: nn.AvgPool1d(2), LINES),
        "AvgPool2d": (lambda: nn.AvgPool2d(3, 2, padding=1, count_include_pad=False), IMAGE),
        "AvgPool3d": (lambda: nn.AvgPool3d(2), VOLUME),
        "FractionalMaxPool2d": (lambda: nn.FractionalMaxPool2d(2, output_size=5), IMAGE),
        "FractionalMaxPool3d": (lambda: nn.FractionalMaxPool3d(2, output_size=2), VOLUME),
        "LPPool1d": (lambda: nn.LPPool1d(2, 3), LINES),
        "LPPool2d": (lambda: nn.LPPool2d(2, 2), IMAGE),
        "LPPool3d": (lambda: nn.LPPool3d(2, 2), VOLUME),
        "AdaptiveAvgPool1d": (lambda: nn.AdaptiveAvgPool1d(4), LINES),
        "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d((3, 2)), IMAGE),
        "AdaptiveAvgPool3d": (lambda: nn.AdaptiveAvgPool3d(3), VOLUME),
        "AdaptiveMaxPool1d": (lambda: nn.AdaptiveMaxPool1d(4), LINES),
        "AdaptiveMaxPool2d": (lambda: nn.AdaptiveMaxPool2d(3), IMAGE),
        "AdaptiveMaxPool3d": (lambda: nn.AdaptiveMaxPool3d(3), VOLUME),
        "ReflectionPad1d": (lambda: nn.ReflectionPad1d(2), LINES),
        "ReflectionPad2d": (lambda: nn.ReflectionPad2d(1), IMAGE),
        "ReflectionPad3d": (lambda: nn.ReflectionPad3d(1), VOLUME),
        "ReplicationPad1d": (lambda: nn.ReplicationPad1d(2), LINES),
        "ReplicationPad2d": (lambda: nn.ReplicationPad2d(1), IMAGE),
        "ReplicationPad3d": (lambda: nn.ReplicationPad3d(1), VOLUME),
        "CircularPad2d": (lambda: nn.CircularPad2d(1), IMAGE),
        "ConstantPad2d": (lambda: nn.ConstantPad2d(1, 0.5), IMAGE),
        "ZeroPad2d": (lambda: nn.ZeroPad2d(1), IMAGE),
        "Fold": (lambda: nn.Sequential(nn.Unfold(2), nn.Fold((8, 8), 2)), IMAGE),
        "Unfold": (lambda: nn.Unfold(3, padding=1), IMAGE),
        "PixelShuffle": (lambda: nn.PixelShuffle(2), IMAGE),
        "PixelUnshuffle": (lambda: nn.PixelUnshuffle(2), IMAGE),
        "ChannelShuffle": (lambda: nn.ChannelShuffle(2), IMAGE),
        "Upsample nearest": (lambda: nn.Upsample(scale_factor=2), IMAGE),
        "Upsample linear": (lambda: nn.Upsample(scale_factor=2, mode="linear"), LINES),
        "Upsample bilinear": (lambda: nn.Upsample(size=(11, 5), mode="bilinear", align_corners=True), IMAGE),
        "Upsample bicubic": (lambda: nn.Upsample(scale_factor=1.5, mode="bicubic"), IMAGE),
        "Upsample trilinear": (lambda: nn.Upsample(scale_factor=2, mode="trilinear"), VOLUME),
        "Flatten, Unflatten": (lambda: nn.Sequential(nn.Flatten(), nn.Unflatten(1, (16, 16))), IMAGE),
        "CosineSimilarity": (lambda: _Pair(nn.CosineSimilarity()), VECTORS),
        "PairwiseDistance": (lambda: _Pair(nn.PairwiseDistance()), VECTORS),
        "Bilinear": (lambda: _Pair(nn.Bilinear(WIDTH, WIDTH, 3)), VECTORS),
        "MultiheadAttention": (lambda: _Attention(batch_first=True), SEQUENCE),
        "MultiheadAttention with weights": (lambda: _Attention(need_weights=True, dropout=0.1), SEQUENCE),
        "MultiheadAttention, bias_kv, zero_attn": (lambda: _Attention(add_bias_kv=True, add_zero_attn=True), SEQUENCE),
        "TransformerEncoder": (
            lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True), 2),
            SEQUENCE,
        ),
        "Transformer": (
            lambda: _Pair(nn.Transformer(WIDTH, 2, 1, 1, 16, activation="gelu", norm_first=True)),
            SEQUENCE,
        ),
        "RNN": (lambda: nn.RNN(WIDTH, 6, 2, batch_first=True), SEQUENCE),
        "RNN relu": (lambda: nn.RNN(WIDTH, 6, nonlinearity="relu", bidirectional=True), SEQUENCE),
        "LSTM": (lambda: nn.LSTM(WIDTH, 6, 2, dropout=0.1), SEQUENCE),
        "LSTM projected, bidirectional": (lambda: nn.LSTM(WIDTH, 6, proj_size=3, bidirectional=True), SEQUENCE),
        "GRU": (lambda: nn.GRU(WIDTH, 6, 2, batch_first=True), SEQUENCE),
        "LSTM packed": (lambda: _Packed(nn.LSTM(WIDTH, 6, batch_first=True)), SEQUENCE),
        "GRU packed": (lambda: _Packed(nn.GRU(WIDTH, 6, bidirectional=True, batch_first=True)), SEQUENCE),
        "RNN packed": (lambda: _Packed(nn.RNN(WIDTH, 6, batch_first=True)), SEQUENCE),
        "RNNCell": (lambda: nn.RNNCell(WIDTH, 6), VECTORS),
        "GRUCell": (lambda: nn.GRUCell(WIDTH, 6), VECTORS),
        "LSTMCell": (lambda: nn.LSTMCell(WIDTH, 6), VECTORS),
        "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, 5)), VECTORS),
        "weight_norm of old": (lambda: nn.utils.weight_norm(nn.Linear(WIDTH, 5)), VECTORS),
        "spectral_norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, 5)), VECTORS),
        "spectral_norm of old": (lambda: nn.utils.spectral_norm(nn.Linear(WIDTH, 5)), VECTORS),
        "orthogonal": (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(WIDTH, 5)), VECTORS),
        "orthogonal cayley": (
            lambda: nn.utils.parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH), orthogonal_map="cayley"),
            VECTORS,
        ),
        "pruned": (lambda: nn.utils.prune.l1_unstructured(nn.Linear(WIDTH, 5), "weight", 0.3), VECTORS),
    }


def _embeddings() -> dict[str, Row]:
    return {
        "Embedding": (lambda: nn.Embedding(11, 4, padding_idx=0), (2, 5)),
        "Embedding max_norm": (lambda: nn.Embedding(11, 4, max_norm=0.5), (2, 5)),
        "EmbeddingBag sum": (lambda: nn.EmbeddingBag(11, 4, mode="sum"), (2, 5)),
        "EmbeddingBag mean": (lambda: nn.EmbeddingBag(11, 4, mode="mean", padding_idx=0), (2, 5)),
        "EmbeddingBag max": (lambda: nn.EmbeddingBag(11, 4, mode="max"), (2, 5)),
        "AdaptiveLogSoftmaxWithLoss": (_Adaptive, VECTORS),
    }


class _Pair(nn.Module):
    """A module of two arguments, given the input and a turned copy."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x.flip(0).sin())


class _Attention(nn.Module):
    def __init__(self, need_weights: bool = False, **options: Any) -> None:
        super().__init__()
        self.need_weights = need_weights
        self.inner = nn.MultiheadAttention(WIDTH, 2, **options)

    def forward(self, x: Tensor) -> Any:
        return self.inner(x, x, x, need_weights=self.need_weights)


class _Packed(nn.Module):
    def __init__(self, inner: nn.RNNBase) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]), batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.inner(packed)[0], batch_first=True)[0]


class _Unpooled(nn.Module):
    def __init__(self, pool: type[nn.Module], unpool: type[nn.Module]) -> None:
        super().__init__()
        self.pool, self.unpool = pool(2, return_indices=True), unpool(2)  # type: ignore[call-arg]

    def forward(self, x: Tensor) -> Tensor:
        return self.unpool(*self.pool(x))


class _Adaptive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.AdaptiveLogSoftmaxWithLoss(WIDTH, 12, [4, 8])

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, torch.tensor([1, 5, 10])).loss


def _rows() -> dict[str, Row]:
    return _activations() | _layers() | _embeddings()


def names() -> list[str]:
    return [*_rows()]


def build(name: str) -> Case:
    """The module behind an affine map of its input, so that its input moves too; embeddings alone."""
    make, shape = _rows()[name]
    module = make().double()
    if name in _embeddings() and name != "AdaptiveLogSoftmaxWithLoss":
        tokens = torch.randint(1, 11, shape)
        return case(module, lambda: module(tokens))
    x, gain, shift = torch.randn(shape), nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))
    model = nn.ModuleList([module])
    model.gain, model.shift = gain, shift
    return case(model, lambda: module(x * model.gain + model.shift))
