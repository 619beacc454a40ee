"""A small convolutional network on digits, as input for `gen_dist.suggest`. In this folder, type:

python -m gen_dist.suggest factory:digits --plot rate.png
torchrun --standalone --nproc_per_node=2 -m gen_dist.suggest factory:digits
"""

from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from data import load_digits, training_batches
from models import CNN
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel


def digits() -> dict[str, Any]:
    """The arguments of `gen_dist.suggest_lr`: one slice of this rank for the gradient, and four held-out slices."""
    torch.manual_seed(0)
    dataset, model = load_digits(), CNN(channels=1, classes=10)
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    (x, y), *held_out = islice(training_batches(dataset, 64, epoch=0, seed=0, rank=rank, ranks=ranks), 5)
    optimizer = torch.optim.AdamW(model.parameters())
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    return {"model": wrapped, "optimizer": optimizer, "criterion": cross_entropy, "x": x, "y": y, "held_out": held_out}
