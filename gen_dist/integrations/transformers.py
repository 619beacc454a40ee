"""Hugging Face transformers' `Trainer`, in one line of its usual script:

    trainer = GenTrainer(model=model, args=args, train_dataset=dataset)

For a trainer of another class, such as TRL's, put the mixin before it: `class MyTrainer(GenMixin, SFTTrainer): ...`
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from gen_dist.direction import as_gen_optimizer
from gen_dist.integrations.at_step import RateAtStep, SchedulerFactory, unwrapped
from gen_dist.recipes import AutoGen

try:
    from transformers import Trainer
except ImportError as error:
    raise ImportError(
        "gen_dist.integrations.transformers needs transformers: pip install 'transformers[torch]'"
    ) from error

if TYPE_CHECKING:
    Base = Trainer
else:
    Base = object

__all__ = ["GenMixin", "GenTrainer"]


class TrainerScheduler(RateAtStep):
    """What the `Trainer` steps, saves and loads as its `lr_scheduler`."""

    def step(self) -> None:
        """Do nothing: `optimizer.step()` has set the rate."""


class GenMixin(Base):
    """Makes a `Trainer` set its learning rate by a `GenScheduler`: accumulation, clipping, precision and checkpoints.

    Once training has started, `trainer.lr_scheduler.scheduler` is that scheduler. It ignores the training argument
    `lr_scheduler_type`, and keeps `learning_rate` until the first update.

    Args:
        scheduler: `gen_dist.ExactGen`, or `functools.partial(gen_dist.ExactGen, lr_max=0.1)`; by default `AutoGen` with
            the number of training steps as its horizon.
    """

    lr_scheduler: Any

    def __init__(self, *args: Any, scheduler: SchedulerFactory | None = None, **kwargs: Any) -> None:
        self._given = scheduler
        super().__init__(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)
        as_gen_optimizer(unwrapped(optimizer))
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if isinstance(self.lr_scheduler, RateAtStep):  # of a training run before this one
            self.lr_scheduler.detach()
        self._make = self._given or partial(AutoGen, total_steps=num_training_steps)
        self.lr_scheduler = TrainerScheduler()
        return self.lr_scheduler

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        rate: TrainerScheduler = self.lr_scheduler
        if not rate.attached:  # the model comes wrapped only now
            rate.attach(self._make(as_gen_optimizer(unwrapped(self.optimizer)), model))
        if len(rate.batches) == self.current_gradient_accumulation_steps:  # a step that the gradient scaler left out
            rate.batches.clear()
        rate.batches.append(lambda: self._loss(model, inputs, num_items_in_batch))
        return super().training_step(model, inputs, num_items_in_batch)

    def _loss(self, model: nn.Module, inputs: Any, num_items_in_batch: Any) -> Tensor:
        """The loss of a micro-batch, scaled so that the mean over a step's micro-batches is the loss trained on."""
        with self.compute_loss_context_manager():
            inputs = self._prepare_inputs(inputs)
            loss: Any = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        return loss * self.current_gradient_accumulation_steps if self._is_share(num_items_in_batch) else loss

    def _is_share(self, num_items_in_batch: Any) -> bool:
        """Whether the loss of a micro-batch is its share of the step's, as in `Trainer.training_step`."""
        if (told := getattr(self, "loss_is_scaled_for_ga", None)) is not None:
            return bool(told)
        accepts = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(accepts or self.compute_loss_func is not None)


class GenTrainer(GenMixin, Trainer):
    """`transformers.Trainer` whose learning rate is set by a `GenScheduler`; see `GenMixin`."""
