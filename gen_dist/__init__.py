"""Learning rates that need no tuning, for distributed training: the generalized Newton's method (GeN) for PyTorch.

An optimizer that returns its update direction, and a scheduler that measures the loss along it:

>>> import torch
>>> import gen_dist as gen
>>> model = torch.nn.Linear(2, 1)
>>> optimizer = gen.make_gen_optimizer(torch.optim.SGD, model.parameters(), lr=0.01)
>>> scheduler = gen.ExactGen(optimizer, model, torch.nn.functional.mse_loss)
>>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
>>> y = x.sum(1, keepdim=True) + 1
>>> for _ in range(2):
...     optimizer.zero_grad()
...     torch.nn.functional.mse_loss(model(x), y).backward()
...     scheduler.step(x, y)  # sets the learning rate, on every rank the same
...     optimizer.step()  # moves along the direction that was measured
>>> scheduler.last.reason
'accepted'

What to use:

    AutoGen                      for real training: no rate, no schedule, no horizon to choose
    ExactGen, ApproxGen          the method of the paper as it stands; GenScheduler has all options
    Auto, Raw, Averaging         the rules behind them, and how AutoGen averages weights
    Verification, GradientNoise  companions, which watch the updates; derive your own from Companion
    RateAtStep                   for trainers that hide optimizer.step(): ignite, timm, skorch and others
    make_gen_optimizer           makes an optimizer for them; as_gen_optimizer converts an existing one
    give_momentum_back           returns to an optimizer the momentum that AutoGen's averages have taken over
    Watch                        leaves your optimizer and your schedule as they are, and tells how your rate stands
    suggest_lr                   one call before training: what rate? As a command: python -m gen_dist.suggest --help
    loss_per_learning_rate       the loss along the direction; second_order_approximation is its parabola
    plots                        pictures of a run
    gen_dist.integrations        one module each for Accelerate, Lightning, torchtitan and transformers
    python -m gen_dist.preflight checks that the ranks of a run fit together

The script is the same in one process and under torchrun, with plain replicas, DDP or FSDP. `scheduler.last` holds what
the last update saw and did. Warnings go to Python's logger "gen_dist"; the library prints nothing.

Method: Bu & Xu, "Automatic gradient descent with generalized Newton's method", ICLR 2025, arXiv 2407.02772.
"""

from gen_dist import plots
from gen_dist.at_step import RateAtStep
from gen_dist.averaging import Averaging
from gen_dist.curves import (
    loss_per_learning_rate,
    second_order_approximation,
    second_order_approximation_coeffs,
)
from gen_dist.direction import GenOptimizer, as_gen_optimizer, give_momentum_back, make_gen_optimizer
from gen_dist.jets import UnsupportedOperation
from gen_dist.policy import Auto, Raw
from gen_dist.recipes import ApproxGen, AutoGen, ExactGen
from gen_dist.scheduler import GenScheduler
from gen_dist.suggest import Suggestion, suggest_lr
from gen_dist.update import Update
from gen_dist.watch import Companion, GradientNoise, SelfCheck, Verification, Watch, Watched

__version__ = "0.1.0"

__all__ = [
    "ApproxGen",
    "Auto",
    "AutoGen",
    "Averaging",
    "Companion",
    "ExactGen",
    "GenOptimizer",
    "GenScheduler",
    "GradientNoise",
    "RateAtStep",
    "Raw",
    "SelfCheck",
    "Suggestion",
    "UnsupportedOperation",
    "Update",
    "Verification",
    "Watch",
    "Watched",
    "as_gen_optimizer",
    "give_momentum_back",
    "loss_per_learning_rate",
    "make_gen_optimizer",
    "plots",
    "second_order_approximation",
    "second_order_approximation_coeffs",
    "suggest_lr",
]
