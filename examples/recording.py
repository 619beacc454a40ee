"""What a run writes: a progress bar, metrics.jsonl, a figure and a closing line."""

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from ranks import Ranks
from torch import Tensor, nn
from tqdm import tqdm

import gen_dist as gen
from gen_dist.plots import RecordedLine, training_figure

LINE_POINTS = 21


class Recorder:
    """Follows a run step by step. All ranks call it, and rank 0 writes."""

    def __init__(self, scheduler: gen.GenScheduler, output: Path, steps: int, ranks: Ranks, done: int = 0) -> None:
        """`done` of the `steps` steps were taken before; their records are kept."""
        self.scheduler = scheduler
        self.output = output
        self.ranks = ranks
        self.step = done
        self.records: list[dict[str, Any]] = []
        self._line: RecordedLine | None = None
        self._lines_due = [step for step in (0, steps // 3, 9 * steps // 10) if step >= done]
        self._seen = scheduler.last
        self._seconds: defaultdict[str, float] = defaultdict(float)
        if ranks.rank == 0:
            output.mkdir(parents=True, exist_ok=True)
            self._file = (output / "metrics.jsonl").open("a+", buffering=1)
            self.records = keep_records(self._file, done)
        self._bar = tqdm(total=steps, initial=done, unit="step", disable=ranks.rank != 0, dynamic_ncols=True)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        if self.ranks.rank == 0:
            self._file.close()

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Adds the seconds of the block to this step's account of `what`."""
        start = time.perf_counter()
        yield
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        self._seconds[what] += time.perf_counter() - start

    def line(
        self,
        model: nn.Module,
        criterion: Callable[[Tensor, Tensor], Tensor],
        optimizer: gen.GenOptimizer,
        x: Tensor,
        y: Tensor,
    ) -> None:
        """At three steps of a run, records the loss along the direction that the optimizer holds."""
        last = self.scheduler.last
        due = self._lines_due and self.step >= self._lines_due[0]
        if not due or last is None or last is self._seen or last.reason not in ("accepted", "clamped"):
            return
        self._lines_due.pop(0)
        rates = [2.5 * last.lr * i / (LINE_POINTS - 1) for i in range(LINE_POINTS)]
        losses = gen.loss_per_learning_rate(model, criterion, optimizer, x, y, rates)
        self._line = RecordedLine(
            step=self.step + 1,
            learning_rates=rates,
            losses=losses.tolist(),
            parabola=[last.loss - last.numerator * a + last.denominator * a**2 / 2 for a in rates],
            chosen=last.lr,
            minimum=last.numerator / last.denominator,
            lr_min=self.scheduler.lr_min,
            lr_max=self.scheduler.lr_max,
        )

    def write(self, loss: Tensor) -> None:
        """Ends a step: writes one object to metrics.jsonl and moves the bar."""
        record = self._record(self.ranks.mean(loss))
        self.records.append(record)
        self.step += 1
        self._line = None
        self._seen = self.scheduler.last
        self._seconds.clear()
        if self.ranks.rank == 0:
            print(json.dumps({key: finite(value) for key, value in record.items()}), file=self._file)
            self._bar.set_postfix_str(f"loss {record['loss']:.3g}, rate {record['lr']:.2e}", refresh=False)
            self._bar.update()

    def _record(self, loss: float) -> dict[str, Any]:
        last = self.scheduler.last
        update = last if last is not self._seen else None
        return {
            "step": self.step + 1,
            "loss": loss,
            "lr": self.scheduler.get_last_lr()[0],
            "lr_min": self.scheduler.lr_min,
            "lr_max": self.scheduler.lr_max,
            "numerator": update.numerator if update else None,
            "denominator": update.denominator if update else None,
            "reason": update.reason if update else None,
            "seconds": sum(self._seconds.values()),
            "scheduler_seconds": self._seconds["scheduler"],
            "line": None if self._line is None else self._line._asdict(),
        }

    def sync(self) -> None:
        """Waits until the records are on the disk, which a checkpoint of these steps requires."""
        if self.ranks.rank == 0:
            os.fsync(self._file.fileno())

    def announce(self, result: str) -> None:
        """Shows the latest evaluation next to the bar."""
        self._bar.set_description(result)

    def draw(self) -> Path:
        """The figure of the run so far, drawn on rank 0."""
        path = self.output / "training.png"
        if self.ranks.rank == 0:
            training_figure(self.records).savefig(path, dpi=150)
        return path


def keep_records(file: TextIO, done: int) -> list[dict[str, Any]]:
    """The records of the first `done` steps. Later records are removed, since those steps will be taken again."""
    file.seek(0)
    records: list[dict[str, Any]] = []
    end = 0
    while len(records) < done and (line := file.readline()).endswith("\n"):
        records.append(json.loads(line))
        end = file.tell()
    file.truncate(end)
    for record in records:
        record["loss"] = math.nan if record["loss"] is None else record["loss"]
    return records


def closing_line(records: list[dict[str, Any]], steps_per_epoch: int, result: str) -> str:
    """The run in one line: the mean loss of the last epoch, `result`, the rate, the updates, the overhead."""
    last_epoch = records[-steps_per_epoch:]
    loss = sum(record["loss"] for record in last_epoch) / len(last_epoch)
    reasons = [record["reason"] for record in records if record["reason"] is not None]
    accepted, clamped = reasons.count("accepted"), reasons.count("clamped")
    declined = len(reasons) - accepted - clamped
    overhead = sum(r["scheduler_seconds"] for r in records) / sum(r["seconds"] for r in records)
    return (
        f"train loss {loss:.4g} | {result} | final rate {records[-1]['lr']:.3g} | "
        f"updates: {accepted / len(reasons):.0%} accepted, {clamped / len(reasons):.0%} clamped, "
        f"{declined / len(reasons):.0%} declined | "
        f"scheduler {overhead:.0%} of the step"
    )


def finite(value: Any) -> Any:
    """Replaces infinity and NaN, for which JSON has no word."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
