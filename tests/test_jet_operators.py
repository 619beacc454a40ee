"""Jets of single operators: they equal double backward in float64 to a relative error of 1e-9, or raise an error.

A row of a table is a function and the shapes of its arguments, which are random float64 tensors that all move. The
loss is the sum of the squares of the function, so that linear operators have a curvature too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor

from gen_dist import jets
from gen_dist.jets import Jet, UnsupportedOperation, derivatives
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


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", OPERATORS)
def test_derivatives_equal_double_backward(name: str) -> None:
    function, shapes = OPERATORS[name]
    points = [0.7 * torch.randn(shape) for shape in shapes]
    d = [0.3 * torch.randn(shape) for shape in shapes]

    def loss(*arguments: Tensor) -> Tensor:
        torch.manual_seed(5)
        return (function(*arguments) ** 2).sum()

    with torch.no_grad():
        seen = derivatives(loss(*(Jet(x, v) for x, v in zip(points, d, strict=True))))
    leaves = [x.clone().requires_grad_() for x in points]
    try:
        expected = reference.derivatives(lambda: loss(*leaves), leaves, d)
    except RuntimeError as error:
        if "is not implemented" not in str(error):
            raise
        pytest.skip(f"torch {torch.__version__} has no double backward to compare with: {error}")
    assert abs(expected[1]) > 1e-6, "the row must have a slope"
    for mine, true in zip(seen, expected, strict=True):
        assert (0.0 if mine is None else mine.item()) == pytest.approx(true, rel=TOLERANCE, abs=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("scores", [1, 40, 10**6])
def test_attention_computes_any_number_of_heads_at_a_time(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SCORES_ON_CPU", scores)
    for name in ("attention", "attention causal", "attention grouped", "attention masked"):
        test_derivatives_equal_double_backward(name)


REFUSED: dict[str, Row] = {
    "cdist": (torch.cdist, ((3, 4), (2, 4))),
    "inverse": (torch.linalg.inv, ((3, 3),)),
    "determinant": (torch.linalg.det, ((3, 3),)),
    "ctc": (lambda x: F.ctc_loss(x, torch.tensor([[1, 2]]), torch.tensor([4]), torch.tensor([2])), ((4, 1, 3),)),
    "fft": (lambda x: torch.fft.rfft(x).abs(), ((8,),)),
    "median of all": (torch.median, MATRIX),
    "into a tensor made outside": (lambda x: torch.zeros(4, 5).copy_(x), MATRIX),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_operator_without_a_rule_raises_an_error_that_names_it(name: str) -> None:
    function, shapes = REFUSED[name]
    with torch.no_grad(), pytest.raises(UnsupportedOperation, match=r"aten.*curvature='forward'"):
        function(*(Jet(torch.randn(shape), torch.randn(shape)) for shape in shapes))


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
