"""What the models of diffusers are fed with, by the names of the arguments of their `forward`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

BATCH, WORDS = 2, 5
HEADS, HEAD_DIM = 2, 16
WIDTH, TEXT, CHANNELS = HEADS * HEAD_DIM, 24, 4
IMAGE, VIDEO, SEQUENCE = (BATCH, CHANNELS, 8, 8), (BATCH, CHANNELS, 3, 8, 8), (BATCH, 16, CHANNELS)


class Special(NamedTuple):
    """What a model asks for beyond the rules by name.

    Attributes:
        options: of its constructor.
        shape: of the first input of `forward`, which is random. Without it, several shapes are tried.
        inputs: makes the other inputs that the rules do not know. It may make the first one as well.
    """

    options: Mapping[str, Any] = MappingProxyType({})
    shape: tuple[int, ...] | None = None
    inputs: Callable[[], dict[str, Any]] | None = None


def inputs_of(model: nn.Module, special: Special) -> Iterator[dict[str, Any]]:
    """Candidates, each with another shape of what the model cleans."""
    first = next(iter(_accepted(model)))
    more = special.inputs() if special.inputs else {}
    if first in more:
        yield _named(model, IMAGE) | more
        return
    for shape in [special.shape] if special.shape else _shapes(model):
        yield {**_named(model, shape), first: torch.randn(shape), **more}


def grid(*sizes: int) -> Tensor:
    """The positions of a grid, one a row."""
    return torch.cartesian_prod(*(torch.arange(size) for size in sizes)).double()


def _shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of what the model cleans: an image, a video in two orders, a sequence, a sound."""
    config = model.config
    channels = next(
        (x for x in (getattr(config, key, None) for key in ("in_channels", "in_visual_dim")) if x), CHANNELS
    )
    sides = (8, 32)
    shapes = [(BATCH, channels, side, side) for side in sides]
    shapes += [
        shape for side in sides for shape in ((BATCH, channels, 5, side, side), (BATCH, 5, channels, side, side))
    ]
    if "Autoencoder" in type(model).__name__:
        shapes += [(BATCH, 3, 5, side, side) for side in sides]
    shapes += [(BATCH, 16, channels), (BATCH, channels, 64), (BATCH, 5, 8, 8, channels), (BATCH, channels, 1, 8, 8)]
    return shapes


def _named(model: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    """Inputs by the names of the arguments of `forward`, beside a first one of this shape."""
    config, accepted = model.config, _accepted(model)
    sequence = len(shape) == 3
    axes = len(getattr(config, "axes_dims_rope", ()) or (0, 0, 0))
    known: dict[str, Any] = {
        "timestep": torch.tensor([1.0, 5.0]),
        "t": torch.tensor([0.1, 0.5]),
        "r_timestep": torch.tensor([0.5, 3.0]),
        "encoder_hidden_states": torch.randn(BATCH, WORDS, TEXT),
        "pooled_projections": torch.randn(BATCH, TEXT),
        "encoder_attention_mask": torch.ones(BATCH, WORDS),
        "encoder_hidden_states_mask": torch.ones(BATCH, WORDS),
        "attention_mask": None if {"encoder_attention_mask", "sample"} & {*accepted} else torch.ones(BATCH, WORDS),
        "text_embedding_mask": torch.ones(BATCH, WORDS),
        "guidance": torch.tensor([3.0, 4.0]) if getattr(config, "guidance_embeds", False) else None,
        "class_labels": torch.tensor([1, 2]),
        "img_ids": grid(*(1,) * (axes - 2), 4, 4),
        "txt_ids": torch.zeros(WORDS, axes),
        "img_shapes": [[(1, 4, 4)]] * BATCH,
        "fps": 8,
        "num_frames": 2,
        "height": 4 if sequence else 8,
        "width": 4 if sequence else 8,
        "controlnet_cond": torch.randn(BATCH, 3, shape[-1] * 8, shape[-1] * 8)
        if hasattr(config, "block_out_channels")
        else torch.randn(shape),
        "padding_mask": torch.zeros(1, 1, 8, 8),
        "target_size": torch.tensor([[8.0, 8]] * BATCH),
        "original_size": torch.tensor([[8.0, 8]] * BATCH),
        "crop_coords": torch.tensor([[0.0, 0]] * BATCH),
    }
    if hasattr(config, "cross_attention_dim_t5"):  # Hunyuan-DiT reads two texts
        known["encoder_hidden_states_t5"] = torch.randn(BATCH, WORDS + 1, TEXT)
        known["text_embedding_mask_t5"] = torch.ones(BATCH, WORDS + 1)
        known["image_meta_size"] = torch.ones(BATCH, 6)
        known["style"] = torch.zeros(BATCH, dtype=torch.long)
    return {name: known[name] for name in accepted if known.get(name) is not None}


def _accepted(model: nn.Module) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(model.forward).parameters)
