"""TRL's trainers and PEFT, each with the mixin before the trainer's class, on a small model and words of our own."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from integration_trainers import launched, ranks
from rank_pool import Pool
from torch import Tensor

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
        "per_device_train_batch_size": 4 // (accumulate * ranks()),
        "ddp_backend": "gloo" if ranks() > 1 else None,
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


CASES = [
    ("sft", 1),
    ("sft", 2),
    ("sft_with_lora", 1),
    ("dpo", 1),
    ("dpo_with_lora", 2),
    ("grpo", 1),
    ("grpo_off_policy", 2),
]


@pytest.mark.parametrize(("name", "accumulate"), CASES)
def test_the_default_scheduler_trains_and_leaves_no_trace_in_the_metrics(
    name: str, accumulate: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Their losses are custom functions, which jets follow; that of GRPO is constant in value, and only jets can."""
    trainer, logged = trained(name, tmp_path, True, accumulate)
    twin, plain = trained(name, tmp_path, False, accumulate)
    scheduler: gen.AutoGen = trainer.lr_scheduler.scheduler
    assert scheduler.average is not None
    assert scheduler.average.count == STEPS
    rates = [entry["learning_rate"] for entry in logged]
    assert 0 < rates[0] < rates[1] < rates[2]
    assert "declined" not in caplog.text

    assert [entry.keys() for entry in logged] == [entry.keys() for entry in plain]
    for key in logged[0].keys() - {"learning_rate", "step_time"}:  # before the first step all is the same
        assert logged[0][key] == pytest.approx(plain[0][key], rel=1e-5, abs=1e-7), key
    if name.startswith("grpo"):
        assert trainer.rewarded[0] == twin.rewarded[0]
        assert len(trainer.rewarded) == len(twin.rewarded), "nothing is generated for a measurement"
    else:
        assert [entry["num_tokens"] for entry in logged] == [entry["num_tokens"] for entry in plain]


def test_checkpoints_of_an_adapter_have_the_averaged_weights(tmp_path: Path) -> None:
    """And the run goes on with those in training, bit for bit."""
    from safetensors.torch import load_file
    from transformers import TrainerCallback

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            averages[state.global_step] = kwargs["lr_scheduler"].scheduler.averaged_state_dict()

    def trainer_that_saves() -> Any:
        without_horizon = partial(gen.AutoGen, total_steps=None)
        trainer = sft(tmp_path, True, peft_config=lora(), scheduler=without_horizon, callbacks=[Look()])
        trainer.args.save_strategy, trainer.args.save_steps = "steps", 2
        return trainer

    averages: dict[int, dict[str, Tensor]] = {}
    whole = trainer_that_saves()
    whole.train()
    saved = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert saved
    for name, value in saved.items():
        assert torch.equal(value, averages[2][name.replace(".weight", ".default.weight")])
    resumed = trainer_that_saves()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def sft_on_ranks(folder: str) -> tuple[list[float], dict[str, float]]:
    """The rates, and what is logged at the first step."""
    with launched():
        _, logged = trained("sft", folder, True)
        return [entry["learning_rate"] for entry in logged], logged[0]


def test_two_ranks_set_the_rates_of_one(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    """Their loss gathers metrics over the ranks while it is measured."""
    one, two = pool(2).run(sft_on_ranks, str(tmp_path))
    assert one == two
    _, logged = trained("sft", tmp_path, True)
    assert one[0] == pytest.approx([entry["learning_rate"] for entry in logged], rel=1e-3)
    assert one[1]["num_tokens"] == logged[0]["num_tokens"]
