"""The models of diffusers for which the rules by name do not do: options of the constructor, inputs of `forward`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, randn, tensor

from zoo.diffusers_inputs import CHANNELS, HEAD_DIM, HEADS, TEXT, WIDTH, grid

Special = tuple[dict[str, Any], Callable[[], dict[str, Any]] | None]


NOT_BUILT = {
    "AnyFlowFARTransformer3DModel": "FlexAttention has no backward on CPUs",
    "AutoencoderKLAllegro": "it encodes only by tiles, which are more than 120 pixels wide",
    "ControlNetXSAdapter": "it runs only as a part of UNetControlNetXSModel",
    "Kandinsky6SRTransformer3DModel": "FlexAttention has no backward on CPUs",
    "LTX2VideoDiffusionDecoderModel": "FlexAttention has no backward on CPUs",
    "WanAnimate2Transformer3DModel": "FlexAttention has no backward on CPUs",
    "ZImageControlNetModel": "it borrows modules of a ZImageTransformer2DModel",
}


def sample(*shape: int) -> Callable[[], dict[str, Tensor]]:
    """An image, a video or a sound, as most autoencoders take it."""
    return lambda: {"sample": randn(shape)}


AUTOENCODERS: dict[str, Special] = {
    "AutoencoderKLHunyuanImage": (
        {"block_out_channels": (32, 32), "spatial_compression_ratio": 2, "in_channels": 3, "out_channels": 3},
        sample(2, 3, 8, 8),
    ),
    "AutoencoderKLHunyuanVideo15": (
        {"block_out_channels": (32, 32, 32, 32), "spatial_compression_ratio": 8},
        sample(1, 3, 5, 16, 16),
    ),
    "AutoencoderKLKVAE": (
        {"channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "ch_mult": (1, 1)},
        sample(2, 3, 8, 8),
    ),
    "AutoencoderKLKVAEAudio": (
        {
            "encoder_rates": [2, 2],
            "decoder_rates": [2, 2],
            "latent_dim": 16,
            "codebook_dim": 4,
            "attn_num_heads": HEADS,
        },
        sample(2, 1, 64),
    ),
    "AutoencoderKLKVAEVideo": ({"ch": 32, "ch_mult": (1, 1), "temporal_compress_times": 2}, sample(2, 3, 5, 8, 8)),
    "AutoencoderKLLTX2Video": (
        {"latent_channels": 8, "patch_size": 2, "upsample_factor": (1, 1, 1)},
        sample(2, 3, 9, 32, 32),
    ),
    "AutoencoderKLMiniMaxH3": (
        {
            "block_out_channels": (32, 32),
            "spatial_downsample_factors": (2, 1),
            "temporal_downsample_factors": (1, 2),
            "decoder_num_layers": 1,
            "decoder_num_attention_heads": HEADS,
            "decoder_attention_head_dim": HEAD_DIM,
            "latents_mean": (0.0,) * CHANNELS,
            "latents_std": (1.0,) * CHANNELS,
            "clip_length": 5,
            "token_drop": 0,
        },
        sample(2, 3, 5, 8, 8),
    ),
    "AutoencoderKLMiniMaxH3Audio": (
        {
            "encoder_rates": (2, 2),
            "latent_dim": 16,
            "decoder_rates": (2, 2),
            "decoder_kernel_sizes": (4, 4),
            "decoder_dim": 16,
            "resblock_kernel_sizes": (3,),
            "resblock_dilation_sizes": ((1, 3, 5),),
        },
        sample(2, 1, 64),
    ),
    "AutoencoderKLMochi": (
        {"in_channels": 15, "encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4},
        sample(2, 3, 7, 16, 16),
    ),
    "AutoencoderKLQwenImage21": ({"dim_mult": [1, 1], "temperal_downsample": [True]}, sample(2, 4, 1, 16, 16)),
    "AutoencoderOobleck": (
        {
            "encoder_hidden_size": 8,
            "downsampling_ratios": [2, 2],
            "channel_multiples": [1, 1],
            "decoder_channels": 8,
            "decoder_input_channels": CHANNELS,
        },
        sample(2, 2, 64),
    ),
    "AutoencoderRAE": (
        {
            "encoder_hidden_size": 64,
            "encoder_input_size": 28,
            "encoder_num_hidden_layers": 1,
            "decoder_hidden_size": WIDTH,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": HEADS,
            "decoder_intermediate_size": 48,
            "patch_size": 4,
        },
        sample(2, 3, 28, 28),
    ),
    "AutoencoderSAME": (
        {
            "patch_size": 4,
            "encoder_channels": 16,
            "encoder_c_mults": (2,),
            "encoder_strides": (4,),
            "encoder_transformer_depths": (1,),
            "latent_dim": 16,
            "dim_heads": HEAD_DIM,
        },
        sample(2, 2, 256),
    ),
    "ConsistencyDecoderVAE": (
        {
            "encoder_block_out_channels": (32,) * 4,
            "decoder_block_out_channels": (32,) * 4,
            "encoder_layers_per_block": 1,
            "decoder_layers_per_block": 1,
        },
        sample(2, 3, 32, 32),
    ),
    "Cosmos3AVAEAudioTokenizer": (
        {
            "vocoder_input_dim": CHANNELS,
            "dec_dim": 8,
            "dec_c_mults": (1, 2),
            "dec_strides": (2, 2),
            "enc_dim": 8,
            "enc_intermediate_dim": 16,
            "enc_num_layers": 2,
            "enc_num_blocks": 1,
            "enc_latent_dim": 2 * CHANNELS,
            "enc_c_mults": (1, 2),
            "enc_strides": (2, 2),
        },
        sample(2, 2, 512),
    ),
    "MMAudioVAE": (
        {"mel_bins": 8, "hidden_channels": 16, "channel_multipliers": (1, 1), "n_fft": 64, "hop_length": 16},
        sample(2, 512),
    ),
}

LTX2 = {
    "audio_in_channels": CHANNELS,
    "audio_out_channels": CHANNELS,
    "audio_num_attention_heads": HEADS,
    "audio_attention_head_dim": HEAD_DIM,
    "audio_cross_attention_dim": WIDTH,
    "caption_channels": TEXT,
}

TRANSFORMERS: dict[str, Special] = {
    "AceStepTransformer1DModel": (
        {"audio_acoustic_hidden_dim": CHANNELS, "in_channels": 3 * CHANNELS, "encoder_hidden_size": TEXT},
        lambda: {
            "hidden_states": randn(2, 16, CHANNELS),
            "context_latents": randn(2, 16, 2 * CHANNELS),
            "timestep_r": tensor([0.5, 3.0]),
        },
    ),
    "AudioLDM2ProjectionModel": (
        {"text_encoder_1_dim": TEXT, "langauge_model_dim": WIDTH},
        lambda: {"hidden_states": randn(2, 5, TEXT), "hidden_states_1": randn(2, 7, TEXT), "attention_mask": None},
    ),
    "BriaFibo2Transformer2DModel": (
        {"injection_layer_ids": (0,), "min_num_gist_tokens": 4, "max_num_gist_tokens": 8, "gist_step": 2},
        lambda: {"hidden_states": randn(2, CHANNELS, 8, 8), "encoder_hidden_states": randn(2, 2, 5, TEXT)},
    ),
    "BriaFiboTransformer2DModel": (
        {"text_encoder_dim": WIDTH // 2},
        lambda: {
            "hidden_states": randn(2, 16, CHANNELS),
            "text_encoder_layers": [randn(2, 5, WIDTH // 2) for _ in range(2)],
        },
    ),
    "ChromaTransformer2DModel": (
        {"approximator_num_channels": 16, "approximator_hidden_dim": 16, "approximator_layers": 1},
        lambda: {"hidden_states": randn(2, 16, CHANNELS), "attention_mask": torch.ones(2, 21)},
    ),
    "CogVideoXTransformer3DModel": (
        {"sample_frames": 5, "max_text_seq_length": 5},
        lambda: {"hidden_states": randn(2, 2, CHANNELS, 8, 8)},
    ),
    "ConsisIDTransformer3DModel": (
        {"sample_frames": 5, "max_text_seq_length": 5},
        lambda: {"hidden_states": randn(2, 2, CHANNELS, 8, 8)},
    ),
    "Cosmos3OmniTransformer": (
        {
            "latent_channel": CHANNELS,
            "patch_latent_dim": 4 * CHANNELS,
            "dtype": torch.float64,
            "rope_axes_dim": (4, 2, 2),
        },
        lambda: {
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
    "DreamLiteTransformer2DModel": (
        {"in_channels": WIDTH, "norm_num_groups": 4, "cross_attention_dim": TEXT},
        lambda: {"hidden_states": randn(2, WIDTH, 8, 8)},
    ),
    "EasyAnimateTransformer3DModel": (
        {"in_channels": CHANNELS, "out_channels": CHANNELS, "patch_size": 2, "mmdit_layers": 1, "num_layers": 2},
        lambda: {"hidden_states": randn(2, CHANNELS, 3, 8, 8)},
    ),
    "ErnieImageTransformer2DModel": (
        {"ffn_hidden_size": 48, "text_in_dim": TEXT},
        lambda: {
            "hidden_states": randn(2, CHANNELS, 8, 8),
            "text_bth": randn(2, 5, TEXT),
            "text_lens": tensor([5, 3]),
        },
    ),
    "Flux2Transformer2DModel": (
        {"timestep_guidance_channels": 16},
        lambda: {
            "hidden_states": randn(2, 16, CHANNELS),
            "img_ids": grid(1, 4, 4, 1),
            "txt_ids": torch.zeros(5, 4),
            "guidance": tensor([3.0, 4.0]),
        },
    ),
    "Flux3Transformer2DModel": (
        {"timestep_channels": 16},
        lambda: {
            "hidden_states": randn(2, 16, CHANNELS),
            "img_ids": grid(1, 4, 4, 1),
            "txt_ids": torch.zeros(5, 4),
        },
    ),
    "GlmImageTransformer2DModel": (
        {"prior_vq_quantizer_codebook_size": 16},
        lambda: {
            "hidden_states": randn(2, CHANNELS, 8, 8),
            "prior_token_id": torch.randint(16, (2, 16)),
            "prior_token_drop": torch.zeros(2, 16, dtype=torch.bool),
        },
    ),
    "HeliosTransformer3DModel": ({"rope_dim": (4, 6, 6)}, lambda: {"hidden_states": randn(2, CHANNELS, 3, 8, 8)}),
    "HiDreamImageTransformer2DModel": (
        {
            "patch_size": 2,
            "caption_channels": (TEXT, TEXT),
            "text_emb_dim": TEXT,
            "axes_dims_rope": (4, 6, 6),
            "max_resolution": (8, 8),
            "llama_layers": (0, 0),
        },
        lambda: {
            "hidden_states": randn(2, CHANNELS, 8, 8),
            "timesteps": tensor([1.0, 5.0]),
            "encoder_hidden_states_t5": randn(2, 5, TEXT),
            "encoder_hidden_states_llama3": randn(2, 2, 5, TEXT),
            "pooled_embeds": randn(2, TEXT),
        },
    ),
    "HunyuanDiT2DModel": (
        {"in_channels": CHANNELS, "patch_size": 2, "text_len": 5, "text_len_t5": 6},
        lambda: {
            "hidden_states": randn(2, CHANNELS, 8, 8),
            "encoder_hidden_states_t5": randn(2, 6, TEXT),
            "text_embedding_mask_t5": torch.ones(2, 6),
            "image_meta_size": torch.ones(2, 6),
            "style": tensor([0, 0]),
        },
    ),
    "HunyuanVideo15Transformer3DModel": (
        {"text_embed_2_dim": TEXT, "image_embed_dim": TEXT},
        lambda: {
            "hidden_states": randn(2, CHANNELS, 3, 4, 4),
            "encoder_hidden_states_2": randn(2, 5, TEXT),
            "encoder_attention_mask_2": torch.ones(2, 5),
            "image_embeds": randn(2, 4, TEXT),
        },
    ),
    "HunyuanVideoFramepackTransformer3DModel": (
        {"has_image_proj": True, "image_proj_dim": TEXT, "has_clean_x_embedder": True},
        lambda: {
            "hidden_states": randn(2, CHANNELS, 3, 8, 8),
            "image_embeds": randn(2, 4, TEXT),
            "indices_latents": torch.arange(3),
            "latents_clean": randn(2, CHANNELS, 1, 8, 8),
            "indices_latents_clean": torch.arange(1),
            "latents_history_2x": randn(2, CHANNELS, 2, 8, 8),
            "indices_latents_history_2x": torch.arange(2),
            "latents_history_4x": randn(2, CHANNELS, 4, 8, 8),
            "indices_latents_history_4x": torch.arange(4),
            "guidance": tensor([3.0, 4.0]),
        },
    ),
    "Ideogram4Transformer2DModel": (
        {"adaln_dim": 16, "llm_features_dim": TEXT, "mrope_section": (4, 2, 2)},
        lambda: {
            "hidden_states": randn(2, 21, CHANNELS),
            "timestep": tensor([0.1, 0.7]),
            "encoder_hidden_states": randn(2, 21, TEXT),
            "position_ids": grid(1, 7, 3).expand(2, 21, 3),
            "segment_ids": torch.zeros(2, 21),
            "indicator": torch.where(torch.arange(21) < 5, 3, 2).expand(2, 21),  # text, then image
        },
    ),
    "JoyImageEditPlusTransformer3DModel": (
        {},
        lambda: {"hidden_states": randn(2, 16, CHANNELS, 1, 2, 2), "shape_list": [[(1, 4, 4)]] * 2},
    ),
    "Kandinsky5Transformer3DModel": (
        {},
        lambda: {
            "hidden_states": randn(2, 3, 8, 8, CHANNELS),
            "visual_rope_pos": [torch.arange(3), torch.arange(4), torch.arange(4)],
            "text_rope_pos": torch.arange(5),
        },
    ),
    "Kandinsky6Transformer3DModel": ({}, lambda: {"hidden_states": randn(2, 3, 8, 8, 9)}),
    "Krea2Transformer2DModel": (
        {
            "text_hidden_dim": TEXT,
            "num_text_layers": 2,
            "text_num_attention_heads": HEADS,
            "text_num_key_value_heads": HEADS,
            "text_intermediate_size": 48,
        },
        lambda: {
            "hidden_states": randn(2, 16, CHANNELS),
            "encoder_hidden_states": randn(2, 5, 2, TEXT),
            "position_ids": grid(1, 7, 3),
        },
    ),
    "LTX2VideoTransformer3DModel": (
        LTX2,
        lambda: {
            "hidden_states": randn(2, 32, CHANNELS),
            "audio_hidden_states": randn(2, 6, CHANNELS),
            "audio_encoder_hidden_states": randn(2, 5, TEXT),
            "timestep": tensor([[100.0], [500.0]]),
            "audio_num_frames": 6,
        },
    ),
    "LTXVideoTransformer3DModel": ({}, lambda: {"hidden_states": randn(2, 32, CHANNELS)}),
    "LatteTransformer3DModel": (
        {
            "in_channels": CHANNELS,
            "patch_size": 2,
            "caption_channels": TEXT,
            "video_length": 3,
            "norm_type": "ada_norm_single",
            "num_embeds_ada_norm": 64,
        },
        lambda: {"hidden_states": randn(2, CHANNELS, 3, 8, 8)},
    ),
    "LongCatAudioDiTTransformer": (
        {"dit_dim": WIDTH, "dit_depth": 1, "dit_heads": HEADS, "dit_text_dim": TEXT, "latent_dim": CHANNELS},
        lambda: {"hidden_states": randn(2, 16, CHANNELS), "latent_cond": randn(2, 16, CHANNELS)},
    ),
    "Lumina2Transformer2DModel": (
        {"axes_dim_rope": (4, 6, 6), "axes_lens": (16, 16, 16), "multiple_of": 16},
        lambda: {
            "hidden_states": randn(2, CHANNELS, 8, 8),
            "encoder_attention_mask": torch.ones(2, 5, dtype=torch.bool),
        },
    ),
    "LuminaNextDiT2DModel": (
        {"num_kv_heads": HEADS, "multiple_of": 16},
        lambda: {
            "hidden_states": randn(2, CHANNELS, 8, 8),
            "encoder_mask": torch.ones(2, 5),
            "image_rotary_emb": torch.polar(torch.ones(8, 8, HEAD_DIM // 2), randn(8, 8, HEAD_DIM // 2)),
            "cross_attention_kwargs": {},
        },
    ),
    "MiniMaxH3Transformer3DModel": (
        {"audio_in_channels": CHANNELS, "time_embed_hidden_dim": 16, "rope_freq_dim": 2},
        lambda: {
            "hidden_states": randn(2, 8, 4 * CHANNELS),
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
    "MiniMaxMusic3RVQDepthDecoder": (
        {"audio_vocab_size": 16, "num_codebooks": 4},
        lambda: {"inputs_embeds": randn(2, 4, WIDTH)},
    ),
    "MiniMaxMusic3Transformer1DModel": (
        {"ff_inner_dim": 48, "rotary_dim": 8, "fourier_embedding_dim": 16},
        lambda: {"hidden_states": randn(2, CHANNELS, 16), "encoder_hidden_states": randn(2, 16, 16)},
    ),
    "OmniGenTransformer2DModel": (
        {
            "pad_token_id": 0,
            "time_step_dim": 16,
            "rope_scaling": {"short_factor": [1.0] * (HEAD_DIM // 2), "long_factor": [1.0] * (HEAD_DIM // 2)},
        },
        lambda: {
            "hidden_states": randn(2, CHANNELS, 8, 8),
            "input_ids": torch.randint(64, (2, 5)),
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": torch.ones(2, 22, 22),
            "position_ids": torch.arange(22).expand(2, 22),
        },
    ),
    "PRXTransformer2DModel": ({"axes_dim": (8, 8), "context_in_dim": TEXT}, None),
    "PriorTransformer": (
        {"embedding_dim": TEXT, "num_embeddings": 5},
        lambda: {"hidden_states": randn(2, TEXT), "proj_embedding": randn(2, TEXT), "attention_mask": None},
    ),
    "QwenImage21Transformer2DModel": (
        {"context_in_dim": TEXT},
        lambda: {"hidden_states": randn(2, 16, CHANNELS), "img_mask": (torch.arange(9) > 4).expand(2, 9)},
    ),
    "SanaWMLTX2RefinerTransformer3DModel": (
        LTX2,
        lambda: {
            "hidden_states": randn(2, 32, CHANNELS),
            "timestep": tensor([[100.0], [500.0]]),
            "video_rotary_emb": (randn(2, 32, WIDTH), randn(2, 32, WIDTH)),
        },
    ),
    "SanaWMTransformer3DModel": (
        {"linear_head_dim": HEAD_DIM, "chunk_plucker_channels": CHANNELS, "softmax_every_n": 2, "num_layers": 2},
        lambda: {
            "hidden_states": randn(2, CHANNELS, 3, 4, 4),
            "timestep": tensor([[[100.0] * 3], [[500.0] * 3]]),
            "encoder_hidden_states": randn(2, 1, 5, TEXT),
            "chunk_plucker": randn(2, CHANNELS, 3, 4, 4),
        },
    ),
    "StableAudio3DiTModel": (
        {
            "io_channels": CHANNELS,
            "embed_dim": WIDTH,
            "cond_token_dim": TEXT,
            "global_cond_dim": TEXT,
            "local_add_cond_dim": 5,
            "timestep_features_dim": 16,
            "num_memory_tokens": 4,
        },
        lambda: {"hidden_states": randn(2, CHANNELS, 16), "global_hidden_states": randn(2, TEXT)},
    ),
    "StableAudioDiTModel": (
        {"global_states_input_dim": TEXT, "cross_attention_input_dim": TEXT, "num_key_value_attention_heads": HEADS},
        lambda: {
            "hidden_states": randn(2, CHANNELS, 16),
            "global_hidden_states": randn(2, 1, TEXT),
            "rotary_embedding": (randn(17, HEAD_DIM // 2), randn(17, HEAD_DIM // 2)),
        },
    ),
    "StableAudioProjectionModel": (
        {"conditioning_dim": 16, "min_value": 0, "max_value": 8},
        lambda: {
            "text_hidden_states": randn(2, 5, TEXT),
            "start_seconds": tensor([0.0, 1.0]),
            "end_seconds": tensor([4.0, 5.0]),
        },
    ),
    "T5FilmDecoder": (
        {"input_dims": 8, "targets_length": 16, "d_model": WIDTH, "num_heads": HEADS, "d_kv": HEAD_DIM, "d_ff": 48},
        lambda: {
            "encodings_and_masks": [(randn(2, 5, WIDTH), torch.ones(2, 5))],
            "decoder_input_tokens": randn(2, 16, 8),
            "decoder_noise_time": tensor([0.1, 0.7]),
        },
    ),
    "Transformer2DModel": (
        {"in_channels": WIDTH, "norm_num_groups": 4, "cross_attention_dim": TEXT},
        lambda: {"hidden_states": randn(2, WIDTH, 8, 8)},
    ),
    "TransformerTemporalModel": (
        {"in_channels": WIDTH, "norm_num_groups": 4},
        lambda: {"hidden_states": randn(6, WIDTH, 4, 4), "num_frames": 3, "encoder_hidden_states": None},
    ),
    "UniDiffuserModel": (
        {
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "sample_size": 8,
            "patch_size": 2,
            "clip_img_dim": TEXT,
            "num_text_tokens": 5,
            "num_layers": 2,
        },
        lambda: {
            "latent_image_embeds": randn(2, CHANNELS, 8, 8),
            "image_embeds": randn(2, 1, TEXT),
            "prompt_embeds": randn(2, 5, TEXT),
            "timestep_img": tensor([1, 5]),
            "timestep_text": tensor([2, 7]),
            "encoder_hidden_states": None,
        },
    ),
    "UniDiffuserTextDecoder": (
        {
            "prefix_length": 3,
            "prefix_inner_dim": TEXT,
            "prefix_hidden_dim": 16,
            "n_positions": 16,
            "n_layer": 1,
            "n_head": HEADS,
        },
        lambda: {"input_ids": torch.randint(64, (2, 5)), "prefix_embeds": randn(2, 3, TEXT)},
    ),
    "WanAnimateTransformer3DModel": (
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
        lambda: {
            "hidden_states": randn(2, 2 * CHANNELS + 4, 3, 8, 8),
            "encoder_hidden_states_image": randn(2, 4, TEXT),
            "pose_hidden_states": randn(2, CHANNELS, 2, 8, 8),
            "face_pixel_values": randn(2, 3, 5, 16, 16),
        },
    ),
    "WanVACETransformer3DModel": (
        {"vace_layers": [0], "vace_in_channels": 8},
        lambda: {"hidden_states": randn(2, CHANNELS, 3, 8, 8), "control_hidden_states": randn(2, 8, 3, 8, 8)},
    ),
    "ZImageTransformer2DModel": (
        {"axes_dims": [4, 6, 6], "axes_lens": [64, 16, 16]},
        lambda: {
            "x": [randn(CHANNELS, 1, 8, 8) for _ in range(2)],
            "cap_feats": [randn(5, TEXT), randn(3, TEXT)],
        },
    ),
}

CONTROLS_AND_UNETS: dict[str, Special] = {
    "ControlNetModel": ({}, lambda: {"sample": randn(2, CHANNELS, 8, 8), "attention_mask": None}),
    "ControlNetUnionModel": (
        {"num_trans_channel": 32, "num_trans_head": HEADS, "num_proj_channel": 32, "addition_time_embed_dim": 8},
        lambda: {
            "sample": randn(2, CHANNELS, 8, 8),
            "controlnet_cond": [randn(2, 3, 64, 64)],
            "control_type": tensor([[1.0, 0, 0, 0, 0, 0]] * 2),
            "control_type_idx": [0],
            "attention_mask": None,
        },
    ),
    "CosmosControlNetModel": (
        {
            "n_controlnet_blocks": 1,
            "in_channels": CHANNELS + 2,
            "latent_channels": CHANNELS + 2,
            "model_channels": WIDTH,
            "adaln_lora_dim": 8,
            "max_size": (8, 8, 8),
            "img_context_dim_out": TEXT,
            "crossattn_proj_in_channels": TEXT,
            "encoder_hidden_states_channels": TEXT,
        },
        lambda: {
            "controls_latents": randn(2, CHANNELS, 3, 8, 8),
            "latents": randn(2, CHANNELS, 3, 8, 8),
            "condition_mask": torch.zeros(2, 1, 3, 8, 8),
            "attention_mask": None,
            "fps": None,
        },
    ),
    "FluxControlNetModel": (
        {},
        lambda: {"hidden_states": randn(2, 16, CHANNELS), "controlnet_cond": randn(2, 16, CHANNELS)},
    ),
    "HunyuanDiT2DControlNetModel": (
        {"in_channels": CHANNELS, "patch_size": 2, "text_len": 5, "text_len_t5": 6, "transformer_num_layers": 4},
        lambda: {
            "hidden_states": randn(2, CHANNELS, 8, 8),
            "controlnet_cond": randn(2, CHANNELS, 8, 8),
            "encoder_hidden_states_t5": randn(2, 6, TEXT),
            "text_embedding_mask_t5": torch.ones(2, 6),
            "image_meta_size": torch.ones(2, 6),
            "style": tensor([0, 0]),
            "return_dict": False,
        },
    ),
    "I2VGenXLUNet": (
        {},
        lambda: {
            "sample": randn(2, CHANNELS, 3, 8, 8),
            "fps": tensor([8, 8]),
            "image_latents": randn(2, CHANNELS, 3, 8, 8),
            "image_embeddings": randn(2, TEXT),
        },
    ),
    "Kandinsky3UNet": (
        {"groups": 4, "encoder_hid_dim": TEXT, "layers_per_block": 2},
        lambda: {"sample": randn(2, CHANNELS, 16, 16)},
    ),
    "QwenImageControlNetModel": (
        {},
        lambda: {"hidden_states": randn(2, 16, CHANNELS), "controlnet_cond": randn(2, 16, CHANNELS)},
    ),
    "SD3ControlNetModel": (
        {},
        lambda: {"hidden_states": randn(2, CHANNELS, 8, 8), "controlnet_cond": randn(2, CHANNELS, 8, 8)},
    ),
    "SanaControlNetModel": (
        {},
        lambda: {"hidden_states": randn(2, CHANNELS, 8, 8), "controlnet_cond": randn(2, CHANNELS, 8, 8)},
    ),
    "SparseControlNetModel": (
        {"conditioning_channels": CHANNELS, "motion_num_attention_heads": HEADS},
        lambda: {
            "sample": randn(2, CHANNELS, 3, 8, 8),
            "controlnet_cond": randn(2, CHANNELS, 3, 8, 8),
            "conditioning_mask": torch.ones(2, 1, 3, 8, 8),
            "encoder_hidden_states": randn(6, 5, TEXT),
            "attention_mask": None,
        },
    ),
    "StableCascadeUNet": (
        {
            "timestep_ratio_embedding_dim": 16,
            "conditioning_dim": WIDTH,
            "block_out_channels": (32, 32),
            "num_attention_heads": (2, 2),
            "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1),
            "clip_text_pooled_in_channels": TEXT,
        },
        lambda: {
            "sample": randn(2, CHANNELS, 8, 8),
            "timestep_ratio": tensor([0.1, 0.5]),
            "clip_text_pooled": randn(2, 1, TEXT),
        },
    ),
    "UNet1DModel": ({"extra_in_channels": 64}, lambda: {"sample": randn(2, 2, 64)}),
    "UNet2DModel": ({}, lambda: {"sample": randn(2, 3, 32, 32), "class_labels": None}),
    "UNetControlNetXSModel": (
        {"ctrl_conditioning_embedding_out_channels": (8, 8)},
        lambda: {
            "sample": randn(2, CHANNELS, 8, 8),
            "controlnet_cond": randn(2, 3, 16, 16),
            "attention_mask": None,
        },
    ),
    "UNetMotionModel": (
        {"motion_num_attention_heads": HEADS},
        lambda: {
            "sample": randn(2, CHANNELS, 3, 8, 8),
            "encoder_hidden_states": randn(6, 5, TEXT),
            "attention_mask": None,
        },
    ),
    "UNetSpatioTemporalConditionModel": (
        {
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24,
            "num_attention_heads": (2, 2, 2, 2),
        },
        lambda: {
            "sample": randn(2, 3, CHANNELS, 8, 8),
            "encoder_hidden_states": randn(2, 1, TEXT),
            "added_time_ids": tensor([[6.0, 127, 0]] * 2),
        },
    ),
    "UVit2DModel": (
        {
            "cond_embed_dim": TEXT,
            "micro_cond_encode_dim": 8,
            "micro_cond_embed_dim": 40,
            "codebook_size": 48,
            "in_channels": WIDTH,
            "block_out_channels": WIDTH,
            "block_num_heads": HEADS,
        },
        lambda: {
            "input_ids": torch.randint(48, (2, 8, 8)),
            "pooled_text_emb": randn(2, TEXT),
            "micro_conds": torch.ones(2, 5),
        },
    ),
}

SPECIAL = AUTOENCODERS | TRANSFORMERS | CONTROLS_AND_UNETS
