"""Lightning, in one line for its `Trainer`:

    trainer = Trainer(..., callbacks=[GenCallback()])

and in three for Fabric:

    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters())
    model, optimizer = fabric.setup(model, optimizer)
    scheduler = FabricGen(gen.AutoGen(optimizer.optimizer, model, criterion))

    for x, y in loader:
        optimizer.zero_grad()
        fabric.backward(criterion(model(x), y))
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        scheduler.step(x, y)
        optimizer.step()
    fabric.save("checkpoint.ckpt", {"model": model, "optimizer": optimizer, "scheduler": scheduler})
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gen_dist.direction import as_gen_optimizer
from gen_dist.integrations.at_step import RateAtStep, SchedulerFactory, unwrapped
from gen_dist.integrations.averages import RateAndAverages
from gen_dist.integrations.horizon import with_horizon
from gen_dist.line import batches_of
from gen_dist.scheduler import GenScheduler

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError("gen_dist.integrations.lightning needs Lightning: pip install lightning") from error

__all__ = ["FabricGen", "GenCallback"]


class FabricGen(RateAtStep):
    """A `GenScheduler` for a loop with Fabric: gradients are unscaled when it looks at them.

    Call `step` before `optimizer.step()`, as you would that of the scheduler itself; the rate is set in
    `optimizer.step()`. It goes into `fabric.save` and `fabric.load` as model and optimizer do.

    Args:
        scheduler: made with the model that `fabric.setup` returned, and with `optimizer.optimizer`, the `GenOptimizer`
            inside the one that it returned.
    """

    def step(
        self,
        x: Any = None,
        y: Any = None,
        *,
        closure: Callable[[], Tensor] | None = None,
        batches: Sequence[Any] | None = None,
    ) -> None:
        """The batch of this step: one, or with accumulation the list of all its micro-batches."""
        self.batches = list(batches_of(x, y, closure, batches))


class GenCallback(Callback):
    """Makes a Lightning `Trainer` set its learning rate by a `GenScheduler`; `configure_optimizers` returns no other.

    For automatic optimization with one optimizer. The callback calls `training_step` again to get the loss; it discards
    what `training_step` logs then, and updates of torchmetrics. Accumulation, clipping, precision and checkpoints stay
    the Trainer's.

    Where the scheduler averages weights, as `AutoGen` does, the averaged weights are the result. Validation within
    `fit` and the `state_dict` of checkpoints take them, so the best checkpoint has the weights that were validated, and
    at the end they stay in the module. A resumed run goes on with the weights in training.

    Args:
        scheduler: `gen_dist.ExactGen`, or `functools.partial(gen_dist.AutoGen, update_every=4)`; by default `AutoGen`.
            It gets the Trainer's number of steps, if that is known, as its `total_steps`, if it takes that and does not
            have it.
    """

    def __init__(self, scheduler: SchedulerFactory | None = None) -> None:
        self._given = scheduler
        self._rate = RateAndAverages()
        self._stage = ""
        self._validation = contextlib.ExitStack()

    @property
    def scheduler(self) -> GenScheduler:
        """The scheduler that sets the rates. Raises `RuntimeError` before training has started."""
        return self._rate.scheduler

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stage = stage
        if stage == "fit":
            self._rate = RateAndAverages()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _check(trainer, pl_module)
        steps = trainer.estimated_stepping_batches
        make = with_horizon(self._given, int(steps) if math.isfinite(steps) else None)
        optimizer = as_gen_optimizer(unwrapped(trainer.optimizers[0]))
        assert trainer.strategy.model is not None
        self._rate.attach(make(optimizer, trainer.strategy.model))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:  # what is left is of a step that the scaler left out
            self._rate.batches.clear()
        self._rate.batches.append(partial(_loss, trainer, pl_module, batch, batch_idx))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rate.end()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation.enter_context(self._rate.result_in_place())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation.close()  # before a checkpoint is saved: callbacks that save are the last ones

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        with torch.set_grad_enabled(torch.is_grad_enabled()):  # it was off when validation began
            self._validation.close()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._rate.averages is not None:
            with self._rate.result_in_place():
                averages = trainer.strategy.lightning_module_state_dict()
                checkpoint["state_dict"] = {name: _copied(value) for name, value in averages.items()}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._validation.close()
        self._rate.detach()

    def state_dict(self) -> dict[str, Any]:
        return self._rate.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._stage == "fit":  # not where the best model is loaded, to test it
            self._rate.load_state_dict(state_dict)


def _check(trainer: Trainer, module: LightningModule) -> None:
    if not module.automatic_optimization or len(trainer.optimizers) != 1:
        raise ValueError(
            "GenCallback is for automatic optimization with one optimizer: with several, or in manual optimization, "
            "make a gen_dist.ExactGen yourself and call its step(closure=...) before optimizer.step()"
        )
    if trainer.lr_scheduler_configs:
        raise ValueError("configure_optimizers returns a learning rate scheduler, which GenCallback takes the place of")


def _loss(trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> Tensor:
    takes = len(inspect.signature(module.training_step).parameters)  # the index may be left out
    with _unrecorded(module):
        output: Any = trainer.strategy.training_step(*(batch, batch_idx)[:takes])
    return output["loss"] if isinstance(output, Mapping) else output


@contextlib.contextmanager
def _unrecorded(module: LightningModule) -> Iterator[None]:
    """Neither logs nor metrics notice that the training step runs."""
    metrics = [(each, name) for each in module.modules() if isinstance(each, Metric) for name in ("forward", "update")]
    silenced = [(module, "log"), (module, "log_dict"), *metrics]
    own = [vars(owner).get(name) for owner, name in silenced]
    for owner, name in silenced:
        vars(owner)[name] = _nothing
    try:
        yield
    finally:
        for (owner, name), usual in zip(silenced, own, strict=True):
            if usual is None:
                del vars(owner)[name]
            else:
                vars(owner)[name] = usual


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _nothing(*_: Any, **__: Any) -> None:
    return None
