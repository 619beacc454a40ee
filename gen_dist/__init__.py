"""Learning rates that need no tuning, for distributed training: the generalized Newton's method (GeN) for PyTorch.

    import gen_dist as gen

    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), weight_decay=0.1)
    scheduler = gen.ExactGen(optimizer, model, criterion, lr_max=0.01)

    for x, y in dataloader:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        scheduler.step(x, y)  # sets the learning rate, on every rank the same
        optimizer.step()

Method: Bu & Xu, "Automatic gradient descent with generalized Newton's method", ICLR 2025, arXiv 2407.02772.
"""

from gen_dist import plots
from gen_dist.analysis import (
    loss_per_learning_rate,
    second_order_approximation,
    second_order_approximation_coeffs,
)
from gen_dist.averaging import Averaging
from gen_dist.jet import UnsupportedOperation
from gen_dist.optimizer import GenOptimizer, as_gen_optimizer, make_gen_optimizer
from gen_dist.rule import Auto, Raw
from gen_dist.scheduler import ApproxGen, AutoGen, ExactGen, GenScheduler, Update
from gen_dist.suggestion import Suggestion, suggest_lr

__version__ = "0.1.0"

__all__ = [
    "ApproxGen",
    "Auto",
    "AutoGen",
    "Averaging",
    "ExactGen",
    "GenOptimizer",
    "GenScheduler",
    "Raw",
    "Suggestion",
    "UnsupportedOperation",
    "Update",
    "as_gen_optimizer",
    "loss_per_learning_rate",
    "make_gen_optimizer",
    "plots",
    "second_order_approximation",
    "second_order_approximation_coeffs",
    "suggest_lr",
]
