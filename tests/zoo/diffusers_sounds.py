"""The networks of diffusers for sound, without autoencoders, for which the rules by name do not do."""

from __future__ import annotations

import torch
from torch import randn, tensor

from zoo.diffusers_inputs import CHANNELS, HEAD_DIM, SEQUENCE, TEXT, WIDTH, Special

SOUNDS: dict[str, Special] = {
    "AceStepTransformer1DModel": Special(
        {"audio_acoustic_hidden_dim": CHANNELS, "in_channels": 3 * CHANNELS, "encoder_hidden_size": TEXT},
        SEQUENCE,
        lambda: {"context_latents": randn(2, 16, 2 * CHANNELS), "timestep_r": tensor([0.5, 3.0])},
    ),
    "AudioLDM2ProjectionModel": Special(
        {"langauge_model_dim": WIDTH},
        (2, 5, TEXT),
        lambda: {"hidden_states_1": randn(2, 7, TEXT), "attention_mask": None},
    ),
    "LongCatAudioDiTTransformer": Special(
        {"latent_dim": CHANNELS}, SEQUENCE, lambda: {"latent_cond": randn(2, 16, CHANNELS)}
    ),
    "MiniMaxMusic3RVQDepthDecoder": Special({"audio_vocab_size": 16, "num_codebooks": 4}, (2, 4, WIDTH)),
    "MiniMaxMusic3Transformer1DModel": Special(
        {"rotary_dim": 8}, (2, CHANNELS, 16), lambda: {"encoder_hidden_states": randn(2, 16, 16)}
    ),
    "StableAudio3DiTModel": Special(
        {"local_add_cond_dim": 5, "num_memory_tokens": 4},
        (2, CHANNELS, 16),
        lambda: {"global_hidden_states": randn(2, TEXT)},
    ),
    "StableAudioDiTModel": Special(
        shape=(2, CHANNELS, 16),
        inputs=lambda: {
            "global_hidden_states": randn(2, 1, TEXT),
            "rotary_embedding": (randn(17, HEAD_DIM // 2), randn(17, HEAD_DIM // 2)),
        },
    ),
    "StableAudioProjectionModel": Special(
        {"conditioning_dim": 16, "min_value": 0, "max_value": 8},
        (2, 5, TEXT),
        lambda: {"start_seconds": tensor([0.0, 1.0]), "end_seconds": tensor([4.0, 5.0])},
    ),
    "T5FilmDecoder": Special(
        {"input_dims": 8, "targets_length": 16},
        inputs=lambda: {
            "encodings_and_masks": [(randn(2, 5, WIDTH), torch.ones(2, 5))],
            "decoder_input_tokens": randn(2, 16, 8),
            "decoder_noise_time": tensor([0.1, 0.7]),
        },
    ),
}
