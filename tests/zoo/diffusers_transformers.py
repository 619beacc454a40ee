"""The transformers of diffusers for which the rules by name do not do."""

from __future__ import annotations

import torch
from torch import randn, tensor

from zoo.diffusers_inputs import CHANNELS, HEAD_DIM, HEADS, IMAGE, SEQUENCE, TEXT, VIDEO, WIDTH, Special, grid

LTX2 = {"audio_cross_attention_dim": WIDTH}

TRANSFORMERS: dict[str, Special] = {
    "BriaFibo2Transformer2DModel": Special(
        {"injection_layer_ids": (0,), "min_num_gist_tokens": 4, "max_num_gist_tokens": 8, "gist_step": 2},
        IMAGE,
        lambda: {"encoder_hidden_states": randn(2, 2, 5, TEXT)},
    ),
    "BriaFiboTransformer2DModel": Special(
        {"text_encoder_dim": WIDTH // 2},
        SEQUENCE,
        lambda: {"text_encoder_layers": [randn(2, 5, WIDTH // 2) for _ in range(2)]},
    ),
    "ChromaTransformer2DModel": Special(
        {"approximator_num_channels": 16, "approximator_hidden_dim": 16, "approximator_layers": 1},
        SEQUENCE,
        lambda: {"attention_mask": torch.ones(2, 21)},
    ),
    "CogVideoXTransformer3DModel": Special({"sample_frames": 5, "max_text_seq_length": 5}, (2, 2, CHANNELS, 8, 8)),
    "ConsisIDTransformer3DModel": Special({"sample_frames": 5, "max_text_seq_length": 5}, (2, 2, CHANNELS, 8, 8)),
    "Cosmos3OmniTransformer": Special(
        {"patch_latent_dim": 4 * CHANNELS, "dtype": torch.float64, "rope_axes_dim": (4, 2, 2)},
        inputs=lambda: {
            "input_ids": torch.randint(64, (5,)),
            "text_indexes": torch.arange(5),
            "position_ids": torch.arange(13).expand(3, 13),
            "und_len": 5,
            "sequence_length": 13,
            "vision_tokens": [randn(1, CHANNELS, 2, 4, 4)],
            "vision_token_shapes": [(2, 2, 2)],
            "vision_sequence_indexes": torch.arange(5, 13),
            "vision_mse_loss_indexes": torch.arange(9, 13),
            "vision_timesteps": torch.full((4,), 300.0),
            "vision_noisy_frame_indexes": [tensor([1])],
        },
    ),
    "DreamLiteTransformer2DModel": Special(
        {"in_channels": WIDTH, "norm_num_groups": 4, "cross_attention_dim": TEXT}, (2, WIDTH, 8, 8)
    ),
    "EasyAnimateTransformer3DModel": Special(
        {"in_channels": CHANNELS, "out_channels": CHANNELS, "patch_size": 2, "mmdit_layers": 1, "num_layers": 2}, VIDEO
    ),
    "ErnieImageTransformer2DModel": Special(
        shape=IMAGE, inputs=lambda: {"text_bth": randn(2, 5, TEXT), "text_lens": tensor([5, 3])}
    ),
    "Flux2Transformer2DModel": Special(shape=SEQUENCE),
    "Flux3Transformer2DModel": Special(shape=SEQUENCE),
    "GlmImageTransformer2DModel": Special(
        {"prior_vq_quantizer_codebook_size": 16},
        IMAGE,
        lambda: {
            "prior_token_id": torch.randint(16, (2, 16)),
            "prior_token_drop": torch.zeros(2, 16, dtype=torch.bool),
        },
    ),
    "HeliosTransformer3DModel": Special({"rope_dim": (4, 6, 6)}, VIDEO),
    "HiDreamImageTransformer2DModel": Special(
        {
            "patch_size": 2,
            "caption_channels": (TEXT, TEXT),
            "axes_dims_rope": (4, 6, 6),
            "max_resolution": (8, 8),
            "llama_layers": (0, 0),
        },
        IMAGE,
        lambda: {
            "timesteps": tensor([1.0, 5.0]),
            "encoder_hidden_states_t5": randn(2, 5, TEXT),
            "encoder_hidden_states_llama3": randn(2, 2, 5, TEXT),
            "pooled_embeds": randn(2, TEXT),
        },
    ),
    "HunyuanDiT2DModel": Special({"in_channels": CHANNELS, "patch_size": 2, "text_len": 5, "text_len_t5": 6}, IMAGE),
    "HunyuanVideo15Transformer3DModel": Special(
        shape=(2, CHANNELS, 3, 4, 4),
        inputs=lambda: {
            "encoder_hidden_states_2": randn(2, 5, TEXT),
            "encoder_attention_mask_2": torch.ones(2, 5),
            "image_embeds": randn(2, 4, TEXT),
        },
    ),
    "HunyuanVideoFramepackTransformer3DModel": Special(
        {"has_image_proj": True, "has_clean_x_embedder": True},
        VIDEO,
        lambda: {
            "image_embeds": randn(2, 4, TEXT),
            "indices_latents": torch.arange(3),
            "latents_clean": randn(2, CHANNELS, 1, 8, 8),
            "indices_latents_clean": torch.arange(1),
            "latents_history_2x": randn(2, CHANNELS, 2, 8, 8),
            "indices_latents_history_2x": torch.arange(2),
            "latents_history_4x": randn(2, CHANNELS, 4, 8, 8),
            "indices_latents_history_4x": torch.arange(4),
        },
    ),
    "Ideogram4Transformer2DModel": Special(
        {"mrope_section": (4, 2, 2)},
        (2, 21, CHANNELS),
        lambda: {
            "timestep": tensor([0.1, 0.7]),
            "encoder_hidden_states": randn(2, 21, TEXT),
            "position_ids": grid(1, 7, 3).expand(2, 21, 3),
            "segment_ids": torch.zeros(2, 21),
            "indicator": torch.where(torch.arange(21) < 5, 3, 2).expand(2, 21),  # text, then image
        },
    ),
    "JoyImageEditPlusTransformer3DModel": Special(
        shape=(2, 16, CHANNELS, 1, 2, 2), inputs=lambda: {"shape_list": [[(1, 4, 4)]] * 2}
    ),
    "Kandinsky5Transformer3DModel": Special(
        shape=(2, 3, 8, 8, CHANNELS),
        inputs=lambda: {
            "visual_rope_pos": [torch.arange(3), torch.arange(4), torch.arange(4)],
            "text_rope_pos": torch.arange(5),
        },
    ),
    "Kandinsky6Transformer3DModel": Special(shape=(2, 3, 8, 8, 9)),
    "Krea2Transformer2DModel": Special(
        {"num_text_layers": 2},
        SEQUENCE,
        lambda: {"encoder_hidden_states": randn(2, 5, 2, TEXT), "position_ids": grid(1, 7, 3)},
    ),
    "LatteTransformer3DModel": Special(
        {
            "in_channels": CHANNELS,
            "patch_size": 2,
            "caption_channels": TEXT,
            "video_length": 3,
            "norm_type": "ada_norm_single",
            "num_embeds_ada_norm": 64,
        },
        VIDEO,
    ),
    "LTX2VideoTransformer3DModel": Special(
        LTX2,
        (2, 32, CHANNELS),
        lambda: {
            "audio_hidden_states": randn(2, 6, CHANNELS),
            "audio_encoder_hidden_states": randn(2, 5, TEXT),
            "timestep": tensor([[100.0], [500.0]]),
            "audio_num_frames": 6,
        },
    ),
    "LTXVideoTransformer3DModel": Special(shape=(2, 32, CHANNELS)),
    "Lumina2Transformer2DModel": Special(
        {"axes_dim_rope": (4, 6, 6), "axes_lens": (16, 16, 16), "multiple_of": 16},
        IMAGE,
        lambda: {"encoder_attention_mask": torch.ones(2, 5, dtype=torch.bool)},
    ),
    "LuminaNextDiT2DModel": Special(
        {"num_kv_heads": HEADS, "multiple_of": 16},
        IMAGE,
        lambda: {
            "encoder_mask": torch.ones(2, 5),
            "image_rotary_emb": torch.polar(torch.ones(8, 8, HEAD_DIM // 2), randn(8, 8, HEAD_DIM // 2)),
            "cross_attention_kwargs": {},
        },
    ),
    "MiniMaxH3Transformer3DModel": Special(
        {"rope_freq_dim": 2},
        (2, 8, 4 * CHANNELS),
        lambda: {
            "audio_hidden_states": randn(2, 3, CHANNELS),
            "timestep": tensor([0.0, 0.7]),
            "timestep_indices": tensor([0] * 5 + [1] * 11),
            "token_tags": tensor([1] * 5 + [2] * 3 + [0] * 8),
            "position_ids": grid(4, 2, 2),
            "video_indices": torch.arange(8, 16),
            "audio_indices": torch.arange(5, 8),
            "text_indices": torch.arange(5),
        },
    ),
    "OmniGenTransformer2DModel": Special(
        {
            "pad_token_id": 0,
            "rope_scaling": {"short_factor": [1.0] * (HEAD_DIM // 2), "long_factor": [1.0] * (HEAD_DIM // 2)},
        },
        IMAGE,
        lambda: {
            "input_ids": torch.randint(64, (2, 5)),
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": torch.ones(2, 22, 22),
            "position_ids": torch.arange(22).expand(2, 22),
        },
    ),
    "PriorTransformer": Special(
        {"embedding_dim": TEXT, "num_embeddings": 5},
        (2, TEXT),
        lambda: {"proj_embedding": randn(2, TEXT), "attention_mask": None},
    ),
    "PRXTransformer2DModel": Special({"axes_dim": (8, 8)}),
    "QwenImage21Transformer2DModel": Special(
        shape=SEQUENCE, inputs=lambda: {"img_mask": (torch.arange(9) > 4).expand(2, 9)}
    ),
    "RFD4ProteinaTransformer": Special(
        {
            "nlayers": 1,
            "token_dim": WIDTH,
            "nheads": HEADS,
            "dim_cond": 16,
            "pair_repr_dim": 16,
            "tri_mult_c": 8,
            "feats_seq": ("xt_bb_ca", "xt_local_latents"),
            "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
            "feats_pair_repr": ("xt_bb_ca_pair_dists",),
        },
        (2, 6, 3),
        lambda: {
            "local_latents": randn(2, 6, 32),
            "bb_ca_time": tensor([0.1, 0.5]),
            "local_latents_time": tensor([0.2, 0.7]),
            "padding_mask": torch.ones(2, 6, dtype=torch.bool),
            "conditioning": {
                "is_in_context_conditioning": torch.zeros(2, 6, dtype=torch.bool),
                "supports_local_latent": torch.ones(2, 6, dtype=torch.bool),
            },
        },
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Special(
        LTX2,
        (2, 32, CHANNELS),
        lambda: {
            "timestep": tensor([[100.0], [500.0]]),
            "video_rotary_emb": (randn(2, 32, WIDTH), randn(2, 32, WIDTH)),
        },
    ),
    "SanaWMTransformer3DModel": Special(
        {"chunk_plucker_channels": CHANNELS, "softmax_every_n": 2, "num_layers": 2},
        (2, CHANNELS, 3, 4, 4),
        lambda: {
            "timestep": tensor([[[100.0] * 3], [[500.0] * 3]]),
            "encoder_hidden_states": randn(2, 1, 5, TEXT),
            "chunk_plucker": randn(2, CHANNELS, 3, 4, 4),
        },
    ),
    "Transformer2DModel": Special(
        {"in_channels": WIDTH, "norm_num_groups": 4, "cross_attention_dim": TEXT}, (2, WIDTH, 8, 8)
    ),
    "TransformerTemporalModel": Special(
        {"in_channels": WIDTH, "norm_num_groups": 4},
        (6, WIDTH, 4, 4),
        lambda: {"num_frames": 3, "encoder_hidden_states": None},
    ),
    "UniDiffuserModel": Special(
        {
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "sample_size": 8,
            "patch_size": 2,
            "num_text_tokens": 5,
            "num_layers": 2,
        },
        IMAGE,
        lambda: {
            "image_embeds": randn(2, 1, TEXT),
            "prompt_embeds": randn(2, 5, TEXT),
            "timestep_img": tensor([1, 5]),
            "timestep_text": tensor([2, 7]),
            "encoder_hidden_states": None,
        },
    ),
    "UniDiffuserTextDecoder": Special(
        {"prefix_length": 3, "prefix_hidden_dim": 16, "n_positions": 16},
        inputs=lambda: {"input_ids": torch.randint(64, (2, 5)), "prefix_embeds": randn(2, 3, TEXT)},
    ),
    "WanAnimateTransformer3DModel": Special(
        {
            "in_channels": 2 * CHANNELS + 4,
            "image_dim": TEXT,
            "inject_face_latents_blocks": 1,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
            "motion_encoder_size": 16,
            "motion_style_dim": 16,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": HEADS,
        },
        (2, 2 * CHANNELS + 4, 3, 8, 8),
        lambda: {
            "encoder_hidden_states_image": randn(2, 4, TEXT),
            "pose_hidden_states": randn(2, CHANNELS, 2, 8, 8),
            "face_pixel_values": randn(2, 3, 5, 16, 16),
        },
    ),
    "WanVACETransformer3DModel": Special(
        {"vace_layers": [0], "vace_in_channels": 8}, VIDEO, lambda: {"control_hidden_states": randn(2, 8, 3, 8, 8)}
    ),
    "ZImageTransformer2DModel": Special(
        {"axes_dims": [4, 6, 6], "axes_lens": [64, 16, 16]},
        inputs=lambda: {
            "x": [randn(CHANNELS, 1, 8, 8) for _ in range(2)],
            "cap_feats": [randn(5, TEXT), randn(3, TEXT)],
        },
    ),
}
