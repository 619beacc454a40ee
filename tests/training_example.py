"""Runs of examples/train.py inside a rank of the pool, and what a run leaves behind."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import train
from arguments import parse
from ranks import Ranks

EXAMPLES = Path(train.__file__).parent
TRAIN = EXAMPLES / "train.py"


def trained(arguments: list[str]) -> tuple[list[dict[str, Any]], str]:
    """The records of a run and its output, in this process or in a rank of the pool."""
    sys.argv = [str(TRAIN), *arguments]
    ranks = Ranks.from_environment()
    parsed, dataset = parse(ranks)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train.train(parsed, dataset, ranks)
    return (records(parsed.output) if ranks.rank == 0 else []), printed.getvalue()


def records(folder: Path) -> list[dict[str, Any]]:
    """What a run wrote about each of its steps."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
