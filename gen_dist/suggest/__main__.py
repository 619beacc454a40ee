"""What learning rate? As a command, before training:

    python -m gen_dist.suggest package.module:function --plot rate.png
    torchrun --nproc_per_node=2 -m gen_dist.suggest package.module:function

The function takes no arguments and returns those of `gen_dist.suggest_lr`: a dict of them, or a tuple of the first
ones, `(model, optimizer, criterion, x, y)`:

    def problem():
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
        (x, y), *others = itertools.islice(dataloader, 5)
        return {"model": model, "optimizer": optimizer, "criterion": criterion, "x": x, "y": y, "held_out": others}

See examples/factory.py for one that runs.

Under torchrun the command initialises the process group before it calls the function (NCCL if each rank of a machine
has a GPU, else gloo). The function then returns this rank's slice, and the model in DDP, after `fully_shard`, or as a
plain copy. Rank 0 prints. If there is no rate to suggest, the command says why, and `--json` prints null for it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from gen_dist.suggest import Suggestion, suggest_lr

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        factory = _factory(options.factory)
        if options.plot is not None:
            importlib.import_module("matplotlib")
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        parser.error(str(error))
    with _ranks():
        _answer(parser, factory, options)


def _answer(parser: argparse.ArgumentParser, factory: Callable[[], Any], options: argparse.Namespace) -> None:
    problem = factory()
    if not isinstance(problem, dict | tuple):
        parser.error(
            f"{options.factory} returned {type(problem).__name__}: return a dict of suggest_lr's arguments, "
            "{'model': ..., 'optimizer': ..., 'criterion': ..., 'x': ..., 'y': ...}, or a tuple of the first ones"
        )
    chosen = {"lr_min": options.lr_min, "lr_max": options.lr_max, "curvature": options.curvature}
    named = {name: value for name, value in chosen.items() if value is not None}
    suggestion = suggest_lr(**(problem | named)) if isinstance(problem, dict) else suggest_lr(*problem, **named)
    if int(os.environ.get("RANK", 0)) == 0:
        _report(suggestion, options)


def _parser() -> argparse.ArgumentParser:
    about, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m gen_dist.suggest",
        description=f"{about}\n\n{rest}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("factory", metavar="package.module:function", help="returns the arguments of suggest_lr")
    parser.add_argument("--lr-min", type=float, metavar="A", help="suggest no less")
    parser.add_argument("--lr-max", type=float, metavar="A", help="suggest no more")
    parser.add_argument(
        "--curvature", choices=("auto", "exact", "forward"), help="auto, the default: exact where the model allows it"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw the true line and the parabola: .png, .pdf, .svg")
    parser.add_argument("--json", action="store_true", help="print one JSON object, with all that was measured")
    return parser


def _factory(name: str) -> Callable[[], Any]:
    module, _, function = name.partition(":")
    if not (module and function):
        raise ValueError(f"the factory must be package.module:function, got {name!r}")
    found: Any = importlib.import_module(module)
    for part in function.split("."):
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{name} is not a function but {found!r:.80}")
    return found


@contextlib.contextmanager
def _ranks() -> Iterator[None]:
    """The process group, where torchrun started this process, for the time of the block."""
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield
        return
    here = int(os.environ.get("LOCAL_RANK", 0))
    on_gpus = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if on_gpus:
        torch.cuda.set_device(here)
    dist.init_process_group("nccl" if on_gpus else "gloo")
    try:
        yield
    finally:
        gc.collect()  # a DDP model that outlives its group now and then waits forever for the group's threads
        dist.destroy_process_group()


def _report(suggestion: Suggestion, options: argparse.Namespace) -> None:
    print(json.dumps(suggestion.as_dict()) if options.json else suggestion)
    if options.plot is not None:
        suggestion.figure().savefig(options.plot, dpi=150)
        if not options.json:
            print(f"{'plot':<16}  {options.plot}")


if __name__ == "__main__":
    main()
