"""The autoencoders of diffusers for which the rules by name do not do."""

from __future__ import annotations

from zoo.diffusers_inputs import CHANNELS, WIDTH, Special

AUTOENCODERS: dict[str, Special] = {
    "AutoencoderKLHunyuanImage": Special(
        {"block_out_channels": (32, 32), "spatial_compression_ratio": 2, "in_channels": 3, "out_channels": 3},
        (2, 3, 8, 8),
    ),
    "AutoencoderKLHunyuanVideo15": Special(
        {"block_out_channels": (32, 32, 32, 32), "spatial_compression_ratio": 8}, (1, 3, 5, 16, 16)
    ),
    "AutoencoderKLKVAE": Special({"channels": 32, "ch_mult": (1, 1)}, (2, 3, 8, 8)),
    "AutoencoderKLKVAEAudio": Special(
        {"encoder_rates": [2, 2], "decoder_rates": [2, 2], "latent_dim": 16, "codebook_dim": 4}, (2, 1, 64)
    ),
    "AutoencoderKLKVAEVideo": Special({"ch": 32, "ch_mult": (1, 1), "temporal_compress_times": 2}, (2, 3, 5, 8, 8)),
    "AutoencoderKLLTX2Video": Special(
        {"latent_channels": 8, "patch_size": 2, "upsample_factor": (1, 1, 1)}, (2, 3, 9, 32, 32)
    ),
    "AutoencoderKLMiniMaxH3": Special(
        {
            "block_out_channels": (32, 32),
            "spatial_downsample_factors": (2, 1),
            "temporal_downsample_factors": (1, 2),
            "latents_mean": (0.0,) * CHANNELS,
            "latents_std": (1.0,) * CHANNELS,
            "clip_length": 5,
            "token_drop": 0,
        },
        (2, 3, 5, 8, 8),
    ),
    "AutoencoderKLMiniMaxH3Audio": Special(
        {
            "encoder_rates": (2, 2),
            "latent_dim": 16,
            "decoder_rates": (2, 2),
            "decoder_kernel_sizes": (4, 4),
            "decoder_dim": 16,
            "resblock_kernel_sizes": (3,),
            "resblock_dilation_sizes": ((1, 3, 5),),
        },
        (2, 1, 64),
    ),
    "AutoencoderKLMochi": Special(
        {"in_channels": 15, "encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4},
        (2, 3, 7, 16, 16),
    ),
    "AutoencoderKLQwenImage21": Special({"dim_mult": [1, 1], "temperal_downsample": [True]}, (2, 4, 1, 16, 16)),
    "AutoencoderOobleck": Special(
        {
            "encoder_hidden_size": 8,
            "downsampling_ratios": [2, 2],
            "channel_multiples": [1, 1],
            "decoder_channels": 8,
            "decoder_input_channels": CHANNELS,
        },
        (2, 2, 64),
    ),
    "AutoencoderRAE": Special(
        {"encoder_hidden_size": 64, "encoder_input_size": 28, "decoder_hidden_size": WIDTH, "patch_size": 4},
        (2, 3, 28, 28),
    ),
    "AutoencoderSAME": Special(
        {
            "patch_size": 4,
            "encoder_channels": 16,
            "encoder_c_mults": (2,),
            "encoder_strides": (4,),
            "encoder_transformer_depths": (1,),
            "latent_dim": 16,
        },
        (2, 2, 256),
    ),
    "ConsistencyDecoderVAE": Special(
        {
            "encoder_block_out_channels": (32,) * 4,
            "decoder_block_out_channels": (32,) * 4,
            "encoder_layers_per_block": 1,
            "decoder_layers_per_block": 1,
        },
        (2, 3, 32, 32),
    ),
    "Cosmos3AVAEAudioTokenizer": Special(
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
        (2, 2, 512),
    ),
    "MMAudioVAE": Special(
        {"mel_bins": 8, "hidden_channels": 16, "channel_multipliers": (1, 1), "n_fft": 64, "hop_length": 16}, (2, 512)
    ),
}
