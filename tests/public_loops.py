"""Training loops as well-known scripts write them, with small random models and data, with and without gen_dist.

With it, a script's own schedule goes. What a loop has for gen_dist alone stands under `if with_gen`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchvision_for_cpus  # noqa: F401 - before a trainer is imported
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gen_dist as gen

EPOCHS = 2


class Run(NamedTuple):
    """What a loop saw: the loss of each micro-batch, an evaluation at the end, and the scheduler, if it was ours."""

    losses: list[float]
    evaluation: float
    scheduler: gen.GenScheduler | None = None


def images(count: int = 96, classes: int = 4, size: int = 16) -> TensorDataset:
    """Noisy images of their class: learnable in a few steps."""
    draw = torch.Generator().manual_seed(7)
    means = torch.randn(classes, 3, size, size, generator=draw)
    labels = torch.randint(classes, (count,), generator=draw)
    return TensorDataset(means[labels] + 0.5 * torch.randn(count, 3, size, size, generator=draw), labels)


# ------------------------------------------------------------------------------------------------- Accelerate


def accelerator(**settings: Any) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(cpu=True, **settings)


def nlp_example(with_gen: bool, epochs: int = EPOCHS, checkpoints: str = "", resume: str = "") -> Run:
    """Accelerate's `examples/complete_nlp_example.py`: batches are dicts, and the model returns its loss."""
    from transformers import BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup

    from gen_dist.integrations.accelerate import AcceleratedGen

    torch.manual_seed(1)
    lr, accelerate = 2e-3, accelerator()
    draw = torch.Generator().manual_seed(3)
    tokens = torch.randint(4, 40, (384, 8), generator=draw)
    entries = [{"input_ids": t, "attention_mask": torch.ones_like(t), "labels": (t[0] > 21).long()} for t in tokens]
    train_dataloader = DataLoader(entries[:256], batch_size=16)
    eval_dataloader = DataLoader(entries[256:], batch_size=32)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model: Any = BertForSequenceClassification(BertConfig(vocab_size=40, num_labels=2, **sizes))
    scheduler: Any
    if with_gen:
        optimizer: Any = gen.make_gen_optimizer(torch.optim.AdamW, params=model.parameters(), lr=lr)
        model, optimizer, train_dataloader, eval_dataloader = accelerate.prepare(
            model, optimizer, train_dataloader, eval_dataloader
        )
        scheduler = AcceleratedGen(accelerate, gen.AutoGen(optimizer.optimizer, model))
    else:
        optimizer = torch.optim.AdamW(params=model.parameters(), lr=lr)
        scheduler = get_linear_schedule_with_warmup(optimizer, 0, len(train_dataloader) * epochs)
        model, optimizer, train_dataloader, eval_dataloader, scheduler = accelerate.prepare(
            model, optimizer, train_dataloader, eval_dataloader, scheduler
        )
    losses: list[float] = []
    if resume:
        accelerate.load_state(resume)
    for epoch in range(1 if resume else 0, epochs):
        model.train()
        for batch in train_dataloader:
            outputs = model(**batch)
            loss = outputs.loss
            losses.append(loss.item())
            accelerate.backward(loss)
            if with_gen:
                scheduler.step(closure=lambda batch=batch: model(**batch).loss)
            optimizer.step()
            if not with_gen:
                scheduler.step()
            optimizer.zero_grad()
        if checkpoints and epoch == 0:
            accelerate.save_state(checkpoints)

    def evaluate() -> float:
        model.eval()
        with torch.no_grad():
            return sum(model(**batch).loss.item() for batch in eval_dataloader) / len(eval_dataloader)

    return finished(losses, evaluate, scheduler.scheduler if with_gen else None)


# -------------------------------------------------------------------------------------------------- diffusers


def train_unconditional(with_gen: bool, epochs: int = EPOCHS, accumulate: int = 2) -> Run:
    """diffusers' `train_unconditional.py`: noise at random times, accumulation, clipping, and its own EMA."""
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    from gen_dist.integrations.accelerate import AcceleratedGen

    torch.manual_seed(1)
    accelerate = accelerator(gradient_accumulation_steps=accumulate)
    model: Any = UNet2DModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    ema_model = EMAModel(model.parameters(), decay=0.9, model_cls=UNet2DModel, model_config=model.config)
    noise_scheduler = DDPMScheduler(num_train_timesteps=100, beta_schedule="linear")
    train_dataloader: Any = DataLoader(images(64), batch_size=8)
    scheduler: Any
    if with_gen:
        optimizer: Any = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), lr=1e-3, weight_decay=1e-6)
        model, optimizer, train_dataloader = accelerate.prepare(model, optimizer, train_dataloader)
        scheduler = AcceleratedGen(accelerate, gen.AutoGen(optimizer.optimizer, model))
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-6)
        steps = len(train_dataloader) * epochs
        scheduler = get_scheduler("cosine", optimizer=optimizer, num_warmup_steps=4, num_training_steps=steps)
        model, optimizer, train_dataloader, scheduler = accelerate.prepare(
            model, optimizer, train_dataloader, scheduler
        )
    losses: list[float] = []
    for _ in range(epochs):
        model.train()
        for clean_images, _labels in train_dataloader:
            noise = torch.randn(clean_images.shape)
            timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(clean_images),)).long()
            noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)
            with accelerate.accumulate(model):
                model_output = model(noisy_images, timesteps).sample
                loss = F.mse_loss(model_output.float(), noise.float())
                losses.append(loss.item())
                accelerate.backward(loss)
                if accelerate.sync_gradients:
                    accelerate.clip_grad_norm_(model.parameters(), 1.0)
                if with_gen:
                    scheduler.step(
                        closure=lambda x=noisy_images, t=timesteps, y=noise: F.mse_loss(model(x, t).sample, y)
                    )
                optimizer.step()
                if not with_gen:
                    scheduler.step()
                optimizer.zero_grad()
            if accelerate.sync_gradients:
                ema_model.step(model.parameters())

    def evaluate() -> float:
        draw = torch.Generator().manual_seed(9)
        clean = images(64).tensors[0]
        noise = torch.randn(clean.shape, generator=draw)
        timesteps = torch.randint(0, 100, (len(clean),), generator=draw)
        with torch.no_grad():
            return F.mse_loss(model(noise_scheduler.add_noise(clean, noise, timesteps), timesteps).sample, noise).item()

    return finished(losses, evaluate, scheduler.scheduler if with_gen else None)


# ------------------------------------------------------------------------------------------------------- timm


def timm_train(with_gen: bool, epochs: int = EPOCHS, accumulate: int = 2) -> Run:
    """timm's `train.py`: its scaler steps the optimizer inside, its EMA, its schedule and its loss."""
    import timm
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.models import model_parameters
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import ModelEmaV3, NativeScaler

    from gen_dist.integrations.at_step import RateAtStep

    torch.manual_seed(1)
    model: Any = timm.create_model("test_convnext", num_classes=4, drop_path_rate=0.1)
    loader_train = DataLoader(images(size=32), batch_size=8)
    loader_eval = DataLoader(images(48, size=32), batch_size=16)
    optimizer: Any = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    loss_scaler = NativeScaler(device="cpu")
    model_ema = ModelEmaV3(model, decay=0.9)
    train_loss_fn = LabelSmoothingCrossEntropy(smoothing=0.1)
    updates_per_epoch = len(loader_train) // accumulate
    lr_scheduler, rate = None, None
    if with_gen:
        rate = RateAtStep(gen.AutoGen(gen.as_gen_optimizer(optimizer), model, train_loss_fn))
    else:
        lr_scheduler, _ = create_scheduler_v2(
            optimizer, sched="cosine", num_epochs=epochs, warmup_epochs=0, updates_per_epoch=updates_per_epoch
        )
    losses: list[float] = []
    num_updates = 0
    for epoch in range(epochs):
        model.train()
        optimizer.zero_grad()
        for batch_idx, (input, target) in enumerate(loader_train):
            need_update = (batch_idx + 1) % accumulate == 0
            output = model(input)
            loss = train_loss_fn(output, target)
            losses.append(loss.item())
            if rate is not None:
                rate.batches.append((input, target))
            loss_scaler(
                loss / accumulate,
                optimizer,
                clip_grad=5.0,
                clip_mode="norm",
                parameters=model_parameters(model, exclude_head=False),
                create_graph=False,
                need_update=need_update,
            )
            if need_update:
                optimizer.zero_grad()
                num_updates += 1
                model_ema.update(model, step=num_updates)
        if lr_scheduler is not None:
            lr_scheduler.step(epoch + 1)

    def evaluate() -> float:
        model.eval()
        with torch.no_grad():
            return sum(F.cross_entropy(model(x), y).item() for x, y in loader_eval) / len(loader_eval)

    return finished(losses, evaluate, rate.scheduler if rate is not None else None)


# -------------------------------------------------------------------------------------------------- Lightning


def lightning_autoencoder(with_gen: bool, epochs: int = EPOCHS) -> Run:
    """Lightning's `basics/autoencoder.py`: automatic optimization, with accumulation and clipping by the Trainer."""
    import lightning as L

    from gen_dist.integrations.lightning import GenCallback

    class LitAutoEncoder(L.LightningModule):
        def __init__(self, hidden_dim: int = 16, learning_rate: float = 1e-3) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.encoder = nn.Sequential(nn.Linear(3 * 16 * 16, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, 3))
            self.decoder = nn.Sequential(nn.Linear(3, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, 3 * 16 * 16))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = self._prepare_and_run(batch, "train")
            losses.append(loss.item()) if not measuring() else None
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self._prepare_and_run(batch, "val")

        def _prepare_and_run(self, batch: Any, stage: str) -> Tensor:
            x, _ = batch
            x = x.view(x.size(0), -1)
            loss = F.mse_loss(self.decoder(self.encoder(x)), x)
            self.log(f"{stage}_loss", loss, on_step=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=self.hparams.learning_rate)

    def measuring() -> bool:
        return "log" in vars(module)

    torch.manual_seed(1)
    losses: list[float] = []
    module = LitAutoEncoder()
    callback = GenCallback()
    trainer = lightning_trainer(
        epochs, callbacks=[callback] if with_gen else [], accumulate_grad_batches=2, gradient_clip_val=1.0
    )
    trainer.fit(module, DataLoader(images(), batch_size=8), DataLoader(images(16), batch_size=16))
    loss = trainer.validate(module, DataLoader(images(48), batch_size=48), verbose=False)[0]["val_loss_epoch"]
    return Run(losses, loss, callback.scheduler if with_gen else None)


def lightning_gan(with_gen: bool, epochs: int = EPOCHS) -> Run:
    """Lightning's `domain_templates/generative_adversarial_net.py`: manual optimization of two optimizers."""
    import lightning as L

    def adversarial(y_hat: Tensor, real: bool) -> Tensor:
        return F.binary_cross_entropy_with_logits(y_hat, torch.full_like(y_hat, float(real)))

    class GAN(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.generator = nn.Sequential(nn.Linear(4, 16), nn.LeakyReLU(0.2), nn.Linear(16, 3 * 16 * 16))
            self.discriminator = nn.Sequential(nn.Linear(3 * 16 * 16, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))

        def forward(self, z: Tensor) -> Tensor:
            return self.generator(z)

        def training_step(self, batch: Any) -> None:
            imgs = batch[0].flatten(1)
            opt_g, opt_d = self.optimizers()  # type: ignore[misc, attr-defined]
            z = torch.randn(imgs.shape[0], 4).type_as(imgs)

            def generator_loss() -> Tensor:
                return adversarial(self.discriminator(self(z)), True)

            def discriminator_loss() -> Tensor:
                real = adversarial(self.discriminator(imgs), True)
                return (real + adversarial(self.discriminator(self(z).detach()), False)) / 2

            for number, (opt, loss_of) in enumerate([(opt_g, generator_loss), (opt_d, discriminator_loss)]):
                self.toggle_optimizer(opt)
                loss = loss_of()
                losses.append(loss.item())
                self.log("loss", loss, prog_bar=True)
                self.manual_backward(loss)
                if with_gen:
                    self.schedulers[number].step(closure=loss_of)
                opt.step()
                opt.zero_grad()
                self.untoggle_optimizer(opt)

        def configure_optimizers(self) -> Any:
            opts = [torch.optim.Adam(part.parameters(), lr=2e-4) for part in (self.generator, self.discriminator)]
            if with_gen:
                parts = zip(opts, (self.generator, self.discriminator), strict=True)
                self.schedulers = [gen.AutoGen(gen.as_gen_optimizer(opt), part) for opt, part in parts]
            return opts, []

    torch.manual_seed(1)
    losses: list[float] = []
    module = GAN()
    lightning_trainer(epochs).fit(module, DataLoader(images(), batch_size=16))
    return Run(losses, losses[-1], module.schedulers[0] if with_gen else None)


def lightning_trainer(epochs: int, **options: Any) -> Any:
    import lightning as L

    return L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def finished(losses: list[float], evaluate: Callable[[], float], scheduler: gen.GenScheduler | None) -> Run:
    if scheduler is None:
        return Run(losses, evaluate())
    with scheduler.averaged():
        return Run(losses, evaluate(), scheduler)


PACKAGES: dict[Callable[..., Run], list[str]] = {
    nlp_example: ["accelerate", "transformers"],
    train_unconditional: ["accelerate", "diffusers"],
    timm_train: ["timm", "torchvision"],
    lightning_autoencoder: ["lightning"],
    lightning_gan: ["lightning"],
}


def missing(loop: Callable[..., Run]) -> list[str]:
    return [name for name in PACKAGES[loop] if importlib.util.find_spec(name) is None]


if __name__ == "__main__":  # the loss at the end, beside that of the script's own schedule
    for loop in PACKAGES:
        if absent := missing(loop):
            print(f"{loop.__name__:24} needs {' and '.join(absent)}")
            continue
        for epochs in (4, 16):
            own, ours = (loop(with_gen, epochs=epochs).evaluation for with_gen in (False, True))
            print(f"{loop.__name__:24} {epochs:2} epochs: own schedule {own:.4f}, AutoGen {ours:.4f}")
