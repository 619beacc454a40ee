"""torchtitan, in one line of a trainer of your own:

    class MyTrainer(GenMixin, torchtitan.trainer.Trainer): ...

This replaces `config.lr_scheduler`. The container of optimizers and everything else stay torchtitan's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gen_dist.direction import GenOptimizer
from gen_dist.integrations.at_step import RateAtStep, SchedulerFactory
from gen_dist.integrations.joint import JointOptimizer
from gen_dist.recipes import AutoGen
from gen_dist.scheduler import GenScheduler

if TYPE_CHECKING:
    from torchtitan.trainer import Trainer as Base  # imports triton, which is not everywhere
else:
    Base = object

__all__ = ["GenMixin", "GenSchedulers"]


class GenSchedulers(RateAtStep):
    """Replaces torchtitan's `LRSchedulersContainer`: one rate for all of its optimizers.

    Args:
        optimizers: the `OptimizersContainer`, or another `Optimizer` that iterates over those that its step steps.
        model_parts: the model, parallelised, in a list; pipeline stages are not supported.
        scheduler: `gen_dist.ExactGen`, or `functools.partial(gen_dist.ExactGen, lr_max=0.1)`.
    """

    saved_on_one_rank = False  # but by torch.distributed.checkpoint, each shard on its rank

    def __init__(self, optimizers: Any, model_parts: list[nn.Module], scheduler: SchedulerFactory) -> None:
        if len(model_parts) != 1:
            raise ValueError(f"the loss runs through one model, not {len(model_parts)} pipeline stages of it")
        super().__init__()
        self.attach(scheduler(JointOptimizer(optimizers), model_parts[0]), stepped=optimizers)

    def step(self) -> None:
        """Do nothing: the container's `step()` has set the rate."""

    def get_metrics(self) -> dict[str, float]:
        """The learning rate of each parameter group, for the trainer's log."""
        return {f"lr/{i}": rate for i, rate in enumerate(self.get_last_lr())}

    # Distributed checkpoints want the same entries when they load as when they saved: all numbers in one text, beside
    # the averaged weights.

    def state_dict(self) -> dict[str, Any]:
        numbers = super().state_dict()
        return {"gen_dist": json.dumps(numbers | {"average": None}), "average": numbers.get("average") or {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        average = state_dict.get("average") or None
        super().load_state_dict(json.loads(state_dict["gen_dist"]) | {"average": average})


class GenMixin(Base):
    """Makes a torchtitan `Trainer` set its learning rate by a `GenScheduler`: `self.lr_schedulers.scheduler`.

    Loss, batches, accumulation, clipping, precision and checkpoints stay the trainer's. Pipeline parallelism and CUDA
    graphs are not supported. Override `make_scheduler` to choose another scheduler.
    """

    def __init__(self, config: Any) -> None:
        if not config.training.disable_cuda_graphs:
            raise ValueError("a replayed CUDA graph shows no batch: set config.training.disable_cuda_graphs = True")
        config.lr_scheduler = _Build(config.lr_scheduler, self.make_scheduler)
        super().__init__(config)

    def make_scheduler(self, optimizer: GenOptimizer, model: nn.Module, steps: int) -> GenScheduler:
        """Make the scheduler for a run of `steps` steps: by default `AutoGen` with this horizon."""
        return AutoGen(optimizer, model, total_steps=steps)

    def _forward_backward_body(self, *batch: Any) -> Tensor:
        self.lr_schedulers.batches.append(partial(self._loss, *batch))
        return super()._forward_backward_body(*batch)

    def _loss(self, inputs: Tensor, labels: Tensor, global_valid_tokens: Tensor, extra: dict[str, Any]) -> Tensor:
        """As in `_forward_backward_body`: a share of the global loss. The scheduler averages over batches and ranks."""
        with self.train_context():
            prediction = self.model_parts[0](inputs, **extra)
            positions = {"positions": extra["positions"]} if "positions" in extra else {}
            share = _share(self.loss_fn, prediction, labels, global_valid_tokens, positions)
        dims = self.parallel_dims
        return share * (self.gradient_accumulation_steps * dims.dp_replicate * dims.dp_shard * dims.cp)


def _share(loss_fn: Any, prediction: Tensor, labels: Tensor, tokens: Tensor, more: dict[str, Any]) -> Tensor:
    """The loss. torchtitan's chunked one calls `backward()` for each chunk; here the chunks stay in one graph."""
    if (lm_head := getattr(loss_fn, "lm_head", None)) is None:
        return loss_fn(prediction, labels, tokens, **more)[0]

    def chunks(whole: Tensor) -> tuple[Tensor, ...]:
        return whole.chunk(loss_fn.num_chunks, dim=1)

    cut = {name: chunks(value) for name, value in more.items()}
    shares = []
    for i, (hidden, of_hidden) in enumerate(zip(chunks(prediction), chunks(labels), strict=True)):
        of_chunk = {name: parts[i] for name, parts in cut.items()}
        shares.append(loss_fn.loss_fn(lm_head(hidden), of_hidden, tokens, **of_chunk)[0])
    return torch.stack(shares).sum()


class _Build:
    """Replaces `LRSchedulersContainer.Config`, whose warm-up steps are only shown."""

    def __init__(self, config: Any, make: Callable[[GenOptimizer, nn.Module, int], GenScheduler]) -> None:
        self.warmup_steps = config.warmup_steps
        self._make = make

    def build(self, *, optimizers: Any, training_steps: int) -> GenSchedulers:
        def make(optimizer: GenOptimizer, model: nn.Module) -> GenScheduler:
            return self._make(optimizer, model, training_steps)

        return GenSchedulers(optimizers, optimizers.model_parts, make)

    def to_dict(self) -> dict[str, Any]:
        return {"make": repr(self._make)}
