"""What the models of transformers are fed with, by the names of the arguments of their `forward`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

BATCH, TOKENS = 2, 7


def inputs_of(model: nn.Module, head: str) -> Iterator[dict[str, Any]]:
    """Candidates, the best first: with targets where the head computes a loss, then without."""
    accepted = inspect.signature(model.forward).parameters
    config = model.config
    for inputs in _candidates(config, accepted, head):
        targets = _targets(config, inputs, accepted, head)
        if targets:
            yield inputs | targets
        yield inputs


def _candidates(config: Any, accepted: Any, head: str) -> Iterator[dict[str, Any]]:
    text = config.get_text_config()
    vocabulary = next((x for x in (getattr(c, "vocab_size", None) for c in (text, config)) if isinstance(x, int)), 100)
    shape = (BATCH, 2, TOKENS) if head == "MULTIPLE_CHOICE" else (BATCH, TOKENS)
    tokens: dict[str, Any] = {}
    if "input_ids" in accepted:
        tokens["input_ids"] = torch.randint(vocabulary // 2, vocabulary - 1, shape)
    if "decoder_input_ids" in accepted and config.is_encoder_decoder:
        tokens["decoder_input_ids"] = torch.randint(vocabulary // 2, vocabulary - 1, shape)
    if "bbox" in accepted:
        tokens["bbox"] = torch.tensor([1, 2, 8, 9]).expand(*shape, 4).contiguous()
    senses = [
        {**pixels, **sounds}
        for pixels in (_pixels(config) if "pixel_values" in accepted else [{}])
        for sounds in (_sounds(config, accepted) or [{}])
    ]
    for sensed in senses:
        if "input_ids" in tokens and sensed and _has_placeholders(config):
            continue  # images and sounds stand for tokens among the words: their towers are model types of their own
        yield tokens | sensed
    if tokens:
        yield tokens
    if "grid_thw" in accepted:
        yield _patches(config, accepted)
    if "past_values" in accepted:
        length = getattr(config, "context_length", None) or 32
        yield {"past_values": torch.randn(BATCH, length, getattr(config, "num_input_channels", 1))}
    for sensed in senses:
        if sensed and "decoder_input_ids" in tokens:
            yield sensed | {"decoder_input_ids": tokens["decoder_input_ids"]}
        elif sensed:
            yield sensed


def _has_placeholders(config: Any) -> bool:
    return any(
        isinstance(getattr(config, f"{sense}_token_{key}", None), int)
        for sense in ("image", "audio", "video")
        for key in ("id", "index")
    )


def _patches(config: Any, accepted: Any) -> dict[str, Tensor]:
    """Two images as rows of patches, with their grids."""
    size = getattr(config, "patch_size", 8) ** 2 * getattr(config, "temporal_patch_size", 1)
    channels = getattr(config, "in_channels", None) or getattr(config, "num_channels", None) or 3
    name = next(name for name in accepted if name != "self")
    return {name: torch.randn(32, channels * size), "grid_thw": torch.tensor([[1, 4, 4]] * 2)}


def _pixels(config: Any) -> list[dict[str, Tensor]]:
    vision = getattr(config, "vision_config", None) or getattr(config, "backbone_config", None) or config
    channels = next((x for x in (getattr(c, "num_channels", None) for c in (vision, config)) if isinstance(x, int)), 3)
    sizes = [getattr(vision, "image_size", None), 32, 64, 224]
    found = []
    for size in sizes:
        size = size if isinstance(size, (list, tuple)) else (size, size)
        if all(isinstance(x, int) and x <= 256 for x in size):
            found.append({"pixel_values": torch.randn(BATCH, channels, *size)})
            frames = getattr(config, "num_frames", None)
            if isinstance(frames, int):
                found.insert(0, {"pixel_values": torch.randn(BATCH, frames, channels, *size)})
    return found


def _sounds(config: Any, accepted: Any) -> list[dict[str, Tensor]]:
    audio = getattr(config, "audio_config", None) or getattr(config, "encoder_config", None) or config
    if isinstance(audio, dict):
        audio = config
    keys = ("num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim", "input_dim")
    bins = next((x for x in (getattr(audio, key, None) for key in keys) if isinstance(x, int)), 80)
    if "input_values" in accepted:
        frames = getattr(config, "max_length", None)
        waves = [torch.randn(BATCH, 3600), torch.randn(BATCH, 1, 3600), torch.randn(BATCH, 32, bins)]
        if isinstance(frames, int):
            waves.insert(0, torch.randn(BATCH, frames, bins))
        return [{"input_values": wave} for wave in waves]
    if "input_features" in accepted:
        frames = 2 * getattr(audio, "max_source_positions", 64)
        shapes = [(BATCH, bins, frames), (BATCH, 64, bins), (BATCH, 1, 64, bins)]
        found = [{"input_features": torch.randn(*shape)} for shape in shapes]
        if "input_features_mask" in accepted:
            for each in found:
                each["input_features_mask"] = torch.ones(BATCH, each["input_features"].shape[1], dtype=torch.bool)
        return found
    if "audio_mel" in accepted:
        return [{"audio_mel": torch.randn(BATCH, 64, bins), "audio_mel_mask": torch.zeros(BATCH, 64, dtype=torch.bool)}]
    return []


def _targets(config: Any, inputs: dict[str, Any], accepted: Any, head: str) -> dict[str, Any]:
    rows = torch.arange(BATCH)
    if "start_positions" in accepted:
        return {"start_positions": rows, "end_positions": rows + 1}
    if "next_sentence_label" in accepted:
        return {"labels": inputs["input_ids"], "next_sentence_label": rows} if "labels" in accepted else {}
    if "labels" not in accepted:
        return {}
    if head == "CTC":
        return {"labels": torch.tensor([[2, 3], [4, 2]])}
    if head == "SEMANTIC_SEGMENTATION" and "pixel_values" in inputs:
        return {"labels": torch.zeros(BATCH, *inputs["pixel_values"].shape[-2:], dtype=torch.long)}
    if "CLASSIFICATION" in head and head != "TOKEN_CLASSIFICATION":
        return {"labels": rows % 2}
    if head in ("NEXT_SENTENCE_PREDICTION", "MULTIPLE_CHOICE"):
        return {"labels": rows}
    words = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    if words is None:
        return {}
    return {"labels": words % 2 if head == "TOKEN_CLASSIFICATION" else words}
