"""Hugging Face transformers' `Trainer`, in one line of its usual script:

    trainer = GenTrainer(model=model, args=args, train_dataset=dataset)

For a trainer of another class, such as TRL's, put the mixin before it: `class MyTrainer(GenMixin, SFTTrainer): ...`
"""

from __future__ import annotations

from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from gen_dist.direction import as_gen_optimizer
from gen_dist.integrations.at_step import SchedulerFactory, unwrapped
from gen_dist.integrations.averages import RateAndAverages
from gen_dist.integrations.horizon import with_horizon
from gen_dist.integrations.records import records_kept

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise ImportError(
        "gen_dist.integrations.transformers needs transformers: pip install 'transformers[torch]'"
    ) from error

if TYPE_CHECKING:
    Base = Trainer
else:
    Base = object

__all__ = ["GenMixin", "GenTrainer"]


class TrainerScheduler(RateAndAverages):
    """What the `Trainer` steps, saves and loads as its `lr_scheduler`."""

    def step(self) -> None:
        """Do nothing: `optimizer.step()` has set the rate."""


class GenMixin(Base):
    """Makes a `Trainer` set its learning rate by a `GenScheduler`: accumulation, clipping, precision and checkpoints.

    Once training has started, `trainer.lr_scheduler.scheduler` is that scheduler. It ignores the training argument
    `lr_scheduler_type`, and keeps `learning_rate` until the first update.

    Where the scheduler averages weights, as `AutoGen` does, the averaged weights are the result. `evaluate`,
    `predict`, `save_model` and the model of each checkpoint take them also in the middle of training, so
    `load_best_model_at_end` loads what was evaluated. At the end they stay in the model. A resumed run goes on with the
    weights in training, which stand in the checkpoint's `scheduler.pt`.

    Args:
        scheduler: `gen_dist.ExactGen`, or `functools.partial(gen_dist.AutoGen, update_every=4)`; by default `AutoGen`.
            It gets the number of training steps as its `total_steps`, if it takes that and does not have it.
    """

    lr_scheduler: Any
    _is_next_batch = False  # whether the inputs that are prepared next are those of a training step

    def __init__(self, *args: Any, scheduler: SchedulerFactory | None = None, **kwargs: Any) -> None:
        self._given = scheduler
        self._rate = TrainerScheduler()
        super().__init__(*args, **kwargs)
        self.callback_handler.callbacks.insert(0, _AfterSteps(self))  # before those that export the model

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)
        as_gen_optimizer(unwrapped(optimizer))
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        self._rate.detach()  # of a training run before this one
        self._make = with_horizon(self._given, num_training_steps)
        self._rate = self.lr_scheduler = TrainerScheduler()
        return self.lr_scheduler

    # ------------------------------------------------------------------------------------------------ training

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        rate = self._rate
        if not rate.attached:  # the model comes wrapped only now
            rate.attach(self._make(as_gen_optimizer(unwrapped(self.optimizer)), model))
        self._is_next_batch = True
        loss = super().training_step(model, inputs, num_items_in_batch)
        rate.batches.append(partial(self._loss, model, self._inputs, num_items_in_batch))
        return loss

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Note what the loss of a training step is taken of: it may be generated, or drawn from a buffer."""
        is_batch, self._is_next_batch = self._is_next_batch, False
        prepared = super()._prepare_inputs(inputs)
        if is_batch:
            self._inputs = copy(prepared)  # the loss may take entries out
        return prepared

    def _loss(self, model: nn.Module, inputs: Any, num_items_in_batch: Any) -> Tensor:
        """The loss of a micro-batch, scaled so that the mean over a step's micro-batches is the loss trained on."""
        with records_kept(self), self.compute_loss_context_manager():
            loss: Any = self.compute_loss(model, copy(inputs), num_items_in_batch=num_items_in_batch)
        return loss * self.current_gradient_accumulation_steps if self._is_share(num_items_in_batch) else loss

    def _is_share(self, num_items_in_batch: Any) -> bool:
        """Whether the loss of a micro-batch is its share of the step's, as in `Trainer.training_step`."""
        if (told := getattr(self, "loss_is_scaled_for_ga", None)) is not None:
            return bool(told)
        accepts = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(accepts or self.compute_loss_func is not None)

    # ------------------------------------------------------------------------------------- the averaged weights

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self._rate.result_in_place():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        with self._rate.result_in_place():
            return super().predict(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        with self._rate.result_in_place():
            super().save_model(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._rate.checkpointed():  # FSDP's own file of the model, too, which the best one is loaded from
            super()._save_checkpoint(*args, **kwargs)


class _AfterSteps(TrainerCallback):
    """What is left to do after a step, and after the last one."""

    def __init__(self, trainer: GenMixin) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop the batches of a step that the gradient scaler left out; their gradients go by `model.zero_grad()`."""
        self.trainer._rate.batches.clear()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the averaged weights in the model, unless the trainer has loaded the best of those evaluated."""
        loaded = args.load_best_model_at_end and state.best_model_checkpoint is not None
        self.trainer._rate.end(hand_over=not loaded)


class GenTrainer(GenMixin, Trainer):
    """`transformers.Trainer` whose learning rate is set by a `GenScheduler`; see `GenMixin`."""
