"""Every kind of adapter of peft, on a small language model and on a small convolutional network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from zoo.case import Case, case

ON_LINEAR: dict[str, Callable[..., Any]] = {
    "LoRA": lambda at: peft.LoraConfig(target_modules=at, r=2, lora_dropout=0.1),
    "rsLoRA": lambda at: peft.LoraConfig(target_modules=at, r=2, use_rslora=True),
    "DoRA": lambda at: peft.LoraConfig(target_modules=at, r=2, use_dora=True),
    "PiSSA": lambda at: peft.LoraConfig(target_modules=at, r=2, init_lora_weights="pissa"),
    "OLoRA": lambda at: peft.LoraConfig(target_modules=at, r=2, init_lora_weights="olora"),
    "AdaLoRA": lambda at: peft.AdaLoraConfig(target_modules=at, init_r=4, target_r=2, total_step=10),
    "LoHa": lambda at: peft.LoHaConfig(target_modules=at, r=2),
    "LoKr": lambda at: peft.LoKrConfig(target_modules=at, r=2),
    "IA3": lambda at: peft.IA3Config(target_modules=at, feedforward_modules=[]),
    "OFT": lambda at: peft.OFTConfig(target_modules=at, r=0, oft_block_size=4),
    "BOFT": lambda at: peft.BOFTConfig(target_modules=at, boft_block_size=4),
    "VeRA": lambda at: peft.VeraConfig(target_modules=at, r=2),
    "VB-LoRA": lambda at: peft.VBLoRAConfig(target_modules=at, r=2, num_vectors=8, vector_length=4, topk=2),
    "FourierFT": lambda at: peft.FourierFTConfig(target_modules=at, n_frequency=5),
    "HRA": lambda at: peft.HRAConfig(target_modules=at, r=2),
    "LN tuning": lambda at: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "MiSS": lambda at: peft.MissConfig(target_modules=at, r=4),
    "RandLoRA": lambda at: peft.RandLoraConfig(target_modules=at, r=2),
    "SHiRA": lambda at: peft.ShiraConfig(target_modules=at, r=2),
    "C3A": lambda at: peft.C3AConfig(target_modules=at, block_size=4),
    "trainable tokens": lambda at: peft.TrainableTokensConfig(token_indices=[1, 2]),
    "RoAd": lambda at: peft.RoadConfig(target_modules=at, group_size=2),
    "DeLoRA": lambda at: peft.DeloraConfig(target_modules=at, r=2),
    "WaveFT": lambda at: peft.WaveFTConfig(target_modules=at, n_frequency=5),
    "GraLoRA": lambda at: peft.GraloraConfig(target_modules=at, r=4, gralora_k=2),
    "prompt tuning": lambda at: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda at: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix tuning": lambda at: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "adaption prompt": lambda at: peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_layers=1, adapter_len=3),
}
ON_CONV = ("LoRA", "DoRA", "LoHa", "LoKr", "IA3", "OFT", "HRA")


def names() -> list[str]:
    return [*ON_LINEAR, *(f"{name} conv" for name in ON_CONV)]


def build(name: str) -> Case:
    kind = name.removesuffix(" conv")
    if name.endswith(" conv"):
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))
        model, images = peft.get_peft_model(network, ON_LINEAR[kind](["2"])).double(), torch.randn(2, 3, 8, 8)
        return case(model, lambda: model(images))
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, use_cache=False,
    )  # fmt: skip
    model = peft.get_peft_model(LlamaForCausalLM(config), ON_LINEAR[name](["q_proj", "v_proj"])).double()
    tokens = torch.randint(3, 32, (2, 6))
    return case(model, lambda: model(input_ids=tokens, labels=tokens))
