"""The networks of diffusers: every model class that its constructor can make small.

As for transformers, numbers in a constructor's signature become small by their names, and `forward` is fed by the names
of its arguments. What a model asks for beyond that is in the tables of autoencoders, sounds, transformers, U-Nets.
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
from zoo.diffusers_autoencoders import AUTOENCODERS
from zoo.diffusers_inputs import CHANNELS, HEAD_DIM, HEADS, TEXT, WIDTH, Special, inputs_of
from zoo.diffusers_sounds import SOUNDS
from zoo.diffusers_transformers import TRANSFORMERS
from zoo.diffusers_unets import UNETS

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
    (r"(\w+_)?num_(attention_|kv_|cross_attention_|key_value_(attention_)?)?heads|n_(kv_)?heads?|dit_heads|num_trans_head",
     HEADS),
    (r"\w*head_dim|dim_heads|d_kv", HEAD_DIM),
    (r"(\w+_)?(num|n)_\w*(layers?|blocks)|(dit_)?depth|(transformer_)?layers_per_block", 1),
    (r"hidden_size|inner_dim|(model_|dit_|embed_)?dim|d_model|model_channels|caption_projection_dim|width|n_embd",
     WIDTH),
    (r"ffn_dim|(text_|decoder_)?intermediate_size|ff_dim|mlp_dim|d_ff|ffn_hidden_size|ff_inner_dim", 48),
    (r"(cross|joint)_attention_(input_)?dim|cross_attention_dim_t5|(dit_)?text_((embed|emb|embed_2|hidden|in)_)?dim|"
     r"text_encoder_(1_)?dim|caption_channels|pooled_(projection|embed)_dim|cap_feat_dim|in_text_dim\d?|projection_dim|"
     r"encoder_hid_dim|encoder_hidden_size|encoder_hidden_states_channels|context_in_dim|llm_features_dim|clip_img_dim|"
     r"image_(embed|proj)_dim|img_context_dim_out|crossattn_proj_in_channels|cond_(token|embed)_dim|global_cond_dim|"
     r"global_states_input_dim|clip_text_pooled_in_channels|prefix_inner_dim", TEXT),
    (r"norm_num_groups|num_groups", 4),
    (r"(audio_)?(in|out)_channels|latent_channels?|z_channels|io_channels|z_dim|(in|out)_visual_dim", CHANNELS),
    (r"base_dim|decoder_base_dim|base_channels|ch|encoder_dim|decoder_dim|encoder_base_dim", 8),
    (r"sample_size|sample_height|sample_width", 8),
    (r"pos_embed_max_size", 16),
    (r"freq_dim|(time|timestep|fourier|timestep_ratio)_(embed|embedding)(_hidden)?_dim|condition_dim|time_(step_)?dim|"
     r"timestep_(features_dim|channels|guidance_channels)|adaln_dim", 16),
    (r"num_embeds_ada_norm|num_train_timesteps|num_vq_embeddings|vocab_size|rope_max_seq_len", 64),
)  # fmt: skip

SPECIAL = AUTOENCODERS | SOUNDS | TRANSFORMERS | UNETS

# Why those cannot be built that are known.
FLEX = "FlexAttention has no backward on CPUs"
NOT_BUILT = {
    "AnyFlowFARTransformer3DModel": FLEX,
    "AutoencoderKLAllegro": "it encodes only by tiles, which are more than 120 pixels wide",
    "ControlNetXSAdapter": "it runs only as a part of UNetControlNetXSModel",
    "Kandinsky6SRTransformer3DModel": FLEX,
    "LTX2VideoDiffusionDecoderModel": FLEX,
    "RFD4ProteinaAutoencoder": "it asks for the tables of a protein's atoms",
    "WanAnimate2Transformer3DModel": FLEX,
    "ZImageControlNetModel": "it borrows modules of a ZImageTransformer2DModel",
}


def build(name: str) -> Case:
    if name in NOT_BUILT:
        raise NotBuilt(NOT_BUILT[name])
    kind = getattr(diffusers, name)
    special = SPECIAL.get(name, Special())
    options = {**_small(kind), **special.options}
    try:
        with torch.device("meta"):
            weights = sum(p.numel() for p in kind(**options).parameters())
        if weights > LARGEST:
            raise NotBuilt(f"it still has {weights / 1e6:.0f} million weights")
        model = kind(**options).double()
    except Exception as error:
        raise NotBuilt(f"its constructor: {type(error).__name__} {str(error)[:200]}") from error
    tried = []
    for inputs in inputs_of(model, special):
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
