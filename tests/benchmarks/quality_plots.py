"""The results of the quality benchmark as pictures: the gaps of all methods, and the gap by width on the ladder."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quality_methods import AVERAGED, UNTUNED_METHODS
from quality_report import Record, Results, Row, geometric_mean
from quality_tasks import HELD_OUT_TASKS, LADDER, TASKS

from gen_dist.plots import BLACK, BLUE, GREEN, GREY, ORANGE, STYLE, VERMILION

TEXTS = ("shakespeare", "shakespeare-128", "film-reviews")
IMAGES = ("digits", "fashion-mnist", "fashion-mnist-pixels")
COLORS = {"language": BLUE, "images": ORANGE, "regression": GREEN}  # by kind of data
LOOKS = list(zip((BLACK, BLUE, "#56B4E9", GREEN, ORANGE, VERMILION, "#CC79A7", GREY), "osD^vP<>", strict=True))
WIDEST = 4.0  # gaps beyond this factor are drawn at the edge
LADDER_LINES = (  # as many as a reader can tell apart: AutoGen, what scripts have, and the best known of the rivals
    "autogen", "AdamW 0.001, warmed", "AdamW 0.0003, warmed", "schedule-free", "schedule-free-0.01",
    "schedule-free-plus-warm-up", "prodigy", "prodigy-plus",
)  # fmt: skip
TICKS = (0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1, 1.05, 1.1, 1.2, 1.4, 1.7, 2, 3, 4)


def kind(task: str) -> str:
    data = TASKS[task].data
    return "language" if data in TEXTS else "images" if data in IMAGES else "regression"


def draw(records: list[Record], seeds: list[int], path: Path) -> str:
    """Draw the gap by task and method on the left, and the rate of AutoGen over time on the right."""
    results = Results(records, seeds)
    shown = drawn(results)
    with saved(path, (13, 1.8 + 0.25 * len(shown)), columns=2) as (left, right):
        draw_gaps(left, results, shown)
        draw_rates(right, records)
        left.figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return f"wrote {path}"


def draw_ladder(records: list[Record], seeds: list[int], path: Path) -> str:
    """Draw the gap over the number of parameters, with a line a method."""
    records = [record for record in records if record["task"] in LADDER and "parameters" in record]
    results = Results(records, seeds)
    sizes = {record["task"]: record["parameters"] for record in records}
    rows = {row[0]: row for row in drawn(results)}
    lines = [rows[name] for name in LADDER_LINES if name in rows and len(results.gaps(rows[name], LADDER)) > 1]
    if not lines:
        return "no two sizes of the width ladder have results"
    with saved(path, (8, 5), columns=1) as (axes,):
        for row, (color, marker) in zip(lines, LOOKS, strict=False):
            gaps = results.gaps(row, LADDER)
            axes.plot([sizes[task] for task in gaps], list(gaps.values()), color=color, marker=marker, label=row[0])
        axes.axhline(1, color=GREY, linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="parameters", title="A GPT that grows, at one setting a method")
        axes.set_ylabel("final test loss / that of AdamW tuned, linear")
        axes.set_xticks(list(sizes.values()), [f"{size / 1e6:.2g}M" for size in sizes.values()])
        low, high = axes.get_ylim()
        axes.set_yticks([tick for tick in TICKS if low <= tick <= high])
        plain_numbers(axes.yaxis)
        axes.minorticks_off()
        axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    return f"wrote {path}"


def drawn(results: Results) -> list[Row]:
    """The rows of a picture, the best last: those that were run on half of the tasks or more.

    Of methods that average their weights, only the averages.
    """
    shown = [row for row in results.shown() if 2 * len(results.gaps(row, results.tasks)) >= len(results.tasks)]
    averaged = {row[1][0] for row in shown if row[2] == AVERAGED and row[0] in UNTUNED_METHODS}
    rows = [row for row in shown if row[2] == AVERAGED or row[1][0] not in averaged]
    return sorted(rows, key=lambda row: (len(results.gaps(row, results.tasks)), -mean_gap(results, row)))


def mean_gap(results: Results, row: Row) -> float:
    gaps = results.gaps(row, results.tasks).values()
    return geometric_mean(gaps) if gaps else math.inf


@contextmanager
def saved(path: Path, size: tuple[float, float], columns: int) -> Iterator[Any]:
    """Axes side by side, in a figure that is saved at the end."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE | {"axes.axisbelow": True}):
        figure = Figure(figsize=size, layout="constrained")
        yield figure.subplots(1, columns, squeeze=False, width_ratios=[3, 2][:columns])[0]
        figure.savefig(path, dpi=110)


def draw_gaps(axes: Any, results: Results, shown: list[Row]) -> None:
    """A point a task, filled if it is held out, and a bar at the geometric mean of each method."""
    for task in results.tasks:
        held_out = task in HELD_OUT_TASKS
        points = [within(results.gap(task, row)) for row in shown]
        color = COLORS[kind(task)]
        face = color if held_out else "none"
        label = f"{kind(task)}, {'held out' if held_out else 'design'}"
        axes.plot(points, range(len(shown)), "o", color=color, markerfacecolor=face, alpha=0.8, label=once(axes, label))
    means = [within(mean_gap(results, row)) for row in shown]
    axes.plot(means, range(len(shown)), "|", color=BLACK, markersize=13, markeredgewidth=2.5, label="geometric mean")
    axes.axvline(1, color=GREY, linewidth=1)
    axes.set(xscale="log", xlim=(0.94 / WIDEST, WIDEST * 1.06), ylim=(-0.7, len(shown) - 0.3))
    axes.set_xlabel("final loss / that of AdamW tuned, linear; points at an edge lie beyond it")
    complete = len(results.tasks)
    labels = [row[0] + missing(complete - len(results.gaps(row, results.tasks))) for row in shown]
    axes.set_yticks(range(len(shown)), labels)
    axes.set_xticks([tick for tick in TICKS if not 0.7 < tick < 1.4 or tick == 1])
    plain_numbers(axes.xaxis)


def missing(tasks: int) -> str:
    return f" ({tasks} not run)" if tasks else ""


def once(axes: Any, label: str) -> str:
    """The label, unless the legend has it."""
    return "_" if label in axes.get_legend_handles_labels()[1] else label


def within(gap: float | None) -> float:
    return math.nan if gap is None else min(max(gap, 1 / WIDEST), WIDEST)


def draw_rates(axes: Any, records: list[Record]) -> None:
    for record in (r for r in records if r["method"] == "autogen"):
        steps, rates = zip(*record["rates"], strict=True)
        values = [math.nan if rate is None else rate for rate in rates]
        axes.plot([step + 1 for step in steps], values, color=COLORS[kind(record["task"])], linewidth=1, alpha=0.7)
    axes.set(xscale="log", yscale="log", xlabel="step", title="AutoGen", ylabel="learning rate")


def plain_numbers(axis: Any) -> None:
    from matplotlib.ticker import NullFormatter

    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
