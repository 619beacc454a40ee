"""Every model type of transformers that its configuration class can make small, with the heads of the auto classes.

Each model type comes once, with the first head that it has in the order of `HEADS`; of each other auto class, three
model types come besides. What a head is fed with is in `transformers_inputs.py`.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers import BertForMaskedLM, LlamaForCausalLM, LlavaForConditionalGeneration, ViTModel  # noqa: F401
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from zoo.case import Case, NotBuilt, case
from zoo.transformers_inputs import inputs_of

HEADS = (
    "CAUSAL_LM MASKED_LM SEQ_TO_SEQ_CAUSAL_LM SPEECH_SEQ_2_SEQ CTC IMAGE_TEXT_TO_TEXT MULTIMODAL_LM "
    "IMAGE_CLASSIFICATION SEMANTIC_SEGMENTATION VIDEO_CLASSIFICATION AUDIO_CLASSIFICATION PRETRAINING"
).split()
OTHERS = 3  # model types for each other auto class
LARGEST = 2e7  # weights of a model that is small enough

# The four models above bring what most models import: done once, before the processes are forked.
transformers.logging.set_verbosity_error()


@functools.cache
def _classes() -> dict[str, dict[str, str]]:
    """For each model type, its classes by head; the head of the bare model is ''."""
    found: dict[str, dict[str, str]] = {}
    for key in dir(auto):
        if match := re.fullmatch(r"MODEL_(?:FOR_(\w+)_)?MAPPING_NAMES", key):
            for model_type, name in getattr(auto, key).items():
                name = name if isinstance(name, str) else name[0]
                found.setdefault(model_type, {})[match[1] or ""] = name
    return found


def names() -> list[str]:
    """Names such as `bert` and, with another head than its first, `bert/TOKEN_CLASSIFICATION`."""
    chosen, others = [], []
    seen: dict[str, int] = {}
    for model_type, heads in sorted(_classes().items()):
        chosen.append(model_type)
        for head in heads:
            if head not in (*HEADS, "", "BACKBONE") and seen.get(head, 0) < OTHERS:
                seen[head] = seen.get(head, 0) + 1
                others.append(f"{model_type}/{head}")
    return chosen + others


def build(name: str) -> Case:
    model_type, _, head = name.partition("/")
    heads = _classes()[model_type]
    if not head:
        head = next((head for head in HEADS if head in heads), next(iter(heads)))
    try:
        kind, config_class = getattr(transformers, heads[head]), CONFIG_MAPPING[model_type]
    except Exception as error:
        raise NotBuilt(f"its import fails: {' '.join(str(error).split())[:200]}") from error
    tried = []
    for rules in LEVELS:
        try:
            return _fed(_model(kind, small(config_class, rules)), head)
        except Exception as error:
            tried.append(f"{type(error).__name__} {error}")
    raise NotBuilt(f"{kind.__name__}: {tried[0]}"[:300])


def _fed(model: nn.Module, head: str) -> Case:
    """The model with the first inputs that it takes."""
    failure: Exception = NotBuilt("nothing is known to feed it with")
    for inputs in inputs_of(model, head):
        try:
            model(**inputs)
        except Exception as error:
            failure = error if isinstance(failure, NotBuilt) else failure
        else:
            return case(model, lambda inputs=inputs: model(**inputs))
    raise failure


def _model(kind: type[nn.Module], config: Any) -> nn.Module:
    config._experts_implementation = "eager"  # the grouped product of matrices has no float64
    with torch.device("meta"):
        weights = sum(p.numel() for p in kind(config).parameters())
    if weights > LARGEST:
        raise NotBuilt(f"it still has {weights / 1e6:.0f} million weights")
    model = kind(config).double()
    model.config.use_cache = False
    return model


# What a number in a configuration is, by its name, and what it becomes. The first match counts.
Rules = tuple[tuple[str, Any], ...]

FEWER: Rules = (
    (r".*vocab_size(_\w+)?|codebook_size|.*entity_vocab_size|num_embeddings", 128),
    (r"(num_)?nextn_predict_layers|num_mtp_layers|first_k_dense_replace|.*_offset|.*num_feature_levels", None),
    (r"(\w+_)?num_(\w+_)?(layers|blocks)|\w+_layers|n_layers?|(\w+_)?depth|\w*num_layers|layers", 2),
    (r"(num|n)_(routed_|local_)?experts|moe_num_experts|num_moe_experts|n_routed_experts", 4),
    (r"num_experts_per_tok(en)?|moe_k|top_k|moe_topk|num_selects|moe_top_k|experts_per_token", 2),
    (r"n_groups?|topk_group|num_expert_group|mamba_n_groups", 1),
    (r"num_labels|num_queries|num_denoising|num_proposals|two_stage_num_proposals", 6),
    (r"max_position_embeddings|n_positions|max_seq_len|max_sequence_length|n_ctx|max_source_positions|"
     r"max_target_positions|block_size|seq_length", 64),
)  # fmt: skip
NARROWER: Rules = (
    (r"\w*(key_value|kv)_heads|n_head_kv|num_kv_heads|\w*multi_query_group_num", 2),
    (r"\w*(attention_|num_|n_|index_n_)heads?|n_head|mamba_n_heads|\w*num_heads|decoder_num_heads", 4),
    (r"qk_(rope|nope)_head_dim|\w*head_dim|v_head_dim|d_kv|kv_channels|\w*attention_head_size|rotary_dim|head_size", 8),
    (r"\w*lora_rank|\w*_rank", 8),
    (r"\w*(intermediate|ffn|inner|feedforward|mlp)_?(size|dim|hidden_size)|d_ff|ffn_hidden_size|n_inner|\w*ff_dim", 48),
    (r"hidden_size|d_model|n_embd|embed_dim|dim|d_embed|emb_dim|embedding_dim|width|model_dim|"
     r"\w+_(hidden_size|embed_dim|hidden_dim|d_model)|hidden_dim|embedding_size|projection_dim|projection_size|"
     r"\w*encoder_stride_dim|\w*project_dim|decoder_hidden_dim|fusion_hidden_size", 32),
    (r"image_size|img_size|crop_size", 64),
    (r"patch_size", 8),
    (r"num_groups|norm_num_groups", 4),
    (r"upsample_initial_channel|spectrogram_bins", 32),
    (r"num_conv_pos_embedding_groups", 4),
    (r"num_conv_pos_embeddings", 16),
    (r"\w*window_size|sliding_window|attention_window", 2),
    (r"\w*chunk_size", 4),
    (r"\w*state_size|mamba_d_state|ssm_state_size", 8),
    (r"mamba_headdim|mamba_d_head|mamba_head_dim", 16),
)  # fmt: skip
LISTS: tuple[tuple[str, Callable[[int], int]], ...] = (  # of the members of a list
    (r"depths|num_\w*blocks|layers", lambda x: 1),
    (
        r"\w*(hidden_sizes|conv_dim|embed_dims?|channels|widths?|dims|tdnn_dim)",
        lambda x: max(8, x // 8) if x > 8 else x,
    ),
    (r"num_(attention_)?heads", lambda x: max(1, x // 3)),
)
LEVELS: tuple[Rules, ...] = (FEWER + NARROWER, FEWER, ())


def small(kind: type[Any], rules: Rules) -> Any:
    """A small configuration: known numbers become small, token ids fit the vocabulary, parts become small too."""
    plain = kind()
    changes: dict[str, Any] = {}
    if not rules:
        return plain
    for name in getattr(kind, "sub_configs", {}):
        part = getattr(plain, name, None)
        if isinstance(part, transformers.PreTrainedConfig):
            changes[name] = _backbone() if "Timm" in type(part).__name__ else small(type(part), rules)
    token_ids = itertools.count(1)
    for name, value in _fields(plain):
        if name in changes or isinstance(value, bool):
            continue
        if name == "pad_token_id" or (re.fullmatch(r"\w+_token_(id|index)\w*", name) and isinstance(value, int)):
            changes[name] = next(token_ids)
        elif (isinstance(value, int) and value > 1) or name == "vocab_size":
            new = next((new for pattern, new in rules if re.fullmatch(pattern, name)), None)
            if new is not None and (value is None or new < value):
                changes[name] = new
        elif rules is LEVELS[0] and name == "rope_parameters" and re.search("vl|omni|glm|ocr", kind.model_type):
            changes[name] = {**(value or {}), "mrope_section": [2, 1, 1]}  # half of a head, for time and place
        elif rules is LEVELS[0] and isinstance(value, (list, tuple)) and value and all(type(x) is int for x in value):
            new = next((new for pattern, new in LISTS if re.fullmatch(pattern, name)), None)
            if new is not None:
                changes[name] = type(value)(map(new, value))
    if getattr(plain, "num_key_value_heads", 0) == getattr(plain, "num_attention_heads", None):
        changes.pop("num_key_value_heads", None)
        if "num_attention_heads" in changes:
            changes["num_key_value_heads"] = changes["num_attention_heads"]
    if {"head_dim", "num_heads"} <= changes.keys() and hasattr(plain, "expand"):  # a kind of mamba
        changes["head_dim"] = changes["hidden_size"] * plain.expand // changes["num_heads"]
    return kind(**changes)


def _backbone() -> Any:
    """In the place of a backbone of timm, whose name the package looks up on the hub."""
    return transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip


def _fields(config: Any) -> Iterator[tuple[str, Any]]:
    """The fields that a user of the configuration may set, with their values."""
    names = getattr(type(config), "__dataclass_fields__", {})
    for name in names:
        try:
            yield name, getattr(config, name, None)
        except Exception:  # it differs by layer
            continue
