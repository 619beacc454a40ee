"""What a whole training costs with each method: processor time over that of AdamW, all methods side by side."""

from __future__ import annotations

import time
from pathlib import Path

from quality_methods import METHODS
from quality_tasks import TASKS, load

BASE = "adamw-linear-0.001"


def cost(name: str, methods: list[str], steps: int, seed: int, directory: Path) -> str:
    """Train with all methods in turns, step by step on the same batches; return a line with the ratios.

    A machine that slows down for a while slows all of them.
    """
    task = TASKS[name]
    examples = load(task.data, directory)
    methods = [BASE, *(method for method in methods if method != BASE)]
    trainings = [METHODS[method](task, task.new_model(examples, seed), steps) for method in methods]
    seconds = [0.0] * len(methods)
    for number, (x, y) in enumerate(task.batches(examples, steps, seed)):
        for turn in range(len(methods)):
            index = (number + turn) % len(methods)
            before = trainings[index].reading_seconds
            start = time.process_time()
            trainings[index].step(x, y)
            seconds[index] += time.process_time() - start - (trainings[index].reading_seconds - before)
    ratios = ", ".join(f"{m} {s / seconds[0]:.3f}" for m, s in zip(methods[1:], seconds[1:], strict=True))
    return f"{name}, {steps} steps of {1e3 * seconds[0] / steps:.1f} ms: {ratios}"
