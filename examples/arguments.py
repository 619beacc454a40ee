"""The options of train.py. Mistakes in them are reported before anything starts."""

import argparse
import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from checkpoints import settings_of
from data import Dataset, MissingDataError, load
from ranks import Ranks

import gen_dist as gen


@dataclass(frozen=True)
class Recipe:
    """An optimizer, and for the raw rule its initial rate and its largest rate."""

    optimizer: type[torch.optim.Optimizer]
    lr: float
    lr_max: float
    options: dict[str, Any] = field(default_factory=dict)


RECIPES = {
    "sgd": Recipe(torch.optim.SGD, lr=0.05, lr_max=0.5, options={"momentum": 0.9}),
    "adamw": Recipe(torch.optim.AdamW, lr=1e-3, lr_max=0.02, options={"weight_decay": 0.01}),
    "adam": Recipe(torch.optim.Adam, lr=1e-3, lr_max=0.02),
    "rmsprop": Recipe(torch.optim.RMSprop, lr=1e-3, lr_max=0.02),
}
SCHEDULERS: dict[str, type[gen.GenScheduler]] = {"auto": gen.AutoGen, "raw": gen.GenScheduler}
DATA_OF_MODEL = {
    "mlp": ("digits", "fashion-mnist"),
    "cnn": ("digits", "fashion-mnist"),
    "gpt": ("shakespeare",),
    "minilm": ("film-reviews",),
}
EPOCHS = {"digits": 20, "fashion-mnist": 3, "shakespeare": 1, "film-reviews": 1}
BATCH_SIZE = {"digits": 256, "fashion-mnist": 256, "shakespeare": 64, "film-reviews": 16}


class Parser(argparse.ArgumentParser):
    """Reports an error once, not once for each rank."""

    def __init__(self, rank: int) -> None:
        super().__init__(
            usage="[torchrun --standalone --nproc_per_node=N] examples/train.py [options]",
            description="Train a small model with a learning rate that GeN chooses at each step.",
        )
        self.rank = rank

    def error(self, message: str) -> NoReturn:
        if self.rank == 0:
            super().error(message)
        raise SystemExit(2)


def parse(ranks: Ranks) -> tuple[argparse.Namespace, Dataset]:
    """The arguments with all defaults, and the data that they name. A mistake ends the process with one line."""
    parser = Parser(ranks.rank)
    add_options(parser)
    arguments = parser.parse_args()
    fill_in_defaults(arguments, ranks)
    for complaint in complaints(arguments, ranks):
        parser.error(complaint)
    try:
        dataset = load(arguments.data, arguments.data_dir)
    except MissingDataError as error:
        parser.error(str(error))
    if arguments.batch_size > len(dataset.train_x):
        parser.error(f"--batch-size {arguments.batch_size}: there are only {len(dataset.train_x)} examples")
    return arguments, dataset


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", choices=DATA_OF_MODEL, default="cnn", help="what to train (default: %(default)s)")
    add("--data", choices=EPOCHS, help="what to train it on (default: by model)")
    add("--data-dir", type=Path, default=Path("data"), help="where downloaded data lie (default: %(default)s)")
    add(
        "--parallel",
        choices=["none", "replica", "ddp", "fsdp2"],
        help="how the ranks share the model (default: ddp under torchrun, else none)",
    )
    add(
        "--curvature",
        choices=["auto", "exact", "gauss-newton", "forward"],
        default="auto",
        help="how the scheduler measures it (default: %(default)s)",
    )
    add("--probes", type=int, choices=[1, 2], help="forward passes of --curvature forward (default: 2)")
    add("--optimizer", choices=RECIPES, help="whose direction to follow (default: sgd; for gpt and minilm, adamw)")
    add(
        "--rule",
        choices=SCHEDULERS,
        default="auto",
        help="auto: AutoGen, nothing to tune; raw: the ratio at every step (default: %(default)s)",
    )
    add("--lr", type=float, help="the rate before the first update, for --rule raw (default: by optimizer)")
    add("--lr-min", type=float, default=0.0, help="the smallest rate allowed (default: %(default)s)")
    add("--lr-max", type=float, help="the largest rate allowed (default: none; by optimizer for --rule raw)")
    add("--epochs", type=int, help="passes over the data (default: by data)")
    add("--steps", type=int, help="instead of --epochs: steps to take")
    add("--batch-size", type=int, help="examples in a step, of all ranks together (default: by data)")
    add(
        "--update-every",
        type=int,
        help="steps between updates of the rate (default: 2, rarer later; 1 for --rule raw)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="of the weights and of the order of the data (default: %(default)s)",
    )
    add("--checkpoint", type=Path, metavar="DIR", help="folder to save the run in, and to resume it from")
    add("--checkpoint-every", type=int, default=50, help="steps between two checkpoints (default: %(default)s)")
    add("--output", type=Path, help="folder of metrics.jsonl and training.png (default: runs/NAME)")
    add("--plot", action=argparse.BooleanOptionalAction, default=True, help="draw training.png at the end")
    add("--check", action="store_true", help="look at the arguments and the data, say so, and stop")


def fill_in_defaults(arguments: argparse.Namespace, ranks: Ranks) -> None:
    a = arguments
    complete(
        a,
        data=DATA_OF_MODEL[a.model][0],
        optimizer="adamw" if a.model in ("gpt", "minilm") else "sgd",
        parallel="ddp" if ranks.launched else "none",
    )
    recipe = RECIPES[a.optimizer]
    complete(
        a,
        lr=recipe.lr,
        lr_max=recipe.lr_max if a.rule == "raw" else math.inf,
        update_every=1 if a.rule == "raw" else 2,
        epochs=EPOCHS[a.data],
        batch_size=BATCH_SIZE[a.data],
        output=Path("runs", f"{a.model}-{a.data}-{a.parallel}"),
    )


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that must not change when a run is resumed."""
    return {name: getattr(arguments, name) for name in ("model", "data", "optimizer", "rule", "batch_size", "seed")}


def option(name: str) -> str:
    return name.replace("_", "-")


def complete(arguments: argparse.Namespace, **defaults: Any) -> None:
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)


def complaints(arguments: argparse.Namespace, ranks: Ranks) -> Iterator[str]:
    """What is wrong with the arguments, in words; empty if nothing is."""
    a = arguments
    if a.data not in DATA_OF_MODEL[a.model]:
        yield f"--model {a.model} needs --data {' or '.join(DATA_OF_MODEL[a.model])}, not {a.data}"
    if a.parallel != "none" and not ranks.launched:
        yield f"--parallel {a.parallel} needs ranks: start it with torchrun --standalone --nproc_per_node=2"
    if a.parallel == "none" and ranks.size > 1:
        yield f"--parallel none is for one process, and torchrun started {ranks.size}"
    if a.probes is not None and a.curvature not in ("auto", "forward"):
        yield f"--probes {a.probes} belongs to --curvature forward, not to {a.curvature}"
    if not 0 <= a.lr_min <= a.lr_max:
        yield f"--lr-min {a.lr_min:g} --lr-max {a.lr_max:g}: need 0 <= lr-min <= lr-max"
    if not 0 < a.lr < math.inf:
        yield f"--lr {a.lr:g}: need a positive rate"
    for name in ("epochs", "steps", "batch_size", "update_every", "checkpoint_every"):
        if getattr(a, name) is not None and getattr(a, name) < 1:
            yield f"--{option(name)} {getattr(a, name)}: need at least 1"
    if a.batch_size % ranks.size:
        yield f"--batch-size {a.batch_size} does not divide into equal slices for {ranks.size} ranks"
    if a.checkpoint is not None:
        for name, value in settings_of(a.checkpoint).items():
            if getattr(a, name) != value:
                yield f"--checkpoint {a.checkpoint} holds a run with --{option(name)} {value}, not {getattr(a, name)}"
    if a.output.exists() and not a.output.is_dir():
        yield f"--output {a.output}: a file of this name exists"
    if a.plot and importlib.util.find_spec("matplotlib") is None:
        yield 'the plot needs matplotlib: pip install "gen_dist[plots]", or --no-plot'
