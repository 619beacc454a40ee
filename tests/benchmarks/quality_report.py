"""The results of the quality benchmark as a table and a plot.

The gap of a method on a task is its final train loss divided by that of the oracle: AdamW with a linear decay to zero
at the horizon, at the best rate of the grid. The oracle knows the horizon and was tuned. Other rows of the grid can
still be better.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path
from typing import Any

from quality_methods import AVERAGED, GRID, LAST, UNTUNED_METHODS
from quality_tasks import TASKS

from gen_dist.plots import BLUE, GREEN, ORANGE, STYLE, VERMILION

Record = dict[str, Any]
Row = tuple[str, list[str], str]  # title, methods of which the best counts, the reading

AVERAGING = ("autogen", "dog", "ldog")  # methods whose averaged weights are their result


def group(pattern: str) -> list[str]:
    return [method for method in GRID if re.fullmatch(pattern, method)]


def rows() -> list[Row]:
    """A row of the table; a tuned row is the best of its grid on each task."""
    found: list[Row] = []
    for name, optimizer in (("AdamW", "adamw"), ("SGD", "sgd")):
        for decay in ("constant", "linear", "cosine"):
            found.append((f"{name} tuned, {decay}", group(f"{optimizer}-{decay}-.*"), LAST))
        found.append((f"{name} tuned, averaged", group(f"{optimizer}-constant-.*"), AVERAGED))
    for rate in ("0.001", "0.003", "0.01"):
        found.append((f"AdamW {rate}", [f"adamw-constant-{rate}"], LAST))
        found.append((f"AdamW {rate}, averaged", [f"adamw-constant-{rate}"], AVERAGED))
    for method in UNTUNED_METHODS:
        if method.startswith(AVERAGING):
            found.append((method, [method], AVERAGED))
            found.append((f"{method}, not averaged", [method], LAST))
        else:
            found.append((method, [method], LAST))
    return found


class Results:
    """The losses by task, method and reading, averaged over the seeds; without those that lack a seed."""

    def __init__(self, records: list[Record], seeds: list[int], quantity: str = "train_loss") -> None:
        values: dict[tuple[str, str, str], dict[int, float]] = {}
        for record in records:
            for reading, quality in record["readings"].items():
                value = quality[quantity]
                cell = values.setdefault((record["task"], record["method"], reading), {})
                cell[record["seed"]] = math.inf if value is None else value
        self.means = {key: statistics.fmean(cell.values()) for key, cell in values.items() if set(cell) == set(seeds)}
        self.tasks = [task for task in TASKS if any(key[0] == task for key in self.means)]

    def best(self, task: str, methods: Iterable[str], reading: str) -> tuple[float, str]:
        """The smallest value and its method; infinity if no method was run."""
        found = [(self.means[task, m, reading], m) for m in methods if (task, m, reading) in self.means]
        return min(found, default=(math.inf, ""))

    def shown(self) -> list[Row]:
        """The rows that have results."""
        return [row for row in rows() if any(self.best(task, *row[1:])[1] for task in self.tasks)]

    def oracle(self, task: str) -> tuple[float, str]:
        return self.best(task, group("adamw-linear-.*"), LAST)

    def gap(self, task: str, row: Row) -> float | None:
        """The loss of the row divided by that of the oracle; None if it was not run."""
        (loss, method), (oracle, _) = self.best(task, *row[1:]), self.oracle(task)
        return loss / oracle if method and math.isfinite(oracle) else None


def seconds_per_step(records: list[Record], row: Row, task: str) -> float | None:
    """The median over the runs of the row, which does not favour rows with many runs, as the minimum does."""
    _, methods, reading = row
    runs = [r for r in records if r["task"] == task and r["method"] in methods and reading in r["readings"]]
    extra = reading == AVERAGED
    took = [(r["seconds"] + extra * r["reading_seconds"]) / r["steps"] for r in runs]
    return statistics.median(took) if took else None


def times(records: list[Record], tasks: list[str], row: Row) -> float | None:
    """The time of a step as a multiple of that of AdamW at a constant rate, averaged over the tasks."""
    plain: Row = ("", group("adamw-constant-.*"), LAST)
    pairs = [(seconds_per_step(records, row, task), seconds_per_step(records, plain, task)) for task in tasks]
    ratios = [took / base for took, base in pairs if took is not None and base is not None]
    return statistics.fmean(ratios) if ratios else None


def table(records: list[Record], seeds: list[int]) -> str:
    """A Markdown table of final train loss, gap, test loss and test accuracy, from records of one length."""
    train = Results(records, seeds)
    if not train.tasks:
        return f"no results of seeds {seeds}"
    shown = train.shown()
    header = ["method", *train.tasks, "mean gap", "worst", "time"]
    steps = {record["task"]: record["steps"] for record in records}
    lines = [
        f"Final train loss and (gap), mean of seeds {', '.join(map(str, seeds))}, after "
        f"{', '.join(f'{steps[task]:,} steps ({task})' for task in train.tasks)}:",
        "",
        *heading(header),
    ]
    for row in shown:
        gaps = [train.gap(task, row) for task in train.tasks]
        known = [gap for gap in gaps if gap is not None]
        cells = [cell(*train.best(t, *row[1:]), g) for t, g in zip(train.tasks, gaps, strict=True)]
        whole = [statistics.fmean(known), max(known)] if len(known) == len(gaps) else [None, None]
        lines.append(
            line([row[0], *cells, *(number(v, 2) for v in whole), number(times(records, train.tasks, row), 2)])
        )
    oracles = "; ".join(f"{task}: {train.oracle(task)[1] or 'not run'}" for task in train.tasks)
    lines += ["", f"Gap 1.00 is the oracle, AdamW with linear decay, tuned. {oracles}.", ""]
    lines += [
        "Test loss and accuracy, of the methods that are best in training:",
        "",
        *heading(["method", *train.tasks]),
    ]
    return "\n".join(lines + [line([row[0], *tested(records, seeds, train, row)]) for row in shown])


def cell(loss: float, method: str, gap: float | None) -> str:
    if not method:
        return ""
    return number(loss) if gap is None else f"{number(loss)} ({number(gap, 2)})"


def tested(records: list[Record], seeds: list[int], train: Results, row: Row) -> list[str]:
    loss, accuracy = (Results(records, seeds, quantity) for quantity in ("test_loss", "accuracy"))
    keys = [(task, train.best(task, *row[1:])[1], row[2]) for task in train.tasks]
    return [f"{number(loss.means[key])}, {accuracy.means[key]:.1%}" if key in loss.means else "" for key in keys]


def number(value: float | None, digits: int = 3) -> str:
    """Format a loss with three decimals, or with more if it is near zero."""
    if value is None:
        return ""
    return f"{value:.{digits}f}" if value == 0 or abs(value) >= 0.05 else f"{value:.2g}"


def heading(cells: list[str]) -> list[str]:
    return [line(cells), line(["---"] * len(cells))]


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


# ------------------------------------------------------------------------------------------------------ the plot


# The colours of gen_dist.plots and two more of the same palette; the markers differ as well.
COLORS = (BLUE, ORANGE, GREEN, VERMILION, "#CC79A7", "#56B4E9")
LOOKS = dict(zip(TASKS, cycle(zip(COLORS, "osD^vP", strict=True)), strict=False))


def draw(records: list[Record], seeds: list[int], path: Path) -> str:
    """Draw the gap by task and method on the left, and the rate of AutoGen over time on the right."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(STYLE | {"axes.axisbelow": True}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained", width_ratios=[3, 2])
        draw_gaps(left, Results(records, seeds))
        draw_rates(right, records)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return f"wrote {path}"


def draw_gaps(axes: Any, results: Results) -> None:
    """Keep only the averages of methods that average their weights."""
    averaged = {row[1][0] for row in results.shown() if row[2] == AVERAGED and row[0] in UNTUNED_METHODS}
    shown = [row for row in results.shown() if row[2] == AVERAGED or row[1][0] not in averaged][::-1]
    for task in results.tasks:
        color, marker = LOOKS[task]
        gaps = [results.gap(task, row) for row in shown]
        axes.plot(gaps, range(len(shown)), marker, color=color, alpha=0.85, label=TASKS[task].title)
    axes.axvline(1, color="gray", linewidth=1)
    axes.set(xscale="log", xlabel="final train loss / that of AdamW tuned, linear")
    axes.set_yticks(range(len(shown)), [row[0] for row in shown])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(_no_labels())


def draw_rates(axes: Any, records: list[Record]) -> None:
    for task, (color, _) in LOOKS.items():
        for record in (r for r in records if r["task"] == task and r["method"] == "autogen"):
            steps, rates = zip(*record["rates"], strict=True)
            axes.plot(steps, [math.nan if rate is None else rate for rate in rates], color=color)
    axes.set(yscale="log", xlabel="step", title="AutoGen", ylabel="learning rate")


def _no_labels() -> Any:
    from matplotlib.ticker import NullFormatter

    return NullFormatter()
