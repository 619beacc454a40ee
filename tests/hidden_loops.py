"""Loops of trainers that hide `optimizer.step()`, as users write them, and the plain loop that they must equal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torchvision_for_cpus  # noqa: F401 - before timm is imported
from problems import criterion, data, new_model, parallel
from torch import Tensor, nn

import gen_dist as gen

STEPS = 5
ADAMW: dict[str, float] = {"lr": 1e-3, "weight_decay": 0.1}
Reports = list[Any]


class Recorded(gen.ExactGen):
    """Remembers what each update saw."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, lr_max=0.3, **kwargs)
        self.seen: Reports = []

    def step(self, *args: Any, **kwargs: Any) -> None:
        super().step(*args, **kwargs)
        self.seen.append(self.last)


class Training:
    """A model, an optimizer and the micro-batches of this rank."""

    def __init__(self, kind: str = "replica", accumulate: int = 1, **scheduler: Any) -> None:
        self.model: nn.Module = parallel(new_model(), kind)
        self.optimizer = gen.make_gen_optimizer(torch.optim.AdamW, self.model.parameters(), **ADAMW)
        self.scheduler = Recorded(self.optimizer, self.model, **scheduler)
        self.accumulate = accumulate
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.batches = data(STEPS * accumulate * ranks, batch=4)[rank::ranks]

    @property
    def groups(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        for first in range(0, len(self.batches), self.accumulate):
            yield self.batches[first : first + self.accumulate]


def plain(kind: str = "replica", accumulate: int = 1, bfloat16: bool = False) -> Reports:
    """`scheduler.step` in the loop."""
    training = Training(kind, accumulate, criterion=criterion)
    autocast = torch.autocast("cpu", torch.bfloat16) if bfloat16 else nullcontext()
    for group in training.groups:
        training.optimizer.zero_grad()
        for x, y in group:
            with autocast:
                loss = criterion(training.model(x), y) / accumulate
            loss.backward()
        with autocast:
            training.scheduler.step(batches=group)
        training.optimizer.step()
    return training.scheduler.seen


# ------------------------------------------------------------------------------------------------- ignite


def ignite_by_its_criterion(kind: str = "replica", accumulate: int = 1, as_module: bool = False) -> Reports:
    from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer
    from ignite.metrics import Loss

    class Criterion(nn.Module):
        def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
            return criterion(logits, targets)

    training = Training(kind, accumulate)
    rate = gen.RateAtStep(training.scheduler)
    collected = rate.collect_from(Criterion() if as_module else criterion)
    trainer = create_supervised_trainer(
        training.model, training.optimizer, collected, gradient_accumulation_steps=accumulate
    )
    evaluator = create_supervised_evaluator(training.model, metrics={"loss": Loss(collected)})

    @trainer.on(Events.ITERATION_COMPLETED)
    def validate() -> None:
        evaluator.run(training.batches[:1])
        collected(training.model(training.batches[0][0]), training.batches[0][1])  # with gradients enabled

    trainer.run(training.batches, max_epochs=1)
    return training.scheduler.seen


def ignite_by_its_events(kind: str = "replica", accumulate: int = 1) -> Reports:
    from ignite.engine import Engine, Events, create_supervised_trainer

    training = Training(kind, accumulate, criterion=criterion)
    rate = gen.RateAtStep(training.scheduler)
    trainer = create_supervised_trainer(
        training.model, training.optimizer, criterion, gradient_accumulation_steps=accumulate
    )

    @trainer.on(Events.ITERATION_STARTED)
    def collect(engine: Engine) -> None:
        rate.collect(engine.state.batch)

    trainer.run(training.batches, max_epochs=1)
    return training.scheduler.seen


# ------------------------------------------------------------------------------- timm's NativeScaler


def timm_loop(training: Training, loss_of: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The loop of timm's `train.py`, with its scaler."""
    from timm.utils import NativeScaler

    scaler = NativeScaler(device="cpu")
    for index, (x, y) in enumerate(training.batches):
        loss = loss_of(x, y) / training.accumulate
        update = (index + 1) % training.accumulate == 0
        scaler(
            loss,
            training.optimizer,
            clip_grad=100.0,
            parameters=training.model.parameters(),
            need_update=update,
        )
        if update:
            training.optimizer.zero_grad()


def timm_by_its_criterion(kind: str = "replica", accumulate: int = 1, bfloat16: bool = False) -> Reports:
    training = Training(kind, accumulate)
    collected = gen.RateAtStep(training.scheduler).collect_from(criterion)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            return collected(training.model(x), y)

    timm_loop(training, loss_of)
    return training.scheduler.seen


def timm_by_hand(kind: str = "replica", accumulate: int = 1) -> Reports:
    training = Training(kind, accumulate, compute_loss=lambda model, batch: criterion(model(batch["x"]), batch["y"]))
    rate = gen.RateAtStep(training.scheduler)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        rate.collect({"x": x, "y": y})
        return criterion(training.model(x), y)

    timm_loop(training, loss_of)
    return training.scheduler.seen


# ------------------------------------------------------------------------------------------------- skorch


def skorch_by_its_callback() -> Reports:
    from skorch import NeuralNet
    from skorch.callbacks import Callback

    schedulers: list[Recorded] = []

    class SetRate(Callback):  # type: ignore[misc]
        def on_train_begin(self, net: Any, **_: Any) -> None:
            def compute_loss(model: nn.Module, batch: Any) -> Tensor:
                x, y = batch
                return net.get_loss(net.infer(x), y, X=x, training=True)  # type: ignore[no-any-return]

            optimizer = gen.as_gen_optimizer(net.optimizer_)
            schedulers.append(Recorded(optimizer, net.module_, compute_loss=compute_loss))
            self.rate = gen.RateAtStep(schedulers[0])

        def on_batch_begin(self, net: Any, batch: Any = None, training: bool = False, **_: Any) -> None:
            if training:
                self.rate.collect(batch)

    fit_with_skorch(NeuralNet, callbacks=[SetRate()])
    return schedulers[0].seen


def skorch_by_its_criterion() -> Reports:
    from skorch import NeuralNet

    schedulers: list[Recorded] = []

    class Net(NeuralNet):  # type: ignore[misc]
        def on_train_begin(self, net: Any, **more: Any) -> None:
            super().on_train_begin(net, **more)
            schedulers.append(Recorded(gen.as_gen_optimizer(self.optimizer_), self.module_))
            gen.RateAtStep(schedulers[0]).collect_from(self.criterion_)

    fit_with_skorch(Net, callbacks=[])
    return schedulers[0].seen


def fit_with_skorch(make: Any, callbacks: list[Any]) -> None:
    from skorch.helper import predefined_split
    from torch.utils.data import TensorDataset

    class TokenCrossEntropy(nn.CrossEntropyLoss):
        def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
            return super().forward(logits.flatten(0, -2), targets.flatten())

    x, y = (torch.cat(part) for part in zip(*data(STEPS, batch=4), strict=True))
    net = make(
        new_model(),
        TokenCrossEntropy,
        optimizer=torch.optim.AdamW,
        **{f"optimizer__{name}": value for name, value in ADAMW.items()},
        max_epochs=1,
        batch_size=4,
        train_split=predefined_split(TensorDataset(x[:4], y[:4])),
        callbacks=callbacks,
        verbose=0,
    )
    net.fit(TensorDataset(x, y), None)


# ------------------------------------------------------------------------------------------------- fastai


def fastai_by_its_criterion() -> Reports:
    from functools import partial

    from fastai.callback.progress import ProgressCallback
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner, Recorder
    from fastai.optimizer import OptimWrapper
    from torch.utils.data import TensorDataset

    x, y = (torch.cat(part) for part in zip(*data(STEPS, batch=4), strict=True))
    loaders = DataLoaders(
        DataLoader(TensorDataset(x, y), bs=4, num_workers=0), DataLoader(TensorDataset(x, y), bs=4, num_workers=0)
    )
    make = partial(OptimWrapper, opt=partial(gen.make_gen_optimizer, torch.optim.AdamW))
    learner = Learner(loaders, new_model(), criterion, opt_func=make, lr=ADAMW["lr"], wd=ADAMW["weight_decay"])
    learner.create_opt()
    scheduler = Recorded(learner.opt.opt, learner.model)
    learner.loss_func = gen.RateAtStep(scheduler).collect_from(criterion)
    learner.remove_cbs([ProgressCallback, Recorder])  # which keeps losses in float32
    learner.fit(1)
    return scheduler.seen
