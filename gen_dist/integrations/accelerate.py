"""Hugging Face Accelerate, in three lines of its usual script:

optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters())
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
scheduler = AcceleratedGen(accelerator, gen.AutoGen(optimizer.optimizer, model, criterion))

for x, y in loader:
    with accelerator.accumulate(model):
        accelerator.backward(criterion(model(x), y))
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        scheduler.step(x, y)
        optimizer.step()
        optimizer.zero_grad()
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from gen_dist.integrations.at_step import RateAtStep
from gen_dist.scheduler import GenScheduler

try:
    from accelerate import Accelerator
except ImportError as error:
    raise ImportError("gen_dist.integrations.accelerate needs Accelerate: pip install accelerate") from error

__all__ = ["AcceleratedGen"]


class AcceleratedGen(RateAtStep):
    """A `GenScheduler` for the loop of an `Accelerator`: accumulation, clipping, mixed precision and checkpoints.

    Call `step` for every micro-batch, anywhere before `optimizer.step()`; the rate is set there, once for all
    micro-batches of an accumulation. `accelerator.save_state` and `load_state` include it. Do not `prepare` it.

    Args:
        accelerator: the one that prepared model and optimizer.
        scheduler: made with the prepared model, and with `optimizer.optimizer`, the `GenOptimizer` inside the prepared
            one.
    """

    def __init__(self, accelerator: Accelerator, scheduler: GenScheduler) -> None:
        super().__init__(scheduler)
        self.accelerator = accelerator
        self._complete = False  # whether the batches that are kept are those of a whole accumulation
        accelerator.register_for_checkpointing(self)

    def step(self, x: Any = None, y: Any = None, *, closure: Callable[[], Tensor] | None = None) -> None:
        """Add a micro-batch: its loss is `criterion(model(x), y)`, or what the closure returns."""
        if self._complete:  # batches that are left here are those of a step that a gradient scaler left out
            self.batches.clear()
        self._complete = self.accelerator.sync_gradients
        self.batches.append(closure if closure is not None else (x, y))
