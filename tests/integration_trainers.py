"""The plain loop, and for each trainer a training script as its users write it, on the same data."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from problems import BATCH, Model, criterion, data
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset

import gen_dist as gen

STEPS = 6
CLIP = 0.3
ADAMW: dict[str, float] = {"lr": 1e-3, "weight_decay": 0.0}
Rates = list[float]


class Setting(NamedTuple):
    """How to train: with `accumulate` micro-batches for each step, and from a checkpoint or up to one."""

    accumulate: int = 1
    bfloat16: bool = False
    directory: str = ""
    steps: int = STEPS
    resume: bool = False
    default: bool = False  # the scheduler that the integration makes by itself


class Recorded(gen.ExactGen):
    """Remembers the rate of every step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, lr_max=0.3, **kwargs)
        self.rates: Rates = []

    def step(self, *args: Any, **kwargs: Any) -> None:
        super().step(*args, **kwargs)
        assert self.last is not None
        assert self.last.accepted, self.last.reason
        self.rates.append(self.last.lr)


def plain(bfloat16: bool = False) -> Rates:
    """The rates of the plain loop in one process on whole batches, which every trainer must reproduce."""
    model = model_of(bfloat16)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            return criterion(model(x), y)

    return plain_loop(model, loss)


def plain_loop(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> Rates:
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), **ADAMW)
    scheduler = Recorded(optimizer, model)
    for x, y in data()[:STEPS]:
        optimizer.zero_grad()
        loss(x, y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        scheduler.step(closure=lambda x=x, y=y: loss(x, y))
        optimizer.step()
    return scheduler.rates


def model_of(bfloat16: bool) -> nn.Module:
    torch.manual_seed(1)
    model = Model(tied=False)  # tied weights are refused by safetensors
    return model if bfloat16 else model.double()


def dataset() -> TensorDataset:
    batches = data()[:STEPS]
    return TensorDataset(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))


def loader(setting: Setting) -> DataLoader:
    """The batches of `data()`, cut into the pieces that ranks and accumulation need."""
    return DataLoader(dataset(), batch_size=BATCH // (ranks() * setting.accumulate))


class Shard:
    """This rank's batches, in order; after a checkpoint only those that remain."""

    def __init__(self, setting: Setting) -> None:
        self.batches = list(loader(setting))
        self.batches = self.batches[dist.get_rank() :: ranks()] if ranks() > 1 else self.batches
        self.first = self.taken = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        first, self.first = self.first, 0
        for i in range(first, len(self)):
            self.taken = i + 1
            yield self.batches[i]

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.first = state_dict["taken"]


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def launched() -> Iterator[None]:
    """Set the environment variables of torchrun, which trainers read."""
    before, dtype = dict(os.environ), torch.get_default_dtype()
    if ranks() > 1:
        os.environ.update(
            MASTER_ADDR="localhost",
            MASTER_PORT="0",
            GROUP_RANK="0",
            LOCAL_WORLD_SIZE=str(ranks()),
            TORCHELASTIC_RUN_ID="0",
        )
    else:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        os.environ.clear()
        os.environ.update(before)


# --------------------------------------------------------------------------------------------- Accelerate


def accelerate_by_hand(setting: Setting) -> Rates:
    """Accumulation without `accelerator.accumulate`, and batches that are dicts, as for models of transformers."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    from gen_dist.integrations.accelerate import AcceleratedGen

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model_of(setting.bfloat16)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": criterion(self.inner(x), labels)}

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator, model = Accelerator(cpu=True), Model()
    optimizer: Any = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), **ADAMW)
    model, optimizer, batches = accelerator.prepare(model, optimizer, loader(setting))
    scheduler = AcceleratedGen(accelerator, Recorded(optimizer.optimizer, model))
    for count, (x, y) in enumerate(batches, start=1):
        batch = {"x": x, "labels": y}
        accelerator.backward(model(**batch)["loss"] / setting.accumulate)
        scheduler.step(batch)
        if count % setting.accumulate == 0:
            accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    return scheduler.scheduler.rates  # type: ignore[attr-defined]


def accelerate(setting: Setting) -> Rates:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    from gen_dist.integrations.accelerate import AcceleratedGen

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=setting.accumulate,
        mixed_precision="bf16" if setting.bfloat16 else "no",
    )
    model: Any = model_of(setting.bfloat16)
    optimizer: Any = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), **ADAMW)
    model, optimizer, batches = accelerator.prepare(model, optimizer, loader(setting))
    scheduler = AcceleratedGen(accelerator, Recorded(optimizer.optimizer, model, criterion))
    done = 0
    if setting.resume:
        accelerator.load_state(setting.directory)
        done = scheduler.scheduler.last_epoch
        batches = accelerator.skip_first_batches(batches, done * setting.accumulate)
    for x, y in batches:
        with accelerator.accumulate(model):
            accelerator.backward(criterion(model(x), y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            scheduler.step(x, y)
            optimizer.step()
            optimizer.zero_grad()
        done += accelerator.sync_gradients
        if done == setting.steps:
            break
    if setting.directory and not setting.resume:
        accelerator.save_state(setting.directory)
    return scheduler.scheduler.rates  # type: ignore[attr-defined]


# --------------------------------------------------------------------------------------------- Lightning


def fabric(setting: Setting) -> Rates:
    from lightning.fabric import Fabric

    from gen_dist.integrations.lightning import FabricGen

    fabric = Fabric(
        accelerator="cpu",
        devices=ranks(),
        strategy="ddp" if ranks() > 1 else "auto",
        precision="bf16-mixed" if setting.bfloat16 else "64-true",
    )
    fabric.launch()
    model: Any = model_of(setting.bfloat16)
    optimizer: Any = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), **ADAMW)
    model, optimizer = fabric.setup(model, optimizer)
    torch.set_default_dtype(torch.float32 if setting.bfloat16 else torch.float64)  # of a model's output in Fabric
    scheduler = FabricGen(Recorded(optimizer.optimizer, model, criterion))
    batches = Shard(setting).batches
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    done = 0
    if setting.resume:
        fabric.load(Path(setting.directory) / "checkpoint.ckpt", state)
        done = scheduler.scheduler.last_epoch
    for step in range(done, setting.steps):
        micro = batches[step * setting.accumulate : (step + 1) * setting.accumulate]
        optimizer.zero_grad()
        for i, (x, y) in enumerate(micro):
            with fabric.no_backward_sync(model, enabled=i < len(micro) - 1):
                fabric.backward(criterion(model(x), y) / len(micro))
        fabric.clip_gradients(model, optimizer, max_norm=CLIP)
        scheduler.step(batches=micro)
        optimizer.step()
    if setting.directory and not setting.resume:
        fabric.save(Path(setting.directory) / "checkpoint.ckpt", state)
    return scheduler.scheduler.rates  # type: ignore[attr-defined]


def lightning(setting: Setting) -> Rates:
    import lightning as L
    from torchmetrics.classification import MulticlassAccuracy

    from gen_dist.integrations.lightning import GenCallback

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model_of(setting.bfloat16)
            self.accuracy = MulticlassAccuracy(11)

        def training_step(self, batch: Any) -> Tensor:
            x, y = batch
            logits = self.model(x)
            loss = criterion(logits, y)
            self.log("loss", loss)
            self.log("accuracy", self.accuracy(logits.flatten(0, 1), y.flatten()))
            return loss

        def on_train_batch_end(self, *_: Any) -> None:
            seen.extend(callback.scheduler.get_last_lr())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.model.parameters(), **ADAMW)

    callback = GenCallback(None if setting.default else Recorded)
    seen: Rates = []
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks(),
        strategy="ddp" if ranks() > 1 else "auto",
        precision="bf16-mixed" if setting.bfloat16 else "64-true",
        max_steps=setting.steps,
        accumulate_grad_batches=setting.accumulate,
        gradient_clip_val=CLIP,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    checkpoint = Path(setting.directory) / "checkpoint.ckpt"
    module = Module()
    trainer.fit(module, Shard(setting), ckpt_path=checkpoint if setting.resume else None)
    assert module.accuracy.update_count <= STEPS * setting.accumulate, "the metric must count each batch once"
    if setting.directory and not setting.resume:
        trainer.save_checkpoint(checkpoint)
    if setting.default:
        assert_ended_in_the_average(callback.scheduler)
    return callback.scheduler.rates if not setting.default else seen  # type: ignore[attr-defined]


# --------------------------------------------------------------------------------------------- transformers


def transformers(setting: Setting) -> Rates:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model_of(setting.bfloat16)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.inner(x)
            return {"loss": criterion(logits, labels), "logits": logits}

    return hugging_face(Model(), setting)


def language_model(setting: Setting) -> Rates:
    """A model of transformers, whose loss divides by the number of tokens in the whole step."""
    return hugging_face(new_language_model(), setting)


def new_language_model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes)).double()


def plain_language_model() -> Rates:
    model = new_language_model()
    return plain_loop(
        model, lambda x, y: F.cross_entropy(model(input_ids=x).logits[:, :-1].flatten(0, 1), y[:, 1:].flatten())
    )


def hugging_face(model: nn.Module, setting: Setting) -> Rates:
    from accelerate.state import AcceleratorState, GradientState
    from transformers import TrainerCallback, TrainingArguments

    from gen_dist.integrations.transformers import GenTrainer

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    name = "input_ids" if hasattr(model, "config") else "x"
    arguments = TrainingArguments(
        output_dir=setting.directory or "unused",
        use_cpu=True,
        bf16=setting.bfloat16,
        per_device_train_batch_size=BATCH // (ranks() * setting.accumulate),
        gradient_accumulation_steps=setting.accumulate,
        max_grad_norm=CLIP,
        learning_rate=ADAMW["lr"],
        max_steps=setting.steps,
        save_strategy="steps" if setting.directory else "no",
        save_steps=setting.steps,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        ddp_backend="gloo" if ranks() > 1 else None,
    )

    class InOrder(GenTrainer):
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    class Seen(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            seen.extend(trainer.lr_scheduler.get_last_lr()[:1])

    seen: Rates = []
    trainer = InOrder(
        callbacks=[Seen()],
        model=model,
        args=arguments,
        train_dataset=[{name: x, "labels": y} for x, y in dataset()],
        scheduler=None if setting.default else Recorded,
    )
    trainer.train(resume_from_checkpoint=setting.resume or None)
    if setting.default:
        assert_ended_in_the_average(trainer.lr_scheduler.scheduler)
    return seen


Told = list[tuple[int, float]]


def transformers_with_overflows(overflow: set[int], folder: str) -> tuple[Told, Told]:
    """Two epochs of five micro-batches, in steps of 2, 2 and 1, of which the gradient scaler leaves some out.

    Returns the number of micro-batches of each update and its loss, as the scheduler and as the plain model tell them.
    """
    from accelerate.state import AcceleratorState, GradientState
    from transformers import TrainerCallback, TrainingArguments

    from gen_dist.integrations.transformers import GenTrainer

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model_of(bfloat16=False)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": criterion(self.inner(x), labels)}

    class Telling(gen.ExactGen):
        def step(self, *args: Any, **given: Any) -> None:
            super().step(*args, **given)
            assert self.last is not None
            told.append((len(given["batches"]), self.last.loss))

    class Scaled(GenTrainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)

        def training_step(self, model: nn.Module, inputs: Any, *args: Any) -> Tensor:
            micro.append(inputs)
            return super().training_step(model, inputs, *args)

    class Overflows(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in overflow:
                model.inner.head.weight.grad.fill_(torch.inf)
            else:
                with torch.no_grad():
                    losses = [model(**inputs)["loss"] for inputs in micro]
                true.append((len(losses), torch.stack(losses).mean().item()))
            micro.clear()

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    told: Told = []
    true: Told = []
    micro: list[Any] = []
    model = Model()
    arguments = TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=2,
        max_grad_norm=0,
        num_train_epochs=2,
        optim="adamw_torch",  # the fused one is called also where the scaler found an overflow
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    samples: Any = [{"x": x, "labels": y} for x, y in dataset()][: 5 * BATCH]
    scheduler = partial(Telling, lr_max=1e-3)
    Scaled(model=model, args=arguments, train_dataset=samples, callbacks=[Overflows()], scheduler=scheduler).train()
    return told, true


# ----------------------------------------------------------------------------------------------- torchtitan


def torchtitan_container(setting: Setting) -> Rates:
    """The optimizer container of torchtitan in a minimal loop, checkpointed by torch.distributed.checkpoint."""
    from gen_dist.integrations.torchtitan import GenSchedulers

    model = sharded(model_of(False))
    optimizers = optimizers_container([model])
    schedulers = GenSchedulers(optimizers, [model], Recorded)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return token_loss(model(x), y, torch.tensor(5 * BATCH))[0]

    def train_step(micro: list[Any]) -> None:
        optimizers.zero_grad()
        for x, y in micro:
            loss(x, y).backward()
            schedulers.batches.append(lambda x=x, y=y: loss(x, y) * ranks() * len(micro))
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizers.step()
        schedulers.step()

    return train_with_checkpoints(setting, model, optimizers, schedulers, train_step)


class HeadApart(nn.Module):
    """The model without its last layer, which torchtitan's chunked loss applies to a few tokens at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model_of(False)
        self.lm_head, self.inner.head = self.inner.head, nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(tokens)


def torchtitan_chunked(setting: Setting) -> Rates:
    """With the loss of its own configurations, which calls `backward()` for each chunk."""
    from torchtitan.components.loss import ChunkedLossWrapper

    model = HeadApart()
    loss = ChunkedLossWrapper(ChunkedLossWrapper.Config(num_chunks=5), compile_config=SimpleNamespace(enable=False))
    loss.loss_fn = token_loss_without_metrics
    loss.set_lm_head(model.lm_head)
    return torchtitan(setting, model, loss)


def token_loss_without_metrics(*args: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return token_loss(*args)[0], {}


def torchtitan(setting: Setting, model: nn.Module | None = None, loss: Any = None) -> Rates:
    """The real `Trainer.train_step`, on a trainer without the parts that need a GPU."""
    from torchtitan.trainer import Trainer

    from gen_dist.integrations.torchtitan import GenMixin, GenSchedulers

    class GenTrainer(GenMixin, Trainer):
        def __init__(self, model: nn.Module) -> None:
            mesh = dist.init_device_mesh("cpu", (ranks(),)) if ranks() > 1 else None
            self.parallel_dims = SimpleNamespace(
                pp_enabled=False,
                cp_enabled=False,
                ep_enabled=False,
                dp_enabled=ranks() > 1,
                dp_replicate=1,
                dp_shard=ranks(),
                cp=1,
                get_mesh=lambda _: mesh,
                get_optional_mesh=lambda _: None,
            )
            self.config = SimpleNamespace(
                training=SimpleNamespace(disable_cuda_graphs=True, max_norm=CLIP),
                parallelism=SimpleNamespace(spmd_backend="default"),
            )
            self.metrics_processor = SimpleNamespace(should_log=lambda _: False)
            self.checkpointer = SimpleNamespace(maybe_wait_for_staging=lambda: None)
            self.gradient_accumulation_steps = setting.accumulate
            self.num_pipeline_parallel_microbatches = 1
            self.device, self.model_config = torch.device("cpu"), None
            self.step = self.ntokens_seen = 0
            self.train_context = contextlib.nullcontext
            self.fwd_bwd_fn = self._forward_backward_body
            self.loss_fn = loss or token_loss
            self.model_parts = [model]
            self.optimizers = optimizers_container([model])
            self.lr_schedulers = GenSchedulers(self.optimizers, self.model_parts, Recorded)

    trainer = GenTrainer(model or sharded(model_of(False)))

    def train_step(micro: list[Any]) -> None:
        trainer.train_step(({"input": x}, y) for x, y in micro)

    return train_with_checkpoints(
        setting, trainer.model_parts[0], trainer.optimizers, trainer.lr_schedulers, train_step
    )


def train_with_checkpoints(
    setting: Setting, model: nn.Module, optimizers: Any, schedulers: Any, train_step: Callable[[list[Any]], None]
) -> Rates:
    from torch.distributed.checkpoint import load, save

    batches = Shard(setting).batches
    state = {"model": model, "optimizer": optimizers, "lr_scheduler": schedulers}
    if setting.resume:
        load(state, checkpoint_id=setting.directory)
    for step in range(schedulers.scheduler.last_epoch, setting.steps):
        train_step(batches[step * setting.accumulate : (step + 1) * setting.accumulate])
    if setting.directory and not setting.resume:
        save(state, checkpoint_id=setting.directory)
    return schedulers.scheduler.rates


def assert_ended_in_the_average(scheduler: gen.GenScheduler) -> None:
    """At the last step of the horizon the weights become their average."""
    assert scheduler.average is not None
    assert scheduler.average.count == STEPS
    averages = scheduler.averaged_state_dict()
    assert all(torch.equal(value, averages[name]) for name, value in scheduler.model.state_dict().items())


def sharded(model: nn.Module) -> nn.Module:
    if ranks() > 1:
        for module in (*model.blocks, model):  # type: ignore[misc]
            fully_shard(module).set_gradient_divide_factor(1.0)  # as torchtitan does: losses are sums
    return model


def optimizers_container(model_parts: list[nn.Module]) -> Any:
    from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

    groups = [("AdamW", r"\.bias$"), ("Adam", r"expand"), ("AdamW", r".*")]
    config = OptimizersContainer.Config(
        param_groups=[ParamGroupConfig(pattern=p, optimizer_name=name, optimizer_kwargs=ADAMW) for name, p in groups],
        implementation="foreach",
    )
    return config.build(model_parts=model_parts)


def token_loss(prediction: Tensor, labels: Tensor, global_valid_tokens: Tensor) -> tuple[Tensor, None]:
    loss = F.cross_entropy(prediction.flatten(0, 1), labels.flatten(), reduction="sum")
    return loss / global_valid_tokens, None
