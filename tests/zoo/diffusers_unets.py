"""The U-Nets and the control networks of diffusers for which the rules by name do not do."""

from __future__ import annotations

import torch
from torch import randn, tensor

from zoo.diffusers_inputs import CHANNELS, IMAGE, SEQUENCE, TEXT, VIDEO, WIDTH, Special

UNETS: dict[str, Special] = {
    "ControlNetModel": Special(shape=IMAGE),
    "ControlNetUnionModel": Special(
        {"num_trans_channel": 32, "num_proj_channel": 32, "addition_time_embed_dim": 8},
        IMAGE,
        lambda: {
            "controlnet_cond": [randn(2, 3, 64, 64)],
            "control_type": tensor([[1.0, 0, 0, 0, 0, 0]] * 2),
            "control_type_idx": [0],
        },
    ),
    "CosmosControlNetModel": Special(
        {
            "n_controlnet_blocks": 1,
            "in_channels": CHANNELS + 2,
            "latent_channels": CHANNELS + 2,
            "adaln_lora_dim": 8,
            "max_size": (8, 8, 8),
        },
        VIDEO,
        lambda: {
            "latents": randn(2, CHANNELS, 3, 8, 8),
            "condition_mask": torch.zeros(2, 1, 3, 8, 8),
            "attention_mask": None,
            "fps": None,
        },
    ),
    "FluxControlNetModel": Special(shape=SEQUENCE),
    "HunyuanDiT2DControlNetModel": Special(
        {"in_channels": CHANNELS, "patch_size": 2, "text_len": 5, "text_len_t5": 6, "transformer_num_layers": 4},
        IMAGE,
        lambda: {"controlnet_cond": randn(2, CHANNELS, 8, 8), "return_dict": False},
    ),
    "I2VGenXLUNet": Special(
        shape=VIDEO,
        inputs=lambda: {
            "fps": tensor([8, 8]),
            "image_latents": randn(2, CHANNELS, 3, 8, 8),
            "image_embeddings": randn(2, TEXT),
        },
    ),
    "Kandinsky3UNet": Special({"groups": 4, "layers_per_block": 2}, (2, CHANNELS, 16, 16)),
    "QwenImageControlNetModel": Special(shape=SEQUENCE),
    "SanaControlNetModel": Special(shape=IMAGE),
    "SD3ControlNetModel": Special(shape=IMAGE),
    "SparseControlNetModel": Special(
        {"conditioning_channels": CHANNELS},
        VIDEO,
        lambda: {
            "controlnet_cond": randn(VIDEO),
            "conditioning_mask": torch.ones(2, 1, 3, 8, 8),
            "encoder_hidden_states": randn(6, 5, TEXT),
        },
    ),
    "StableCascadeUNet": Special(
        {
            "conditioning_dim": WIDTH,
            "block_out_channels": (32, 32),
            "num_attention_heads": (2, 2),
            "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1),
        },
        IMAGE,
        lambda: {"timestep_ratio": tensor([0.1, 0.5]), "clip_text_pooled": randn(2, 1, TEXT)},
    ),
    "UNet1DModel": Special({"extra_in_channels": 64}, (2, 2, 64)),
    "UNet2DModel": Special(shape=(2, 3, 32, 32), inputs=lambda: {"class_labels": None}),
    "UNetControlNetXSModel": Special(
        {"ctrl_conditioning_embedding_out_channels": (8, 8)}, IMAGE, lambda: {"controlnet_cond": randn(2, 3, 16, 16)}
    ),
    "UNetMotionModel": Special(shape=VIDEO, inputs=lambda: {"encoder_hidden_states": randn(6, 5, TEXT)}),
    "UNetSpatioTemporalConditionModel": Special(
        {
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24,
            "num_attention_heads": (2, 2, 2, 2),
        },
        (2, 3, CHANNELS, 8, 8),
        lambda: {"encoder_hidden_states": randn(2, 1, TEXT), "added_time_ids": tensor([[6.0, 127, 0]] * 2)},
    ),
    "UVit2DModel": Special(
        {
            "micro_cond_encode_dim": 8,
            "micro_cond_embed_dim": 40,
            "codebook_size": 48,
            "in_channels": WIDTH,
            "block_out_channels": WIDTH,
        },
        inputs=lambda: {
            "input_ids": torch.randint(48, (2, 8, 8)),
            "pooled_text_emb": randn(2, TEXT),
            "micro_conds": torch.ones(2, 5),
        },
    ),
}
