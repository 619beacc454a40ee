"""Jets of single operators: they equal double backward in float64 to a relative error of 1e-9, or raise an error.

A row of a table is a function and the shapes of its arguments, which are random float64 tensors that all move. The
loss is the sum of the squares of the function, so that linear operators have a curvature too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor

from gen_dist import jets
from gen_dist.jets import Jet, JetMode, UnsupportedOperation, derivatives, velocity_only
from gen_dist.jets.rules import attention

TOLERANCE = 1e-9
Shapes = tuple[tuple[int, ...], ...]
Row = tuple[Callable[..., Tensor], Shapes]

LABELS = torch.tensor([1, 0, 3])
FIXED = torch.linspace(0.1, 0.9, 15, dtype=torch.float64).view(3, 5)
INDEX = torch.tensor([[0, 1], [1, 1], [2, 3], [4, 0]])

IMAGE: Shapes = ((2, 4, 6, 6),)
MATRIX: Shapes = ((4, 5),)
PAIR: Shapes = ((4, 5), (4, 5))
ATTENTION: Shapes = ((2, 2, 4, 8), (2, 2, 4, 8), (2, 2, 4, 8))
LOGITS: Shapes = ((3, 5),)


def positive(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x: function(x * x + 0.5)


def normalised(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Multiply the output by the input, since the sum of squares of a normalised tensor is constant."""
    return lambda x, *parameters: function(x, *parameters) * x


def written_in_place(x: Tensor, y: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, 0] = x[:, 0] * y[:, 1]
    out[:, 1:3] += y[:, :2]
    kept = out[:, 2]
    out.mul_(y)
    z = (out * x).sin_()
    z[0].mul_(kept[:1])
    return z + kept[:, None]


def written_through_views(x: Tensor, y: Tensor) -> Tensor:
    h = x * y
    view = h.view(2, 10).t()
    view[3:5] *= x[0, 0]
    flat = h.flatten()
    view.add_(x[1, 1])
    return h * flat.view(4, 5)


def linear_operators() -> dict[str, Row]:
    return {
        "linear": (F.linear, ((2, 4, 8), (6, 8), (6,))),
        "linear without bias": (F.linear, ((4, 8), (6, 8))),
        "bilinear": (F.bilinear, ((3, 4), (3, 5), (2, 4, 5), (2,))),
        "conv1d": (lambda x, w, b: F.conv1d(x, w, b, padding=1, stride=2), ((2, 3, 5), (4, 3, 3), (4,))),
        "conv2d": (lambda x, w, b: F.conv2d(x, w, b, padding="same"), ((2, 3, 5, 5), (4, 3, 3, 3), (4,))),
        "conv2d groups": (lambda x, w: F.conv2d(x, w, groups=2, dilation=2), ((2, 4, 6, 6), (4, 2, 3, 3))),
        "conv3d": (F.conv3d, ((1, 2, 4, 4, 4), (3, 2, 2, 2, 2), (3,))),
        "conv_transpose2d": (F.conv_transpose2d, ((2, 3, 5, 5), (3, 4, 3, 3), (4,))),
        "matmul": (torch.matmul, ((2, 3, 4), (4, 5))),
        "batched matmul": (torch.matmul, ((2, 3, 4), (2, 4, 5))),
        "matrix vector": (torch.matmul, ((3, 4), (4,))),
        "dot": (torch.dot, ((4,), (4,))),
        "einsum": (lambda a, b: torch.einsum("bij,kj->bik", a, b), ((2, 3, 4), (5, 4))),
        "outer": (torch.outer, ((3,), (4,))),
        "kron": (torch.kron, ((2, 2), (2, 2))),
        "addmm": (lambda a, b, c: torch.addmm(a, b, c, beta=0.5, alpha=2), ((3, 5), (3, 4), (4, 5))),
        "baddbmm": (torch.baddbmm, ((2, 3, 5), (2, 3, 4), (2, 4, 5))),
        "addcmul": (lambda a, b, c: torch.addcmul(a, b, c, value=2), ((3,), (3,), (3,))),
        "addcdiv": (lambda a, b, c: torch.addcdiv(a, b, c * c + 1, value=2), ((3,), (3,), (3,))),
        "broadcast product": (lambda a, b: a * b, ((2, 1, 4), (3, 1))),
        "broadcast sum": (lambda a, b: torch.add(a, b, alpha=3), ((2, 1, 4), (3, 1))),
        "lerp": (torch.lerp, ((3,), (3,), (3,))),
        "embedding": (lambda w: F.embedding(torch.tensor([[1, 2], [0, 1]]), w) + 1, MATRIX),
        "tied embedding": (lambda w: F.embedding(torch.tensor([[1, 2], [0, 1]]), w) @ w.t(), MATRIX),
        "upsampling": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), ((1, 2, 3, 3),)),
        "padding": (lambda x: F.pad(x, (1, 1), value=3.0), MATRIX),
        "reflection": (lambda x: F.pad(x, (1, 1), mode="reflect"), MATRIX),
        "unfold": (lambda x: F.unfold(x, 2), ((1, 2, 3, 3),)),
        "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), IMAGE),
    }


def elementwise() -> dict[str, Row]:
    names = (
        "relu gelu silu tanh softplus mish elu celu selu leaky_relu hardswish hardtanh logsigmoid relu6 softsign "
        "tanhshrink softshrink hardshrink sigmoid"
    ).split()
    rows: dict[str, Row] = {name: (getattr(F, name), MATRIX) for name in names}
    names = "exp sin cos tan atan erf sinh cosh expm1 square abs exp2 sinc".split()
    rows |= {name: (getattr(torch, name), MATRIX) for name in names}
    names = "log sqrt rsqrt reciprocal log1p log2 log10 lgamma".split()
    rows |= {name: (positive(getattr(torch, name)), MATRIX) for name in names}
    return rows | {
        "gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), MATRIX),
        "softplus steep": (lambda x: F.softplus(x, beta=3, threshold=1), MATRIX),
        "elu alpha": (lambda x: F.elu(x, alpha=0.3), MATRIX),
        "glu": (F.glu, ((4, 6),)),
        "prelu": (F.prelu, ((4, 3), (3,))),
        "division": (lambda x, y: x / (y * y + 1), ((4, 5), (5,))),
        "number over tensor": (lambda y: 2 / (y * y + 1), MATRIX),
        "power": (lambda x, y: (x * x + 0.5) ** y, ((4, 5), (5,))),
        "number to a power": (lambda x: 2.0**x, MATRIX),
        "cube": (lambda x: x**3, MATRIX),
        "clamp": (lambda x: x.clamp(-0.2, 0.3), MATRIX),
        "maximum": (torch.maximum, PAIR),
        "maximum of equals": (lambda x: torch.maximum(x, x * 1) * x, MATRIX),
        "where": (lambda x, y: torch.where(x > 0, x * y, y), PAIR),
        "masked_fill": (lambda x: x.masked_fill(x.detach() > 0.3, 2.0), MATRIX),
        "atan2": (torch.atan2, PAIR),
        "logit": (lambda x: x.sigmoid().logit(), MATRIX),
        "logaddexp": (torch.logaddexp, PAIR),
        "rounding": (lambda x: x + x.round(), MATRIX),
    }


def reductions() -> dict[str, Row]:
    def along(name: str) -> Callable[[Tensor], Tensor]:
        return lambda x: getattr(torch, name)(x, dim=1) * x[:, 0]

    rows: dict[str, Row] = {name: (along(name), MATRIX) for name in "sum mean var std amax prod logsumexp".split()}
    return rows | {
        "mean of all": (lambda x: x.mean() * x, MATRIX),
        "max of all": (lambda x: x.max() * x, MATRIX),
        "max": (lambda x: x.max(1).values, MATRIX),
        "min": (lambda x: x.min(1, keepdim=True)[0], MATRIX),
        "topk": (lambda x: x.topk(2).values, MATRIX),
        "sort": (lambda x: x.sort(0).values * x, MATRIX),
        "median": (lambda x: x.median(1).values, MATRIX),
        "cumsum": (lambda x: x.cumsum(1), MATRIX),
        "norm": (lambda x: x.norm(dim=1) * x[:, 0], MATRIX),
        "norm 1": (lambda x: x.norm(1, 1) * x[:, 0], MATRIX),
        "norm 3": (lambda x: x.norm(3, 1) * x[:, 0], MATRIX),
        "norm of all": (lambda x: torch.linalg.vector_norm(x, dim=[]) * x, MATRIX),
        "norm inf": (lambda x: x.norm(math.inf, 1) * x[:, 0], MATRIX),
        "normalize": (lambda x, y: F.normalize(x) * y, PAIR),
        "cosine_similarity": (F.cosine_similarity, PAIR),
        "prod of a scalar": (lambda x: torch.prod(x.sum(), 0) * x, MATRIX),
        "prod with a zero": (lambda x: (x * torch.tensor([1, 0, 1, 1, 1.0]).double()).prod(1) + x[:, 0], MATRIX),
        "std_mean": (lambda x: torch.std_mean(x, 1)[0], MATRIX),
        "logsumexp of all": (lambda x: x.logsumexp((0, 1)) * x, MATRIX),
        "var of all": (lambda x: x.var() * x, MATRIX),
        "softmax": (lambda x: x.softmax(-1), MATRIX),
        "log_softmax": (lambda x: x.log_softmax(0), MATRIX),
        "softmax of a constant shift": (lambda x: (x + x.sum()).softmax(-1), MATRIX),
    }


def structure() -> dict[str, Row]:
    return {
        "cat with a constant": (lambda a, b: torch.cat([a, torch.ones(3, 5).double(), b]) * 2, PAIR),
        "stack": (lambda a, b: torch.stack([a, b, a * b]), PAIR),
        "chunk": (lambda a: a.chunk(2)[0] * a.chunk(2)[1], ((6,),)),
        "index": (lambda a: a[[0, 2], 1:] * a[1, 2], MATRIX),
        "gather": (lambda a: a.gather(1, INDEX), MATRIX),
        "index_put": (lambda a, b: torch.index_put(a, (torch.tensor([0, 1]),), b), ((4, 5), (2, 5))),
        "scatter_add": (lambda a, b: torch.scatter_add(a, 0, INDEX, b[:, :2]), ((5, 5), (4, 5))),
        "expand": (lambda a: a.expand(3, 4, 5).transpose(0, 1).reshape(4, 15) * 2, MATRIX),
        "repeat": (lambda a: a.repeat(2, 1).tril(), MATRIX),
        "flip": (lambda a: a.flip(0) * a, MATRIX),
        "roll": (lambda a: a.roll(1, 0) * a, MATRIX),
        "as_strided": (lambda a: (a * 1).as_strided((3, 3), (5, 1)) * 2, MATRIX),
        "in place": (written_in_place, PAIR),
        "in place through views": (written_through_views, PAIR),
        "python number": (lambda a: a * a.detach().abs().max().item() * 0 + a * a, MATRIX),
    }


def layers() -> dict[str, Row]:
    running = torch.zeros(4).double(), torch.ones(4).double()
    return {
        "layer_norm": (normalised(lambda x, w, b: F.layer_norm(F.gelu(x), (8,), w, b)), ((3, 8), (8,), (8,))),
        "layer_norm 2d": (normalised(lambda x: F.layer_norm(x, (4, 8))), ((3, 4, 8),)),
        "rms_norm": (normalised(lambda x, w: F.rms_norm(x, (8,), w)), ((3, 8), (8,))),
        "group_norm": (normalised(lambda x, w, b: F.group_norm(x, 2, w, b)), ((3, 4, 5), (4,), (4,))),
        "instance_norm": (normalised(lambda x, w, b: F.instance_norm(x, None, None, w, b)), ((3, 4, 5), (4,), (4,))),
        "batch_norm train": (
            normalised(lambda x, w, b: F.batch_norm(x, None, None, w, b, True)),
            ((3, 4, 5), (4,), (4,)),
        ),
        "batch_norm eval": (
            normalised(lambda x, w, b: F.batch_norm(x, *running, w, b, False)),
            ((3, 4, 5), (4,), (4,)),
        ),
        "dropout": (lambda x: F.dropout(x, 0.3), MATRIX),
        "dropout2d": (lambda x: F.dropout2d(x, 0.3), IMAGE),
        "alpha_dropout": (lambda x: F.alpha_dropout(x, 0.3, training=True), MATRIX),
        "attention": (F.scaled_dot_product_attention, ATTENTION),
        "attention causal": (lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True), ATTENTION),
        "attention scaled": (lambda *qkv: F.scaled_dot_product_attention(*qkv, scale=0.5), ATTENTION),
        "attention grouped": (
            lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True),
            ((2, 4, 4, 8), (2, 2, 4, 8), (2, 2, 4, 8)),
        ),
        "attention masked": (
            lambda *qkv: F.scaled_dot_product_attention(*qkv, attn_mask=torch.ones(4, 4).tril().bool()),
            ATTENTION,
        ),
        "attention biased": (
            lambda q, k, v, b: F.scaled_dot_product_attention(q, k, v, attn_mask=b),
            (*ATTENTION, (4, 4)),
        ),
        "attention dropout": (lambda *qkv: F.scaled_dot_product_attention(*qkv, dropout_p=0.3), ATTENTION),
        "max_pool1d": (lambda x: F.max_pool1d(x, 2), ((2, 4, 6),)),
        "max_pool2d": (lambda x: F.max_pool2d(x, 2), IMAGE),
        "max_pool2d padded": (lambda x: F.max_pool2d(x, 3, stride=2, padding=1), IMAGE),
        "max_pool3d": (lambda x: F.max_pool3d(x, 2), ((1, 1, 4, 4, 4),)),
        "adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, 2), IMAGE),
        "avg_pool1d": (lambda x: F.avg_pool1d(x, 2), ((2, 4, 6),)),
        "avg_pool2d": (lambda x: F.avg_pool2d(x, 2), IMAGE),
        "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, 2), IMAGE),
        "grid_sample": (lambda x, g: F.grid_sample(x, g, align_corners=False), ((1, 1, 4, 4), (1, 3, 3, 2))),
    }


def special_functions() -> dict[str, Row]:
    """Functions without a rule of their own, each inside of its domain."""
    names = "asinh erfc special.i0 special.i0e special.i1 special.erfcx special.log_ndtr special.ndtr".split()
    rows: dict[str, Row] = {name: (_named(name), MATRIX) for name in names}
    names = "asin acos atanh erfinv".split()
    rows |= {name: (after(torch.tanh, _named(name)), MATRIX) for name in names}
    names = "digamma acosh special.entr".split()
    rows |= {name: (after(lambda x: x * x + 1.5, _named(name)), MATRIX) for name in names}
    rows |= {name: (_named(name), PAIR) for name in "hypot copysign remainder fmod fmax logaddexp2".split()}
    return rows | {
        "ndtri": (lambda x: torch.special.ndtri(x.sigmoid()), MATRIX),
        "polygamma": (lambda x: torch.polygamma(2, x * x + 0.5), MATRIX),
        "mvlgamma": (lambda x: torch.mvlgamma(x * x + 2, 2), MATRIX),
        "xlogy": (lambda x, y: torch.xlogy(x, y * y + 0.1), PAIR),
        "fmod of a number": (lambda x: torch.fmod(x, 0.3), MATRIX),
        "clamp by tensors": (lambda x, a, b: x.clamp(a - 0.5, b + 0.5), (*PAIR, (4, 5))),
        "cumprod": (lambda x: x.cumprod(1), MATRIX),
        "logcumsumexp": (lambda x: x.logcumsumexp(1), MATRIX),
        "cummax": (lambda x: x.cummax(1).values, MATRIX),
        "rrelu": (lambda x: F.rrelu(x, training=True), MATRIX),
        "rrelu eval": (F.rrelu, MATRIX),
        "rrelu in place": (lambda x: F.rrelu(x * 1, training=True, inplace=True), MATRIX),
        "frac": (torch.frac, MATRIX),
        "nan_to_num": (torch.nan_to_num, MATRIX),
        "a sample": (lambda x: torch.normal(x, 1.0) * x, MATRIX),
        "pow_": (lambda x: (x * x + 1).pow_(-0.5), MATRIX),
        "negative base to a tensor": (lambda x: x ** torch.arange(5).double(), MATRIX),
    }


def after(first: Callable[[Tensor], Tensor], function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(first(x))


def _named(name: str) -> Callable[..., Tensor]:
    return functools.reduce(getattr, name.split("."), torch)  # type: ignore[arg-type,return-value]


def linear_algebra() -> dict[str, Row]:
    square: Shapes = ((4, 4),)

    def regular(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        return lambda x: function(x + torch.diag(torch.arange(1.0, 5.0)))

    def definite(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        return lambda x: function(x @ x.mT + torch.eye(4))

    names = "inv det slogdet cond pinv svdvals eigvals matrix_norm qr norm matrix_exp".split()
    rows: dict[str, Row] = {name: (regular(getattr(torch.linalg, name)), square) for name in names}
    names = "cholesky eigh eigvalsh".split()
    rows |= {name: (definite(getattr(torch.linalg, name)), square) for name in names}
    return rows | {
        "logdet": (definite(torch.logdet), square),
        "solve": (torch.linalg.solve, ((4, 4), (4, 2))),
        "lstsq": (lambda a, b: torch.linalg.lstsq(a, b).solution, ((6, 4), (6, 2))),
        "solve_triangular": (
            lambda a, b: torch.linalg.solve_triangular(a + 3 * torch.eye(4), b, upper=True),
            ((4, 4), (4, 2)),
        ),
        "cholesky_solve": (lambda a, b: torch.cholesky_solve(b, a.tril() + torch.eye(4)), ((4, 4), (4, 2))),
        "nuclear norm": (lambda x: torch.linalg.matrix_norm(x, "nuc"), square),
        "matrix_power": (lambda x: torch.linalg.matrix_power(x, -2), square),
        "cross": (torch.linalg.cross, ((4, 3), (4, 3))),
        "inverses": (torch.linalg.inv, ((2, 3, 3),)),
    }


def complex_numbers() -> dict[str, Row]:
    def pairs(function: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor, Tensor], Any]:
        return lambda a, b: function(torch.complex(a, b), torch.complex(b, a * a))

    def rotated(x: Tensor) -> Tensor:
        angles = torch.polar(torch.ones(3), torch.arange(3.0))
        return torch.view_as_real(torch.view_as_complex(x) * angles).flatten(1) * x.flatten(1)

    def written(a: Tensor, b: Tensor) -> Tensor:
        z = torch.zeros(4, 5, dtype=torch.complex128)
        z.real.copy_(a)
        z.imag.add_(b)
        return z * z

    rows: dict[str, Row] = {
        name: (getattr(torch.fft, name), MATRIX) for name in "fft rfft rfft2 irfft fftshift".split()
    }
    window = torch.hann_window(8, dtype=torch.float64)
    return rows | {
        "rotary embedding": (rotated, ((4, 3, 2),)),
        "polar": (lambda a, b: torch.polar(a * a + 1, b), PAIR),
        "complex product": (pairs(lambda z, w: z * w), PAIR),
        "complex quotient": (pairs(lambda z, w: z / w), PAIR),
        "complex matrices": (pairs(lambda z, w: z @ w.mH), PAIR),
        "conj": (pairs(lambda z, w: z.conj() * w), PAIR),
        "real and imag": (pairs(lambda z, w: z.real * w.conj().imag), PAIR),
        "complex abs": (pairs(lambda z, w: z.abs() * w), PAIR),
        "angle": (pairs(lambda z, w: z.angle() * w), PAIR),
        "complex exp": (pairs(lambda z, w: torch.exp(z) + torch.log(w) + torch.sqrt(w) + w**3), PAIR),
        "complex inverse": (pairs(lambda z, w: torch.linalg.inv(z) @ w), ((3, 3), (3, 3))),
        "written by parts": (written, PAIR),
        "stft": (lambda x: torch.stft(x, 8, 4, window=window, return_complex=True).abs(), ((2, 32),)),
    }


def scattered() -> dict[str, Row]:
    by_rows, rows_of = torch.tensor([0, 2, 0, 1]), ((5, 5), (4, 5))
    sparse = torch.tensor([[0, 1.0, 0, 2], [1, 0, 0, 0]]).double().to_sparse()
    rows: dict[str, Row] = {
        f"scatter_reduce {how}": (lambda x, y, how=how: x.scatter_reduce(0, INDEX, y[:, :2], how), rows_of)
        for how in "sum prod mean amax amin".split()
    }
    rows |= {
        f"index_reduce {how}": (lambda x, y, how=how: x.index_reduce(0, by_rows, y, how), rows_of)
        for how in "prod mean amax amin".split()
    }
    return rows | {
        "scatter_reduce_": (
            lambda x, y: (x * 1).scatter_reduce_(0, INDEX, y[:, :2], "amax", include_self=False),
            rows_of,
        ),
        "addbmm": (torch.addbmm, ((3, 5), (2, 3, 4), (2, 4, 5))),
        "conv_tbc": (lambda x, w, b: torch.conv_tbc(x, w, b, 1), ((6, 2, 3), (3, 3, 4), (4,))),
        "sparse mm": (lambda x: torch.sparse.mm(sparse, x), MATRIX),
        "sparse csr mm": (lambda x: sparse.to_sparse_csr() @ x, MATRIX),
        "cdist of many": (torch.cdist, ((30, 4), (32, 4))),
        "a diagonal written": (lambda x, y: _written(x * 2, lambda h: h.diagonal().mul_(y)), ((4, 4), (4,))),
        "fill_diagonal_": (lambda x: _written(x * 2, lambda h: h.fill_diagonal_(1.0)), ((4, 4),)),
        "index_fill": (lambda x: x.index_fill(0, torch.tensor([1]), x[0, 0]), MATRIX),
        "put": (lambda x, y: x.put(torch.tensor([1, 2]), y), (*MATRIX, (2,))),
        "_foreach_mul_": (lambda x, y: _written([x * 1, y * 1], lambda h: torch._foreach_mul_(h, [2.0, 3.0])), PAIR),
        "renorm": (lambda x: x.renorm(2, 0, 0.5) * x, MATRIX),
        "quantile": (lambda x: torch.quantile(x, 0.3, dim=1), MATRIX),
        "median of all": (lambda x: x.median() * x, MATRIX),
        "norm -inf": (lambda x: x.norm(-math.inf, 1) * x[:, 0], MATRIX),
        "fractional_max_pool2d": (lambda x: F.fractional_max_pool2d(x, 2, output_size=3), IMAGE),
    }


def _written(target: Any, write: Callable[[Any], Any]) -> Any:
    write(target)
    return target


def losses() -> dict[str, Row]:
    smoothed: dict[str, Any] = {"label_smoothing": 0.1, "ignore_index": 1}
    return {
        "cross_entropy": (lambda x: F.cross_entropy(x, LABELS), LOGITS),
        "cross_entropy smoothed, ignoring": (lambda x: F.cross_entropy(x, LABELS, **smoothed), LOGITS),
        "cross_entropy weighted": (lambda x: F.cross_entropy(x, LABELS, weight=FIXED[0]), LOGITS),
        "cross_entropy of probabilities": (lambda x: F.cross_entropy(x, FIXED), LOGITS),
        "cross_entropy 2d": (lambda x: F.cross_entropy(x, torch.zeros(2, 6, 6, dtype=torch.long)), IMAGE),
        "nll": (lambda x: F.nll_loss(x.log_softmax(-1), LABELS, reduction="sum"), LOGITS),
        "mse": (lambda x: F.mse_loss(x, FIXED), LOGITS),
        "mse of two": (F.mse_loss, PAIR),
        "l1": (lambda x: F.l1_loss(x * x, FIXED), LOGITS),
        "huber": (lambda x: F.huber_loss(x * 2, FIXED, delta=0.7), LOGITS),
        "smooth_l1": (lambda x: F.smooth_l1_loss(x * 2, FIXED, beta=0.7), LOGITS),
        "bce": (lambda x: F.binary_cross_entropy(x.sigmoid(), FIXED), LOGITS),
        "bce with logits": (lambda x: F.binary_cross_entropy_with_logits(x, FIXED, pos_weight=FIXED[0]), LOGITS),
        "kl": (lambda x: F.kl_div(x.log_softmax(-1), FIXED, reduction="batchmean"), LOGITS),
        "kl of two": (
            lambda x, t: F.kl_div(x.log_softmax(-1), t.softmax(-1), reduction="batchmean"),
            ((3, 5), (3, 5)),
        ),
        "gaussian_nll": (lambda x, v: F.gaussian_nll_loss(x, FIXED, v.exp()), ((3, 5), (3, 5))),
        "poisson_nll": (lambda x: F.poisson_nll_loss(x, FIXED), LOGITS),
        "soft_margin": (lambda x: F.soft_margin_loss(x, FIXED), LOGITS),
        "triplet_margin": (F.triplet_margin_loss, ((3, 4), (3, 4), (3, 4))),
    }


OPERATORS = linear_operators() | elementwise() | reductions() | structure() | layers() | losses()
GENERAL = special_functions() | linear_algebra() | complex_numbers() | scattered()


def size_of(result: Any) -> Tensor:
    """The sum of squares of all floating-point results."""
    if isinstance(result, Tensor):
        parts = torch.view_as_real(result) if result.is_complex() else result
        return (parts**2).sum() if parts.is_floating_point() else torch.zeros(())
    return sum((size_of(each) for each in result), torch.zeros(()))


def assert_equal(function: Callable[..., Any], shapes: Shapes, same: Callable[..., Any] | None = None) -> None:
    """Compare with double backward, through `same` where autograd needs another form."""
    points = [0.7 * torch.randn(shape) for shape in shapes]
    d = [0.3 * torch.randn(shape) for shape in shapes]

    def loss(function: Callable[..., Any], *arguments: Tensor) -> Tensor:
        torch.manual_seed(5)
        return size_of(function(*arguments))

    table: dict[int, Tensor] = {id(x): Jet(x, v) for x, v in zip(points, d, strict=True)}
    with torch.no_grad(), JetMode(table):
        seen = derivatives(loss(function, *points))
    leaves = [x.clone().requires_grad_() for x in points]
    try:
        expected = reference.derivatives(lambda: loss(same or function, *leaves), leaves, d)
    except RuntimeError as error:
        if "is not implemented" not in str(error):
            raise
        pytest.skip(f"torch {torch.__version__} has no double backward to compare with: {error}")
    assert abs(expected[1]) > 1e-6, "the row must have a slope"
    for mine, true in zip(seen, expected, strict=True):
        assert (0.0 if mine is None else mine.item()) == pytest.approx(true, rel=TOLERANCE, abs=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", OPERATORS | GENERAL)
def test_derivatives_equal_double_backward(name: str) -> None:
    assert_equal(*(OPERATORS | GENERAL)[name])


def alignments(x: Tensor, targets: list[list[int]], lengths: list[int]) -> Tensor:
    """CTC by the forward algorithm, one number after another; the blank is 0."""
    losses = []
    for b, (target, length) in enumerate(zip(targets, lengths, strict=True)):
        states = [0, *(s for t in target for s in (t, 0))]
        log_sum = [x[0, b, s] if k < 2 else torch.tensor(-1e30) for k, s in enumerate(states)]
        for time in range(1, length):
            ways = [
                log_sum[max(k - 2 if s not in (0, states[k - 2]) and k > 1 else k - 1, 0) : k + 1]
                for k, s in enumerate(states)
            ]
            log_sum = [torch.stack(way).logsumexp(0) + x[time, b, s] for way, s in zip(ways, states, strict=True)]
        losses.append(-torch.stack(log_sum[-2:]).logsumexp(0))
    return torch.stack(losses)


TARGETS, BAGS = [[1, 2, 2], [2, 1]], torch.tensor([[0, 1], [2, 1]])
SEGMENTS = {"sum": "sum", "mean": "mean", "prod": "prod", "max": "amax", "min": "amin"}


def ctc(targets: Any, lengths: Any, of: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: F.ctc_loss(x.log_softmax(-1), targets, lengths, of, reduction="none")


def aligned(x: Tensor) -> Tensor:
    return alignments(x.log_softmax(-1), TARGETS, [6, 5])


def hinges(x: Tensor) -> Tensor:
    """Multi-label margins, for the targets 0, 1 and 3 of five classes."""
    return (1 - x[:, [0, 1, 3], None] + x[:, None, [2, 4]]).clamp_min(0).sum((1, 2)) / 5


WRITTEN_OUT: dict[str, tuple[Callable[..., Any], Callable[..., Any], Shapes]] = {
    "cdist": (torch.cdist, lambda a, b: (a[:, None] - b[None]).norm(dim=-1), ((3, 4), (2, 4))),
    "cdist 3": (lambda a, b: torch.cdist(a, b, 3.0), lambda a, b: (a[:, None] - b).norm(3, -1), ((3, 4), (2, 4))),
    "pdist": (
        F.pdist,
        lambda a: torch.stack([(a[i] - a[j]).norm() for i in range(4) for j in range(i + 1, 4)]),
        MATRIX,
    ),
    "ctc": (ctc(torch.tensor([[1, 2, 2], [2, 1, 0]]), (6, 5), (3, 2)), aligned, ((6, 2, 4),)),
    "ctc joined": (
        ctc(torch.tensor([1, 2, 2, 2, 1]), torch.tensor([6, 5]), torch.tensor([3, 2])), aligned, ((6, 2, 4),)
    ),
    "bags by maximum": (
        lambda w: F.embedding_bag(BAGS, w, mode="max"), lambda w: w[BAGS].amax(1), MATRIX
    ),
    "weighted bags": (
        lambda w, f: F.embedding_bag(BAGS, w, mode="sum", per_sample_weights=f),
        lambda w, f: (w[BAGS] * f[..., None]).sum(1),
        (*MATRIX, (2, 2)),
    ),
    "multilabel_margin of a scalar": (
        lambda x: F.multilabel_margin_loss(x.sum(), torch.tensor(0)) + x, lambda x: x, MATRIX
    ),
    "multilabel_margin": (
        lambda x: F.multilabel_margin_loss(x, torch.tensor([[0, 1, 3, -1, 2]] * 4), reduction="none"), hinges, MATRIX
    ),
    **{
        f"segment_reduce {how}": (
            lambda x, how=how: torch.segment_reduce(x, how, lengths=torch.tensor([1, 3])),
            lambda x, how=name: torch.stack([getattr(torch, how)(part, 0) for part in (x[:1], x[1:])]),
            MATRIX,
        )
        for how, name in SEGMENTS.items()
    },
}  # fmt: skip


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_operators_that_autograd_cannot_differentiate_twice(name: str) -> None:
    function, same, shapes = WRITTEN_OUT[name]
    assert_equal(function, shapes, same)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this version of torch has no grouped product")
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_products_of_a_mixture_of_experts(transposed: bool) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(6, 8), torch.randn(2, 8, 8)
    w = w.mT if transposed else w
    d = torch.randn(6, 8), torch.randn(2, 8, 8)
    ends = torch.tensor([2, 6], dtype=torch.int32)
    with torch.no_grad():
        seen = derivatives(F.grouped_mm(Jet(x, d[0]), Jet(w, d[1]), offs=ends).square().sum())
    leaves = [each.double().requires_grad_() for each in (x, w)]

    def same() -> Tensor:
        return torch.cat([leaves[0][:2] @ leaves[1][0], leaves[0][2:] @ leaves[1][1]]).square().sum()

    expected = reference.derivatives(same, leaves, [each.double() for each in d])
    assert [part.item() for part in seen] == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------------------------------------- edges

# A function and the numbers at which it is taken: edges of its domain, kinks, and where it saturates.
EDGES: dict[str, tuple[Callable[[Tensor], Tensor], list[float]]] = {
    **{
        name: (getattr(torch, name), [0, 1, -1, -2, 0.5, 100, -100, 1e-200, math.inf])
        for name in (
            "abs sqrt rsqrt log log2 log10 log1p reciprocal sign relu exp expm1 tan sinh asin acos atanh acosh erf "
            "erfinv lgamma digamma square sinc frac round logit sigmoid tanh special.xlog1py special.entr"
        ).split()
        if "." not in name
    },
    **{
        name: (getattr(F, name), [0, 1, -1, 3, -3, 6, 0.5, -0.5, 20, -20, 100, -100, 800, -800])
        for name in (
            "relu gelu silu softplus elu celu selu leaky_relu hardswish hardtanh logsigmoid relu6 softsign tanhshrink "
            "softshrink hardshrink"
        ).split()
    },
    **{f"power {n}": (lambda x, n=n: x**n, [0, -1.5, 1, 2]) for n in (0, 1, 2, 3, 0.5, 1.5, 2.5, -1, -0.5)},
    **{
        f"tensor as power {n}": (lambda x, n=n: x ** torch.tensor([n, 2.0]), [0, -1.5, 1, 2])
        for n in (0.0, 1.0, 2.0, 3.0, 1.5, -1.0)
    },
    "moving power": (lambda x: x.abs() ** (x * 2 + 1), [0, 1, 2]),
    "zero to a power": (lambda x: torch.zeros(2) ** x, [1, 2, 0.5]),
    "negative number to a power": (lambda x: (-2.0) ** x, [1, 2]),
    **{
        f"bce of {target}": (
            lambda p, target=target: F.binary_cross_entropy(p, torch.full((2,), target)), [0, 1, 1e-50, 0.5]
        )
        for target in (0.0, 1.0, 0.3)
    },
    "bce, saturated": (lambda x: F.binary_cross_entropy(x.sigmoid(), torch.tensor([0.0, 1])), [0, 50, -50, 800, -800]),
    "bce with logits": (
        lambda x: F.binary_cross_entropy_with_logits(x, torch.tensor([0.0, 1]), pos_weight=torch.tensor(3.0)),
        [0, 50, -50, 800, -800],
    ),
    "huber": (lambda x: F.huber_loss(x, torch.tensor([1.0, -1])), [0, 2, -2]),
    "smooth_l1": (lambda x: F.smooth_l1_loss(x, torch.tensor([1.0, -1])), [0, 2, -2]),
    "norm 3": (lambda x: x.norm(3), [0, 1]),
    "std": (lambda x: x.std(), [0, 1]),
    "prod": (lambda x: x.prod(), [0, 1]),
    "cumprod": (lambda x: x.cumprod(0), [0, 1]),
    "softmax with a masked score": (lambda x: (x + torch.tensor([0, -math.inf])).softmax(0), [0, 1]),
    "logsumexp with a masked score": (lambda x: (x + torch.tensor([0, -math.inf])).logsumexp(0), [0, 1]),
    "log_softmax, saturated": (lambda x: F.log_softmax(x * torch.tensor([1000.0, 1]), 0), [0, 1]),
    "xlogy": (lambda x: torch.xlogy(x, x), [0, 1, 2]),
    "atan2": (lambda x: torch.atan2(x, x), [0, 1]),
    "maximum": (lambda x: torch.maximum(x, torch.zeros(2)), [0, 1]),
    "clamp": (lambda x: x.clamp(0, 1), [0, 1, 2, -1]),
    "complex abs": (lambda x: torch.complex(x, x).abs(), [0, 1]),
    "prelu": (lambda x: F.prelu(x, x[:1] * 0 + 0.3), [0, 1, -1]),
}  # fmt: skip


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", EDGES)
def test_at_edges_derivatives_equal_double_backward_where_it_is_finite(name: str) -> None:
    function, points = EDGES[name]
    d, weights = torch.tensor([0.7, -1.3]), torch.tensor([0.5, 1.5])
    for point in points:
        x = torch.full((2,), float(point))
        with torch.no_grad():
            seen = derivatives((function(Jet(x, d)) * weights).sum())
        leaf = x.clone().requires_grad_()
        expected = reference.derivatives(lambda leaf=leaf: (function(leaf) * weights).sum(), [leaf], [d])
        if all(map(math.isfinite, expected)):
            numbers = [0.0 if part is None else part.item() for part in seen]
            assert numbers == pytest.approx(expected, rel=TOLERANCE, abs=1e-12), f"at {point}"


# ------------------------------------------------------------------------------------- what cannot be trusted


class _Misled:
    """An operator of which autograd has another derivative than that of its values."""

    def __init__(self, name: str, backward: Callable[..., Tensor]) -> None:
        @torch.library.custom_op(f"gen_dist_tests::{name}", mutates_args=())
        def operator(x: Tensor) -> Tensor:
            return x**3

        operator.register_autograd(backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
        self.operator = operator


MISLED: dict[str, Callable[..., Tensor]] = {
    "straight_through": lambda ctx, g: g,
    "once": lambda ctx, g: g * 3 * ctx.saved_tensors[0].detach() ** 2,
    "reversed": lambda ctx, g: -3 * g * ctx.saved_tensors[0] ** 2,
}


@pytest.mark.parametrize("name", MISLED)
def test_a_derivative_that_differences_do_not_confirm_is_refused(name: str) -> None:
    operator = _Misled(name, MISLED[name]).operator
    with torch.no_grad(), pytest.raises(UnsupportedOperation, match=rf"gen_dist_tests.{name}.*curvature='forward'"):
        operator(Jet(torch.randn(3), torch.randn(3)))


def test_an_operator_with_a_derivative_of_its_own_needs_no_rule() -> None:
    right = _Misled("right", lambda ctx, g: g * 3 * ctx.saved_tensors[0] ** 2).operator
    x = torch.tensor([2.0, 1.0])
    with torch.no_grad():
        value, velocity, acceleration = derivatives(right(Jet(x, torch.tensor([1.0, 0.5]), torch.tensor([0.0, 1.0]))))
    assert [value.tolist(), velocity.tolist(), acceleration.tolist()] == [[8, 1], [12, 1.5], [12, 4.5]]


def test_what_an_operator_keeps_for_its_backward_pass_is_no_constant() -> None:
    """C++ code takes views of it, but whatever computes with it would be wrong."""
    x = torch.randn(2, 4, 3)
    with torch.no_grad():
        _, mean, _ = torch.native_group_norm(Jet(x, x), None, None, 2, 4, 3, 2, 1e-5)
        view = mean.view(2, 2, 1)
        with pytest.raises(UnsupportedOperation, match="in a loss that takes gradients"):
            view * 2


def test_a_check_leaves_the_random_numbers_as_they_are() -> None:
    x = torch.rand(4, 4, dtype=torch.float64)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with torch.no_grad():
        torch.special.i1(Jet(x, x))
    assert torch.equal(torch.get_rng_state(), before)


def test_only_accelerations_are_left_out_of_a_first_order() -> None:
    x = torch.rand(3, 3, dtype=torch.float64) + torch.eye(3, dtype=torch.float64)
    with torch.no_grad(), velocity_only():
        _, velocity, acceleration = derivatives(torch.linalg.inv(Jet(x, x * x)))
    inverse = torch.linalg.inv(x)
    assert torch.allclose(velocity, -inverse @ (x * x) @ inverse)
    assert acceleration is None


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("dims", [(0, 2, 1, 3), (0, 1, 2, 3)])
def test_attention_lies_in_memory_as_the_operator_has_it(dims: tuple[int, ...]) -> None:
    """Dropout behind it draws its mask in the order of memory."""
    q = torch.randn(2, 3, 4, 8).permute(dims)
    with torch.no_grad():
        plain, jet = (F.scaled_dot_product_attention(x, x, x) for x in (q, Jet(q, q)))
    assert jet.stride() == plain.stride()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("scores", [1, 40, 10**6])
def test_attention_computes_any_number_of_heads_at_a_time(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SCORES_ON_CPU", scores)
    for name in ("attention", "attention causal", "attention grouped", "attention masked"):
        test_derivatives_equal_double_backward(name)


REFUSED: dict[str, Row] = {
    "no derivative": (torch.geqrf, MATRIX),  # type: ignore[dict-item]
    "no second derivative": (torch._standard_gamma, ((3,),)),
    "another gradient": (lambda x: F.embedding(LABELS, x, scale_grad_by_freq=True), MATRIX),
    "a sparse tensor": (lambda x: x.to_sparse(), MATRIX),
    "a nested tensor": (lambda x: torch.nested.nested_tensor_from_jagged(x, torch.tensor([0, 4])), MATRIX),
    "into a tensor made outside": (lambda x: torch.zeros(4, 5).copy_(x), MATRIX),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_operator_without_a_rule_raises_an_error_that_names_it(name: str) -> None:
    function, shapes = REFUSED[name]
    with torch.no_grad(), pytest.raises(UnsupportedOperation, match=r"aten.*curvature='forward'"):
        function(*(Jet(torch.rand(shape) + 0.1, torch.randn(shape)) for shape in shapes))


def test_operator_rules_leave_the_derivatives_of_their_arguments_unchanged() -> None:
    x, v = torch.randn(3, 4), torch.randn(3, 4)
    kept = v.clone()
    with torch.no_grad():
        jet = Jet(x, v)
        (jet * 1).add_(jet).mul_(jet).relu_().sub_(3)
        jet.view(12).t()
        F.gelu(jet) + F.layer_norm(jet, (4,)) @ jet.t() @ jet
    assert torch.equal(v, kept)


def test_an_operator_rule_added_later_replaces_the_error() -> None:
    @torch.library.custom_op("gen_dist_tests::square", mutates_args=())
    def square(x: Tensor) -> Tensor:
        return x * x

    x = Jet(torch.tensor(3.0), torch.tensor(1.0))
    with pytest.raises(UnsupportedOperation, match=r"gen_dist_tests.square.*curvature='forward'"):
        square(x)

    @jets.rule("gen_dist_tests::square")
    def square_of_jet(operator: Any, x: Jet) -> Tensor:
        return x * x

    assert [part.item() for part in derivatives(square(x))] == [9, 6, 2]
