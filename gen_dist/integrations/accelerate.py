"""Hugging Face Accelerate, in three lines of its usual script:

optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters())
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
scheduler = AcceleratedGen(accelerator, gen.AutoGen(optimizer.optimizer, model))

for batch in loader:
    with accelerator.accumulate(model):
        accelerator.backward(model(**batch).loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        scheduler.step(batch)
        optimizer.step()
        optimizer.zero_grad()

With a criterion, `AutoGen(optimizer.optimizer, model, criterion)`, that is `scheduler.step(x, y)`.
"""

from __future__ import annotations

from gen_dist.at_step import RateAtStep
from gen_dist.scheduler import GenScheduler

try:
    from accelerate import Accelerator
except ImportError as error:
    raise ImportError("gen_dist.integrations.accelerate needs Accelerate: pip install accelerate") from error

__all__ = ["AcceleratedGen"]


class AcceleratedGen(RateAtStep):
    """A `GenScheduler` for the loop of an `Accelerator`: accumulation, clipping, mixed precision and checkpoints.

    Call `step` for every micro-batch, anywhere before `optimizer.step()`; the rate is set there, once for all
    micro-batches of an accumulation, by `accelerator.accumulate` or by hand. `accelerator.save_state` and `load_state`
    include it. Do not `prepare` it.

    Args:
        accelerator: the one that prepared model and optimizer.
        scheduler: made with the prepared model, and with `optimizer.optimizer`, the `GenOptimizer` inside the prepared
            one.
    """

    call = "scheduler.step("

    def __init__(self, accelerator: Accelerator, scheduler: GenScheduler) -> None:
        super().__init__(scheduler)
        accelerator.register_for_checkpointing(self)

    step = RateAtStep.collect  # `step(x, y)`, `step(batch)` or `step(closure=fn)`
