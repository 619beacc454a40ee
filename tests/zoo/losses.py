"""All losses of torch.nn.functional, in the forms in which they are used."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.case import Case, case

ROWS, CLASSES = 5, 4

Loss = Callable[[Tensor, Tensor], Tensor]


def labels() -> Tensor:
    return torch.arange(ROWS) % CLASSES


def _losses() -> dict[str, Loss]:
    """Losses of two tensors of shape (ROWS, CLASSES) that both depend on weights."""
    signs = torch.tensor([1.0, -1, 1, -1, 1])
    probabilities = torch.softmax(torch.linspace(-1, 1, ROWS * CLASSES).view(ROWS, CLASSES), 1)
    weights = torch.linspace(0.5, 2, CLASSES)
    lengths = torch.full((2,), 5), torch.tensor([2, 3])
    targets = torch.tensor([[1, 2, 0], [3, 1, 2]])

    def ctc(x: Tensor, y: Tensor) -> Tensor:
        scores = torch.stack([x, y], 1).log_softmax(2)
        return F.ctc_loss(scores, targets, *lengths, blank=0)

    def chunked(x: Tensor, y: Tensor) -> Tensor:
        return F.linear_cross_entropy(x, y, torch.arange(ROWS))  # type: ignore[attr-defined]

    rows: dict[str, Loss] = {
        "binary_cross_entropy": lambda x, y: F.binary_cross_entropy(x.sigmoid(), y.sigmoid()),
        "binary_cross_entropy fixed target": lambda x, y: F.binary_cross_entropy(x.sigmoid(), probabilities),
        "binary_cross_entropy weight": lambda x, y: F.binary_cross_entropy(x.sigmoid(), probabilities, weights),
        "binary_cross_entropy saturated": lambda x, y: F.binary_cross_entropy((60 * x).sigmoid(), probabilities),
        "binary_cross_entropy hard": lambda x, y: F.binary_cross_entropy(x.clamp(0, 1), (probabilities > 0.25) * 1.0),
        "binary_cross_entropy_with_logits": F.binary_cross_entropy_with_logits,
        "binary_cross_entropy_with_logits pos_weight": lambda x, y: F.binary_cross_entropy_with_logits(
            x, probabilities, pos_weight=weights
        ),
        "cosine_embedding_loss": lambda x, y: F.cosine_embedding_loss(x, y, signs, margin=0.1),
        "cross_entropy": lambda x, y: F.cross_entropy(x, labels()),
        "cross_entropy probabilities": lambda x, y: F.cross_entropy(x, probabilities),
        "cross_entropy moving probabilities": lambda x, y: F.cross_entropy(x, y.softmax(1)),
        "cross_entropy smoothing": lambda x, y: F.cross_entropy(x, labels(), label_smoothing=0.1),
        "cross_entropy weight, ignored": lambda x, y: F.cross_entropy(x, labels(), weights, ignore_index=1),
        "cross_entropy images": lambda x, y: F.cross_entropy(torch.stack([x, y], 2), torch.stack([labels()] * 2, 1)),
        "ctc_loss": ctc,
        "gaussian_nll_loss": lambda x, y: F.gaussian_nll_loss(x, probabilities, y.exp(), full=True),
        "hinge_embedding_loss": lambda x, y: F.hinge_embedding_loss(x * y, signs[:, None].expand(ROWS, CLASSES)),
        "huber_loss": lambda x, y: F.huber_loss(x, y, delta=0.3),
        "huber_loss weight": lambda x, y: F.huber_loss(x, y, delta=0.3, weight=probabilities),
        "kl_div": lambda x, y: F.kl_div(x.log_softmax(1), probabilities, reduction="batchmean"),
        "kl_div moving target": lambda x, y: F.kl_div(x.log_softmax(1), y.softmax(1), reduction="batchmean"),
        "kl_div log target": lambda x, y: F.kl_div(x.log_softmax(1), y.log_softmax(1), log_target=True),
        "l1_loss": F.l1_loss,
        "l1_loss sum": lambda x, y: F.l1_loss(x, y.square(), reduction="sum"),
        "margin_ranking_loss": lambda x, y: F.margin_ranking_loss(x[:, 0] * x[:, 1], y[:, 0], signs, margin=0.1),
        "mse_loss": F.mse_loss,
        "mse_loss none": lambda x, y: F.mse_loss(x, y, reduction="none").sqrt().sum(),
        "mse_loss weight": lambda x, y: F.mse_loss(x, y, weight=probabilities),
        "multi_margin_loss": lambda x, y: F.multi_margin_loss(x * y, labels()),
        "multi_margin_loss p=2": lambda x, y: F.multi_margin_loss(x, labels(), p=2, weight=weights),
        "multilabel_margin_loss": lambda x, y: F.multilabel_margin_loss(
            x * y, torch.tensor([[1, 2, -1, 0]]).expand(ROWS, CLASSES)
        ),
        "multilabel_soft_margin_loss": lambda x, y: F.multilabel_soft_margin_loss(x, probabilities, weights),
        "nll_loss": lambda x, y: F.nll_loss(x.log_softmax(1), labels(), weights),
        "poisson_nll_loss": lambda x, y: F.poisson_nll_loss(x, probabilities, full=True),
        "poisson_nll_loss linear": lambda x, y: F.poisson_nll_loss(x.exp(), probabilities, log_input=False),
        "smooth_l1_loss": lambda x, y: F.smooth_l1_loss(x, y, beta=0.3),
        "soft_margin_loss": lambda x, y: F.soft_margin_loss(x * y, signs[:, None]),
        "triplet_margin_loss": lambda x, y: F.triplet_margin_loss(x, y, (x * y).flip(0), swap=True),
        "triplet_margin_loss p=1": lambda x, y: F.triplet_margin_loss(x, y.square(), y, p=1.0),
        "triplet_margin_with_distance_loss": lambda x, y: F.triplet_margin_with_distance_loss(
            x, y, x * y, distance_function=lambda a, b: 1 - F.cosine_similarity(a, b)
        ),
    }  # fmt: skip
    return rows | ({"linear_cross_entropy": chunked} if hasattr(F, "linear_cross_entropy") else {})


def names() -> list[str]:
    return [*_losses()]


def build(name: str) -> Case:
    model = nn.ModuleList([nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, CLASSES)) for _ in "xy"]).double()
    x, loss = torch.randn(ROWS, 3), _losses()[name]
    return case(model, lambda: loss(*(each(x) for each in model)))
