"""TRL's trainers and PEFT, each with the mixin before the trainer's class, on a small model and words of our own."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import gen_dist as gen

PACKAGES = ("trl", "peft", "datasets", "transformers")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}: pip install -e '.[tests]'"),
    pytest.mark.filterwarnings("ignore"),
]

WORDS = "the cat dog sat ran on a mat fast slow and then it was good bad".split()
STEPS = 3
Metrics = list[dict[str, float]]


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def language_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS) + 3, pad_token_id=0, eos_token_id=1, **sizes))


def sentences(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(4, 8))) for _ in range(count)]


def dataset(**columns: list[str]) -> Any:
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    return Dataset.from_dict(columns)


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def arguments(output: Path | str, accumulate: int) -> dict[str, Any]:
    return {
        "output_dir": str(output),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 4 // accumulate,
        "gradient_accumulation_steps": accumulate,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 5,
    }


def mixed(trainer: type, with_gen: bool) -> type:
    from gen_dist.integrations.transformers import GenMixin

    return type("Mixed", (GenMixin, trainer), {}) if with_gen else trainer


def sft(output: Path | str, with_gen: bool, accumulate: int = 1, **options: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    return mixed(SFTTrainer, with_gen)(
        model=language_model(),
        args=SFTConfig(**arguments(output, accumulate)),
        train_dataset=dataset(text=sentences(16, 0)),
        processing_class=tokenizer(),
        **options,
    )


def sft_with_lora(output: Path | str, with_gen: bool, accumulate: int = 1) -> Any:
    return sft(output, with_gen, accumulate, peft_config=lora())


def dpo(output: Path | str, with_gen: bool, accumulate: int = 1) -> Any:
    return preferences(output, with_gen, accumulate, ref_model=language_model())


def dpo_with_lora(output: Path | str, with_gen: bool, accumulate: int = 1) -> Any:
    return preferences(output, with_gen, accumulate, peft_config=lora())


def preferences(output: Path | str, with_gen: bool, accumulate: int, **options: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    return mixed(DPOTrainer, with_gen)(
        model=language_model(),
        args=DPOConfig(**arguments(output, accumulate)),
        train_dataset=dataset(prompt=sentences(16, 0), chosen=sentences(16, 1), rejected=sentences(16, 2)),
        processing_class=tokenizer(),
        **options,
    )


def grpo(output: Path | str, with_gen: bool, accumulate: int = 1, **sizes: int) -> Any:
    """Its default loss is constant in value: it holds the probabilities against themselves, behind `detach`."""
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions: list[str], **_: Any) -> list[float]:
        rewarded.append(list(completions))
        return [float(len(set(completion.split()))) for completion in completions]

    rewarded: list[list[str]] = []
    sizes |= {"num_generations": 2, "max_completion_length": 6}
    trainer = mixed(GRPOTrainer, with_gen)(
        model=language_model(),
        args=GRPOConfig(**arguments(output, accumulate), **sizes),
        train_dataset=dataset(prompt=sentences(16, 0)),
        reward_funcs=reward,
        processing_class=tokenizer(),
    )
    trainer.rewarded = rewarded
    return trainer


def grpo_off_policy(output: Path | str, with_gen: bool, accumulate: int = 1) -> Any:
    """It holds the probabilities against those of the weights that generated."""
    return grpo(output, with_gen, accumulate, num_iterations=2)


TRAINERS = {each.__name__: each for each in (sft, sft_with_lora, dpo, dpo_with_lora, grpo, grpo_off_policy)}


def trained(name: str, output: Path | str, with_gen: bool, accumulate: int = 1) -> tuple[Any, Metrics]:
    trainer = TRAINERS[name](output, with_gen, accumulate)
    trainer.train()
    return trainer, [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", TRAINERS)
def test_the_default_scheduler_trains(
    name: str, accumulate: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Their losses are custom functions, so they are measured by forward passes: the rate grows from its start."""
    trainer, logged = trained(name, tmp_path, True, accumulate)
    _, plain = trained(name, tmp_path, False, accumulate)
    scheduler: gen.AutoGen = trainer.lr_scheduler.scheduler
    assert len(logged) == STEPS
    assert scheduler.average is not None
    assert scheduler.average.count == STEPS, "the horizon"
    rates = [entry["learning_rate"] for entry in logged]
    if name == "grpo":  # what finite differences see is another function than the one trained
        assert rates == [trainer.args.learning_rate] * STEPS
        assert "Updates are declined" in caplog.text
    else:
        assert 0 < rates[0] < rates[1] < rates[2]
    assert logged[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_measurement_leaves_no_trace_in_the_metrics(name: str, tmp_path: Path) -> None:
    trainer, logged = trained(name, tmp_path, True)
    twin, plain = trained(name, tmp_path, False)
    timed = {"learning_rate", "step_time", "epoch"}
    assert logged[0].keys() == plain[0].keys()
    for key in logged[0].keys() - timed:
        assert logged[0][key] == pytest.approx(plain[0][key], rel=1e-4, abs=1e-6), key
    if not name.startswith("grpo"):
        assert [entry["num_tokens"] for entry in logged] == [entry["num_tokens"] for entry in plain]
    else:
        assert trainer.rewarded[0] == twin.rewarded[0]
        assert len(trainer.rewarded) == len(twin.rewarded), "nothing is generated for a measurement"
