"""A sample of the yardstick (`zoo/`): `exact` on models and losses, held to double backward."""

from __future__ import annotations

import importlib

import pytest
import torch
from zoo.measure import measure

SAMPLE = {
    "transformers_models": (
        "bert gpt2 llama t5 vit whisper wav2vec2/AUDIO_CLASSIFICATION mixtral deepseek_v3 clip mamba swin dinov2 "
        "roberta/TOKEN_CLASSIFICATION"
    ).split(),
    "modules": ["Transformer", "GroupNorm", "Upsample bicubic"],
    "losses": ["cross_entropy", "triplet_margin_loss", "poisson_nll_loss"],
}


@pytest.mark.parametrize(("family", "name"), [(family, name) for family in SAMPLE for name in SAMPLE[family]])
def test_exact_curvature_of_a_model_equals_double_backward(family: str, name: str) -> None:
    module = importlib.import_module(f"zoo.{family}")
    outcome = measure(lambda: module.build(name))
    assert outcome.verdict == "right", outcome


@pytest.mark.parametrize(("threshold", "kept"), [(0.1, [2, 3]), (0.4, [2, 3]), (0.6, [2, 3, 0]), (0.95, [2, 3, 0, 1])])
def test_of_boxes_that_overlap_the_best_stay(threshold: float, kept: list[int]) -> None:
    """The first is half of the third, and the second nine tenths; the fourth is elsewhere."""
    pytest.importorskip("torchvision")
    boxes = torch.tensor([[0.0, 0, 10, 5], [0, 0, 9, 10], [0, 0, 10, 10], [20, 20, 30, 30]])
    scores = torch.tensor([0.5, 0.4, 0.9, 0.8])
    assert torch.ops.torchvision.nms(boxes, scores, threshold).tolist() == kept
    assert torch.ops.torchvision.nms(boxes[:0], scores[:0], threshold).tolist() == []


def test_the_yardstick_notices_a_wrong_curvature(monkeypatch: pytest.MonkeyPatch) -> None:
    from gen_dist.jets import dispatch, registry

    losses = importlib.import_module("zoo.losses")
    monkeypatch.setitem(registry.RULES, "tanh", lambda operator, x: x)
    monkeypatch.setattr(dispatch, "CHOSEN", {})
    assert measure(lambda: losses.build("mse_loss")).verdict == "wrong"


def test_the_yardstick_names_what_is_refused_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from gen_dist.jets import UnsupportedOperation, dispatch, registry

    def refuse(operator: object, *_: object) -> None:
        raise UnsupportedOperation(operator)

    losses = importlib.import_module("zoo.losses")
    monkeypatch.setitem(registry.RULES, "tanh", refuse)
    monkeypatch.setattr(dispatch, "CHOSEN", {})
    outcome = measure(lambda: losses.build("mse_loss"))
    assert (outcome.verdict, outcome.auto) == ("refused", "goes on")
    assert "tanh" in outcome.detail
