"""The results of the quality benchmark as tables.

The gap of a method on a task is its final loss divided by that of the oracle: AdamW with a linear decay to zero at the
horizon, at the best rate of the grid. The oracle knows the horizon and was tuned. Other rows of the grid can still be
better. The loss is the train loss, on the width ladder the test loss (`Task.measure`).
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from quality_methods import AVERAGED, DECAYS, GRID, LAST, METHODS, UNTUNED_METHODS, UNTUNED_RATES
from quality_tasks import DESIGN_TASKS, HELD_OUT_TASKS, TASKS

Record = dict[str, Any]
Row = tuple[str, list[str], str]  # title, methods of which the best counts, the reading

AVERAGING = ("autogen", "ablation", "dog", "ldog")  # methods whose averaged weights are their result


def group(pattern: str) -> list[str]:
    return [method for method in GRID if re.fullmatch(pattern, method)]


def rows() -> list[Row]:
    """A row of the table; a tuned row is the best of its grid on each task."""
    found: list[Row] = []
    for name, optimizer in (("AdamW", "adamw"), ("SGD", "sgd")):
        for decay in DECAYS:
            found.append((f"{name} tuned, {decay}", group(f"{optimizer}-{decay}-.*"), LAST))
        found.append((f"{name} tuned, averaged", group(f"{optimizer}-constant-.*"), AVERAGED))
    for rate in UNTUNED_RATES["constant"]:
        found.append((f"AdamW {rate:g}", [f"adamw-constant-{rate:g}"], LAST))
        found.append((f"AdamW {rate:g}, averaged", [f"adamw-constant-{rate:g}"], AVERAGED))
    found += [(f"AdamW {rate:g}, warmed", [f"adamw-warmed-{rate:g}"], LAST) for rate in UNTUNED_RATES["warmed"]]
    for method in UNTUNED_METHODS:
        if method.startswith(AVERAGING):
            found.append((method, [method], AVERAGED))
            found.append((f"{method}, not averaged", [method], LAST))
        else:
            found.append((method, [method], LAST))
    return found


class Results:
    """The losses by task, method and reading, averaged over the seeds; without those that lack a seed.

    They are what counts on each task, or one quantity of all.
    """

    def __init__(self, records: list[Record], seeds: list[int], quantity: str | None = None) -> None:
        values: dict[tuple[str, str, str], dict[int, float]] = {}
        for record in records:
            for reading, quality in record["readings"].items():
                value = quality[quantity or TASKS[record["task"]].measure]
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

    def gaps(self, row: Row, tasks: Iterable[str]) -> dict[str, float]:
        """The known gaps of a row, by task."""
        found = {task: self.gap(task, row) for task in tasks}
        return {task: gap for task, gap in found.items() if gap is not None}

    def whole(self, row: Row, tasks: Iterable[str]) -> dict[str, float] | None:
        """The gaps of a row on those of the tasks that have results; None if it was not run on all of them.

        Means over different tasks would not compare.
        """
        wanted = [task for task in self.tasks if task in tasks]
        gaps = self.gaps(row, wanted)
        return gaps if wanted and len(gaps) == len(wanted) else None


def geometric_mean(values: Iterable[float]) -> float:
    """Halved on one task and doubled on another is no change."""
    return math.exp(statistics.fmean(math.log(value) if value > 0 else -math.inf for value in values))


def seconds_per_step(records: list[Record], row: Row, task: str) -> float | None:
    """The median over the runs of the row, which does not favour rows with many runs, as the minimum does."""
    _, methods, reading = row
    runs = [r for r in records if r["task"] == task and r["method"] in methods and reading in r["readings"]]
    extra = reading == AVERAGED
    took = [(r["seconds"] + extra * r["reading_seconds"]) / r["steps"] for r in runs]
    return statistics.median(took) if took else None


def extra_time(records: list[Record], row: Row, task: str) -> float | None:
    """The share by which a step takes longer than a plain step of AdamW, at a rate that is constant or decays.

    None on tasks with SGD, whose steps are cheaper whatever the method.
    """
    plain: Row = ("", group("adamw-(constant|linear)-.*"), LAST)
    took, base = seconds_per_step(records, row, task), seconds_per_step(records, plain, task)
    return None if took is None or not base or TASKS[task].sgd else took / base - 1


def table(records: list[Record], seeds: list[int]) -> str:
    """Markdown tables from records of one length: the tasks, a summary, then losses and processor time by task."""
    results = Results(records, seeds)
    if not results.tasks:
        return f"no results of seeds {seeds}"
    shown = results.shown()
    by_task: dict[str, Callable[[Row], list[str]]] = {
        "Final loss and (gap)": lambda row: losses(results, row),
        "Test loss and accuracy, of the methods that are best": lambda row: tested(records, seeds, results, row),
        "Processor time of a step, beyond AdamW's": lambda row: [
            percent(extra_time(records, row, task)) for task in results.tasks
        ],
    }
    lines = [
        f"Means of seeds {', '.join(map(str, seeds))}. Gap 1.00 is the oracle: AdamW with linear decay, tuned.",
        "",
    ]
    lines += [*described(records, results), "", "Gaps over tasks, geometric mean and worst, and time of a step:", ""]
    lines += summary(records, results, shown)
    for title, cells in by_task.items():
        lines += ["", f"{title}:", "", *heading(["method", *results.tasks])]
        lines += [line([row[0], *cells(row)]) for row in shown]
    return "\n".join(lines)


def described(records: list[Record], results: Results) -> list[str]:
    """The tasks, and how the oracle came out on each."""
    steps = {record["task"]: record["steps"] for record in records}
    lines = heading(["task", "what", "half", "steps", "oracle", "its loss"])
    for task in results.tasks:
        loss, method = results.oracle(task)
        half = "design" if task in DESIGN_TASKS else "held out"
        what = TASKS[task].title
        lines.append(line([task, what, half, f"{steps[task]:,}", oracle_rate(task, method), number(loss)]))
    return lines


def oracle_rate(task: str, method: str) -> str:
    """The rate of the oracle, with a warning if it is at an end of the grid, where a better one may lie beyond."""
    if not method:
        return "not run"
    rate, rates = float(method.removeprefix("adamw-linear-")), TASKS[task].adamw_rates
    return f"{rate:g}" + (", an end of the grid" if rate in (min(rates), max(rates)) else "")


def losses(results: Results, row: Row) -> list[str]:
    return [cell(*results.best(task, *row[1:]), results.gap(task, row)) for task in results.tasks]


HALVES = {"": tuple(TASKS), ", design": DESIGN_TASKS, ", held out": HELD_OUT_TASKS}


def summary(records: list[Record], results: Results, shown: list[Row]) -> list[str]:
    """Over all tasks and over each half, and the processor time; blank where a method was not run on all."""
    header = ["method", *(f"{what}{half}" for half in HALVES for what in ("mean", "worst")), "time"]
    return [*heading(header), *(line([row[0], *summarised(records, results, row)]) for row in shown)]


def summarised(records: list[Record], results: Results, row: Row) -> list[str]:
    cells: list[str] = []
    for tasks in HALVES.values():
        gaps = results.whole(row, tasks)
        if gaps is None:
            cells += ["", ""]
        else:
            worst = max(gaps, key=lambda task: gaps[task])
            cells += [number(geometric_mean(gaps.values()), 2), f"{number(gaps[worst], 2)} ({worst})"]
    extra = [extra_time(records, row, task) for task in results.tasks]
    known = [share for share in extra if share is not None]
    return [*cells, percent(statistics.fmean(known) if known else None)]


def cell(loss: float, method: str, gap: float | None) -> str:
    if not method:
        return ""
    return number(loss) if gap is None else f"{number(loss)} ({number(gap, 2)})"


def ablations(records: list[Record], seeds: list[int]) -> str:
    """The losses with a constant of the rule changed, over those of the rule: geometric mean and extremes."""
    results = Results(records, seeds)
    lines = heading(["change", "mean", "best", "worst"])
    for method in METHODS:
        if not method.startswith("ablation-"):
            continue
        pairs = {task: [results.means.get((task, m, AVERAGED)) for m in (method, "autogen")] for task in results.tasks}
        ratios = {task: changed / plain for task, (changed, plain) in pairs.items() if changed and plain}
        if ratios:
            ends = (f"{number(ratios[t], 2)} ({t})" for t in (min(ratios, key=ratios.get), max(ratios, key=ratios.get)))
            lines.append(line([method.removeprefix("ablation-"), number(geometric_mean(ratios.values())), *ends]))
    return "\n".join(lines)


def tested(records: list[Record], seeds: list[int], results: Results, row: Row) -> list[str]:
    loss, accuracy = (Results(records, seeds, quantity) for quantity in ("test_loss", "accuracy"))
    found = []
    for task in results.tasks:
        key = (task, results.best(task, *row[1:])[1], row[2])
        right = accuracy.means.get(key, math.inf)  # infinite where there are no classes
        found.append(number(loss.means.get(key)) + (f", {right:.1%}" if math.isfinite(right) else ""))
    return found


def percent(share: float | None) -> str:
    return "" if share is None else f"{round(100 * share):+d} %"


def number(value: float | None, digits: int = 3) -> str:
    """Format a loss with three decimals, or with more if it is near zero."""
    if value is None:
        return ""
    return f"{value:.{digits}f}" if value == 0 or abs(value) >= 0.05 else f"{value:.2g}"


def heading(cells: list[str]) -> list[str]:
    return [line(cells), line(["---"] * len(cells))]


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
