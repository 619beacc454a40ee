"""The networks of diffusers: every model class that its constructor can make small.

As for transformers, numbers in a constructor's signature become small by their names, and `forward` is fed by the names
of its arguments. Models that ask for more are listed as not built, with the reason.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import diffusers
import torch
from diffusers.models import modeling_utils
from torch import nn

from zoo.case import Case, NotBuilt, case

HEADS, HEAD_DIM = 2, 16
WIDTH, TEXT, CHANNELS = HEADS * HEAD_DIM, 24, 4
LARGEST = 2e7  # weights of a model that is small enough


def names() -> list[str]:
    return sorted(
        name
        for name in dir(diffusers)
        if re.search(r"Model|Autoencoder|VAE|Transformer|UNet|ControlNet|VQ|Decoder", name)
        and not re.search(r"Pipeline|Scheduler|Flax|Auto[PM]|Multi[A-Z]|EMA|Onnx", name)
        and _is_network(name)
    )


def _is_network(name: str) -> bool:
    try:
        kind = getattr(diffusers, name)
        return isinstance(kind, type) and issubclass(kind, modeling_utils.ModelMixin)
    except Exception:  # its optional package is missing
        return False


# What a number in a constructor is, by its name, and what it becomes. The first match counts.
RULES: tuple[tuple[str, Any], ...] = (
    (r"num_(attention_|kv_|key_value_|cross_attention_)?heads|n_heads|n_kv_heads|num_key_value_heads", HEADS),
    (r"(attention_|cross_attention_)?head_dim", HEAD_DIM),
    (r"(num|n)_\w*(layers|blocks)|depth|num_hidden_layers|(transformer_)?layers_per_block|num_res_blocks", 1),
    (r"hidden_size|inner_dim|model_dim|dim|caption_projection_dim|width|n_embd", WIDTH),
    (r"ffn_dim|intermediate_size|ff_dim|mlp_dim", 48),
    (r"(cross|joint)_attention_dim|text_(embed_)?dim|caption_channels|pooled_projection_dim|cap_feat_dim|in_text_dim\d?|"
     r"cross_attention_dim_t5|encoder_hidden_size|text_encoder_dim|projection_dim|pooled_embed_dim", TEXT),
    (r"norm_num_groups|num_groups", 4),
    (r"in_channels|latent_channels|out_channels|z_channels|z_dim|in_visual_dim|out_visual_dim", CHANNELS),
    (r"base_dim|decoder_base_dim|base_channels|ch|encoder_dim|decoder_dim|encoder_base_dim", 8),
    (r"sample_size|sample_height|sample_width", 8),
    (r"pos_embed_max_size", 16),
    (r"freq_dim|time_embed_dim|time_embedding_dim|condition_dim|time_dim|timestep_embed_dim", 16),
    (r"num_embeds_ada_norm|num_train_timesteps|num_vq_embeddings|vocab_size|rope_max_seq_len", 64),
)  # fmt: skip


def build(name: str) -> Case:
    kind = getattr(diffusers, name)
    try:
        with torch.device("meta"):
            weights = sum(p.numel() for p in kind(**_small(kind)).parameters())
        if weights > LARGEST:
            raise NotBuilt(f"it still has {weights / 1e6:.0f} million weights")
        model = kind(**_small(kind)).double()
    except Exception as error:
        raise NotBuilt(f"its constructor: {type(error).__name__} {str(error)[:200]}") from error
    tried = []
    for shape in _shapes(model):
        inputs = _inputs(model, shape)
        try:
            model(**inputs)
        except Exception as error:
            tried.append(f"{type(error).__name__} {error}".partition("\n")[0])
            continue
        return case(model, lambda inputs=inputs: model(**inputs))
    raise NotBuilt(f"it takes no input of these shapes; {' '.join(dict.fromkeys(tried))[:300]}")


def _small(kind: type[nn.Module]) -> dict[str, Any]:
    options = {}
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        default = parameter.default
        if isinstance(default, bool) or name in ("self", "args", "kwargs"):
            continue
        if isinstance(default, (tuple, list)) and default and all(type(x) is int for x in default):
            if re.search("block_out_channels|channels$", name):
                options[name] = type(default)(32 for _ in default)
            elif re.search("layers_per_block|num_layers|depths", name):
                options[name] = type(default)(1 for _ in default)
            elif re.search("axes_dims?(_rope)?$|rope_axes_dim|rope_dim_list", name):
                parts = {2: (8, 8), 3: (4, 6, 6), 4: (4, 4, 4, 4)}.get(len(default), default)
                options[name] = type(default)(parts)
        elif isinstance(default, int) or default is inspect.Parameter.empty or name in ("pooled_projection_dim",):
            new = next((new for pattern, new in RULES if re.fullmatch(pattern, name)), None)
            if new is not None and (not isinstance(default, int) or new < default):
                options[name] = new
    if "caption_channels" in options and "cross_attention_dim" in options:
        options["cross_attention_dim"] = WIDTH  # the caption is projected before
    return options


def _shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of what the model cleans: an image, a video in two orders, a sequence, a sound."""
    config = model.config
    channels = next(
        (x for x in (getattr(config, key, None) for key in ("in_channels", "in_visual_dim")) if x), CHANNELS
    )
    sides = (8, 32)
    shapes = [(2, channels, side, side) for side in sides]
    shapes += [shape for side in sides for shape in ((2, channels, 5, side, side), (2, 5, channels, side, side))]
    if "Autoencoder" in type(model).__name__:
        shapes += [(2, 3, 5, side, side) for side in sides]
    shapes += [(2, 16, channels), (2, channels, 64), (2, 5, 8, 8, channels), (2, channels, 1, 8, 8)]
    return shapes


def _inputs(model: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    """Inputs by the names of the arguments of `forward`; those of `shape` come first."""
    batch, words = shape[0], 5
    sequence = len(shape) == 3
    known: dict[str, Any] = {
        "timestep": torch.tensor([1.0, 5.0]),
        "t": torch.tensor([0.1, 0.5]),
        "encoder_hidden_states": torch.randn(batch, words, TEXT),
        "pooled_projections": torch.randn(batch, TEXT),
        "encoder_attention_mask": torch.ones(batch, words),
        "encoder_hidden_states_mask": torch.ones(batch, words),
        "attention_mask": torch.ones(batch, words) if "encoder_attention_mask" not in _accepted(model) else None,
        "text_embedding_mask": torch.ones(batch, words),
        "guidance": torch.tensor([3.0, 4.0]) if getattr(model.config, "guidance_embeds", False) else None,
        "class_labels": torch.tensor([1, 2]),
        "img_ids": torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(4)).double(),
        "txt_ids": torch.zeros(words, 3),
        "img_shapes": [[(1, 4, 4)]] * batch,
        "fps": 8,
        "num_frames": 2,
        "height": 4 if sequence else 8,
        "width": 4 if sequence else 8,
        "controlnet_cond": torch.randn(batch, 3, shape[-1] * 8, shape[-1] * 8),
        "padding_mask": torch.zeros(1, 1, 8, 8),
        "target_size": torch.tensor([[8.0, 8]] * batch),
        "original_size": torch.tensor([[8.0, 8]] * batch),
        "crop_coords": torch.tensor([[0.0, 0]] * batch),
    }
    needed = {name: p for name, p in _accepted(model).items() if p.default is p.empty or name in known}
    inputs = {name: known[name] for name in needed if known.get(name) is not None}
    first = next(iter(_accepted(model)))
    return {**inputs, first: torch.randn(shape)}


def _accepted(model: nn.Module) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(model.forward).parameters)
