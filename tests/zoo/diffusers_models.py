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
from zoo.diffusers_inputs import CHANNELS, HEAD_DIM, HEADS, TEXT, WIDTH, inputs_of
from zoo.diffusers_special import NOT_BUILT, SPECIAL

LARGEST = 2e7  # weights of a model that is small enough


def names() -> list[str]:
    return sorted(
        name
        for name in dir(diffusers)
        if re.search(r"Model|Autoencoder|VAE|Transformer|UNet|ControlNet|VQ|Decoder", name)
        and not re.search(r"Pipeline|Scheduler|Flax|Auto[PM]|Multi[A-Z]|EMA|Onnx|ModelMixin", name)
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
    if name in NOT_BUILT:
        raise NotBuilt(NOT_BUILT[name])
    kind = getattr(diffusers, name)
    given, special_inputs = SPECIAL.get(name, ({}, None))
    options = _small(kind) | given
    try:
        with torch.device("meta"):
            weights = sum(p.numel() for p in kind(**options).parameters())
        if weights > LARGEST:
            raise NotBuilt(f"it still has {weights / 1e6:.0f} million weights")
        model = kind(**options).double()
    except Exception as error:
        raise NotBuilt(f"its constructor: {type(error).__name__} {str(error)[:200]}") from error
    tried = []
    for inputs in inputs_of(model, special_inputs):
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
