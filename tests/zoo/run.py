"""The yardstick: `exact` on the models of public packages, small, random, in float64, held to double backward.

    python tests/zoo/run.py                                   # all families: about an hour on one core
    python tests/zoo/run.py --only timm losses                # some families
    python tests/zoo/run.py --only transformers --names bert gpt2 --results bert.jsonl
    python tests/zoo/run.py --part 1/2                        # every second model, the first half

`pip install -e '.[zoo]'` installs the packages. Nothing is downloaded: all weights are random. Each model runs in a
process of its own, with a time limit. The table counts what is right, refused by name, wrong, and failed otherwise,
and then names all that is not right, with the operation that stopped it. `auto` counts how many of those that exact
curvature refuses go on under `curvature="auto"`, with a curvature near the oracle's. A model that cannot be built
small, or does not run, is listed as not built, and one that takes longer than the limit as too slow: they count in no
share.

The exit status is 1 if a model is wrong or failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import resource
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy.random  # noqa: F401 - what a measurement imports is imported once, before the processes are forked
import torch._dynamo  # noqa: F401

sys.path[0] = str(Path(__file__).parents[1])

from zoo.measure import VERDICTS, Outcome, measure, said

# Each is a module with `names()`, and with `build(name)`, which returns a Case.
FAMILIES = {
    "losses": "losses",
    "modules": "modules",
    "lora": "lora_kinds",
    "graphs": "graph_layers",
    "diffusers": "diffusers_models",
    "torchvision": "torchvision_models",
    "timm": "timm_models",
    "transformers": "transformers_models",
}
MEMORY = 16 << 30  # bytes of address space of a model's process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=[*FAMILIES], help="families")
    parser.add_argument("--names", nargs="+", help="models, by their names in the table")
    parser.add_argument("--part", default="1/1", help="K/N: of N parts of the models, the K-th")
    parser.add_argument("--limit", type=float, default=60, help="seconds for one model")
    parser.add_argument("--results", type=Path, help="a file that gets one line of JSON for each model, at once")
    parser.add_argument("--resume", action="store_true", help="go on after the models that the file holds")
    arguments = parser.parse_args()
    rows = []
    if arguments.resume and arguments.results.exists():
        rows = [json.loads(line) for line in arguments.results.read_text().splitlines()]
    for row in results(arguments, {(row["family"], row["name"]) for row in rows}):
        rows.append(row)
        print(f"{row['family']:12} {row['name']:40} {row['verdict']:10} {row['seconds']:5.1f} s", flush=True)
        if arguments.results:
            with arguments.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(summary(rows))
    sys.exit(any(row["verdict"] in ("wrong", "failed") for row in rows))


def results(arguments: argparse.Namespace, done: set[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    part, parts = map(int, arguments.part.split("/"))
    for family in arguments.only:
        module = importlib.import_module(f"zoo.{FAMILIES[family]}")
        names = [name for name in module.names() if not arguments.names or name in arguments.names]
        for name in names[part - 1 :: parts]:
            if (family, name) in done:
                continue
            start = time.monotonic()
            outcome = in_a_process(module, name, arguments.limit)
            seconds = round(time.monotonic() - start, 1)
            yield {"family": family, "name": name, "seconds": seconds, **asdict(outcome)}


def in_a_process(module: ModuleType, name: str, limit: float) -> Outcome:
    """Measure a model in a process that is forked from this one, which has imported the package already."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(module, name, sender))
    process.start()
    sender.close()
    try:
        if receiver.poll(limit):
            return receiver.recv()
        return Outcome("too slow", f"not ready in {limit:.0f} s")
    except EOFError:
        process.join()
        return Outcome("failed", f"the process ended with status {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _child(module: ModuleType, name: str, sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sys.stdout = sys.stderr = open("/dev/null", "w")  # noqa: SIM115 - what models print stays out of the table
    try:
        sender.send(measure(lambda: module.build(name)))
    except BaseException as error:  # a fault of the harness
        sender.send(Outcome("failed", f"the harness: {said(error)}"))


def summary(rows: list[dict[str, Any]]) -> str:
    """The table, and what is not right, grouped by the reason."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        for family in (row["family"], "all"):
            counts[family].update(
                [row["verdict"], "by differences"] if row["oracle"] != "double backward" else [row["verdict"]]
            )
            counts[family]["auto"] += row["auto"] == "goes on"
        if row["verdict"] != "right":
            auto = f" [auto: {row['auto']}]" if row["auto"] not in ("", "goes on") else ""
            reasons[row["verdict"], row["detail"]].append(f"{row['family']}/{row['name']}{auto}")
    header = ["family", *VERDICTS, "auto goes on", "refused %"]
    lines = ["", " ".join(f"{text:>13}" for text in header)]
    for family, count in counts.items():
        measured = sum(count[verdict] for verdict in VERDICTS[:4])
        share = f"{100 * count['refused'] / max(measured, 1):.1f}"
        cells = [family, *(count[verdict] for verdict in VERDICTS), count["auto"], share]
        lines.append(" ".join(f"{cell:>13}" for cell in cells))
    for (verdict, detail), names in sorted(
        reasons.items(), key=lambda item: (VERDICTS.index(item[0][0]), -len(item[1]))
    ):
        lines.append(f"\n{verdict} ({len(names)}): {detail}\n    " + "  ".join(names))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
