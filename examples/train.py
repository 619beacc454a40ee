"""Train a small model with a learning rate that GeN chooses, in one process or on several ranks:

python examples/train.py
torchrun --standalone --nproc_per_node=2 examples/train.py --parallel fsdp2 --optimizer adamw
"""

import math
from argparse import Namespace
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from arguments import RECIPES, SCHEDULERS, parse, settings
from checkpoints import Checkpoints, Training
from data import CONTEXT, Dataset, evaluation_batches, training_batches
from models import CNN, GPT, MLP
from ranks import Ranks
from recording import Recorder, closing_line
from sentences import SentenceClassifier
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gen_dist as gen

Model = MLP | CNN | GPT | SentenceClassifier
EVALUATION_BATCH = 512  # examples on each rank
STATISTICS = 4  # the largest number of such batches to compute batch norm statistics from


class Evaluation(NamedTuple):
    loss: float
    accuracy: float


def main() -> None:
    ranks = Ranks.from_environment()
    arguments, dataset = parse(ranks)
    if arguments.check:
        print(f"checked: {plan(arguments, dataset)}")
        return
    with ranks.connected():
        train(arguments, dataset.to(ranks.device), ranks)


def train(arguments: Namespace, dataset: Dataset, ranks: Ranks) -> None:
    torch.manual_seed(arguments.seed)
    model = parallelize(build(arguments.model, dataset).to(ranks.device), arguments.parallel, ranks)
    recipe = RECIPES[arguments.optimizer]

    # GeN, 1 of 2: an optimizer that gives its direction, and a scheduler that measures the loss along it
    optimizer = gen.make_gen_optimizer(recipe.optimizer, model.parameters(), lr=arguments.lr, **recipe.options)
    scheduler = SCHEDULERS[arguments.rule](
        optimizer,
        model,
        criterion,
        lr_min=arguments.lr_min,
        lr_max=arguments.lr_max,
        curvature=arguments.curvature,
        probes=arguments.probes or 2,
        update_every=arguments.update_every,
    )

    steps_per_epoch = len(dataset.train_x) // arguments.batch_size
    steps, done, checkpoints = arguments.steps or arguments.epochs * steps_per_epoch, 0, None
    if arguments.checkpoint is not None:
        training = Training(model, optimizer, scheduler)
        checkpoints = Checkpoints(arguments.checkpoint, training, settings(arguments), ranks)
        done = checkpoints.resume()

    result = ""
    with Recorder(scheduler, arguments.output, steps, ranks, done) as recorder:
        for epoch in range(done // steps_per_epoch, math.ceil(steps / steps_per_epoch)):
            batches = training_batches(
                dataset, arguments.batch_size, epoch, seed=arguments.seed, rank=ranks.rank, ranks=ranks.size
            )
            before = epoch * steps_per_epoch
            for x, y in islice(batches, max(0, done - before), steps - before):
                with recorder.timed("training"):
                    optimizer.zero_grad()
                    loss = criterion(model(x), y)
                    loss.backward()
                with recorder.timed("scheduler"):
                    scheduler.step(x, y, loss=loss)  # GeN, 2 of 2: sets the learning rate, on every rank the same
                recorder.line(model, criterion, optimizer, x, y)
                with recorder.timed("training"):
                    optimizer.step()
                recorder.write(loss)
                if checkpoints and (recorder.step % arguments.checkpoint_every == 0 or recorder.step == steps):
                    recorder.sync()
                    checkpoints.save(recorder.step)
            with readout(scheduler, dataset, ranks):
                result = describe(evaluate(model, dataset, ranks), arguments.model)
            recorder.announce(result)

    if ranks.rank == 0 and result:  # otherwise there was nothing left to do
        print(closing_line(recorder.records, steps_per_epoch, result))
        if arguments.plot:
            print(recorder.draw().resolve())


def criterion(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross entropy over labels of any shape; the last dimension of `logits` is the classes."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def build(name: str, dataset: Dataset) -> Model:
    example = dataset.train_x[0]
    match name:
        case "mlp":
            return MLP(inputs=example.numel(), classes=dataset.classes)
        case "cnn":
            return CNN(channels=example.size(0), classes=dataset.classes)
        case "minilm":
            return SentenceClassifier(dataset.classes)
        case _:
            return GPT(vocabulary=dataset.classes, context=CONTEXT)


def parallelize(model: Model, parallel: str, ranks: Ranks) -> nn.Module:
    """Wrap the model. Replicas need no wrapper: one seed gives equal weights, and the scheduler averages gradients."""
    match parallel:
        case "ddp":
            return DistributedDataParallel(model)
        case "fsdp2":
            mesh = init_device_mesh(ranks.device.type, (ranks.size,))
            for part in [*model.blocks, model]:
                fully_shard(part, mesh=mesh)
    return model


def readout(scheduler: gen.GenScheduler, dataset: Dataset, ranks: Ranks) -> AbstractContextManager[None]:
    """Within the block the model holds its averaged weights, if any, with batch norm statistics made for them."""
    if scheduler.average is None:
        return nullcontext()
    here = dataset.train_x[ranks.rank :: ranks.size]
    return scheduler.averaged(here[: STATISTICS * EVALUATION_BATCH].split(EVALUATION_BATCH))


@torch.no_grad()
def evaluate(model: nn.Module, dataset: Dataset, ranks: Ranks) -> Evaluation:
    """The loss and the accuracy on all test examples; each rank evaluates its share."""
    ranks.average_running_statistics(model)
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=ranks.device)
    for x, y, counts in evaluation_batches(dataset, EVALUATION_BATCH, rank=ranks.rank, ranks=ranks.size):
        logits, labels = model(x)[counts].flatten(0, -2), y[counts].flatten()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        right = (logits.argmax(-1) == labels).sum()
        sums += torch.stack([loss, right, torch.tensor(labels.numel(), device=ranks.device)])
    model.train()
    loss_sum, right_sum, labels_sum = ranks.total(sums).tolist()
    return Evaluation(loss_sum / labels_sum, right_sum / labels_sum)


def describe(evaluation: Evaluation, model: str) -> str:
    if model == "gpt":
        return f"test perplexity {math.exp(evaluation.loss):.2f}"
    return f"test accuracy {evaluation.accuracy:.1%}"


def plan(arguments: Namespace, dataset: Dataset) -> str:
    return (
        f"{arguments.model} on {len(dataset.train_x)} examples of {arguments.data}, "
        f"{arguments.epochs} epochs in batches of {arguments.batch_size}, {arguments.parallel}, "
        f"{arguments.optimizer} with {arguments.curvature} curvature"
    )


if __name__ == "__main__":
    main()
