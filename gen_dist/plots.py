"""Pictures of a training run."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]

# Okabe and Ito's colours, which stay apart for colour-blind readers; the markers differ as well.
BLUE, ORANGE, VERMILION, GREY, BLACK = "#0072B2", "#E69F00", "#D55E00", "#8C8C8C", "#222222"

STYLE: Any = {
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.labelcolor": BLACK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "font.size": 9.5,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "xtick.color": BLACK,
    "ytick.color": BLACK,
}


class Line(NamedTuple):
    """The loss along the direction of one step: `losses` as they are, `parabola` as it was fitted."""

    step: int
    learning_rates: Sequence[float]
    losses: Sequence[float]
    parabola: Sequence[float]
    chosen: float


def training_figure(records: str | Path | Iterable[Record], lines: Iterable[Line] = ()) -> "Figure":
    """A run at a glance: the loss and the learning rate over the steps, and the line against its parabola.

    `records` has one mapping a step, or is the path of a file with one JSON object a line. Used are `step`,
    `loss`, `lr` and, where present, `lr_min`, `lr_max` and `reason`: "accepted", "clamped", why an update was
    declined, or None at a step without one. A number that was not finite may be None.

    Raises `ValueError` when there are no records, `ImportError` without matplotlib.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "gen_dist[plots]"') from error

    records = _read(records) if isinstance(records, str | Path) else list(records)
    lines = list(lines)
    if not records:
        raise ValueError("there are no records to draw: give one mapping a step")
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 6.2 if lines else 3.2), layout="constrained")
        width = max(len(lines), 1)
        grid = figure.add_gridspec(2 if lines else 1, 2 * width, hspace=0.12)
        _draw_loss(figure.add_subplot(grid[0, :width]), records)
        _draw_rate(figure.add_subplot(grid[0, width:]), records)
        for i, line in enumerate(lines):
            axes = figure.add_subplot(grid[1, 2 * i : 2 * i + 2])
            _draw_line(axes, line)
            if i == 0:
                axes.set_ylabel("loss along the direction")
                figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _read(path: str | Path) -> list[Record]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _draw_loss(axes: "Axes", records: Sequence[Record]) -> None:
    steps = _column(records, "step")
    losses = _column(records, "loss")
    finite = [loss for loss in losses if math.isfinite(loss)]
    logarithmic = bool(finite) and 0 < 20 * min(finite) < max(finite)
    axes.plot(steps, losses, color=BLUE, alpha=0.3, linewidth=0.8, label="each step")
    axes.plot(steps, _smoothed(losses, logarithmic), color=BLUE, linewidth=1.8, label="running mean")
    if logarithmic:
        axes.set_yscale("log")
    axes.set(title="Training loss", xlabel="step", ylabel="loss")
    axes.margins(x=0.02)
    _put_legend_beside_title(axes)


def _draw_rate(axes: "Axes", records: Sequence[Record]) -> None:
    axes.plot(_column(records, "step"), _column(records, "lr"), color=GREY, linewidth=0.6, alpha=0.6, zorder=1)
    marks: dict[str, dict[str, Any]] = {
        "accepted": {"marker": "o", "s": 9, "color": BLUE, "linewidth": 0},
        "clamped": {"marker": "^", "s": 22, "color": ORANGE, "linewidth": 0},
        "declined": {"marker": "x", "s": 22, "color": VERMILION, "linewidth": 1.1},
    }
    for kind, mark in marks.items():
        marked = [record for record in records if _kind(record) == kind]
        if marked:
            axes.scatter(_column(marked, "step"), _column(marked, "lr"), label=kind, zorder=3, **mark)
    for bound in ("lr_min", "lr_max"):
        _draw_bound(axes, records, bound)
    axes.set(title="Learning rate", xlabel="step", ylabel="learning rate")
    axes.margins(x=0.02, y=0.12)
    if any(rate > 0 for rate in _column(records, "lr")):
        _scale_rates(axes)
    if axes.collections:
        _put_legend_beside_title(axes)


def _scale_rates(axes: "Axes") -> None:
    """A logarithmic axis, with plain numbers between the powers of ten where these are few."""
    axes.set_yscale("log", nonpositive="mask")
    lowest, highest = axes.get_ylim()
    axes.yaxis.set_minor_formatter("")
    if highest < 100 * lowest:
        axes.set_yscale("log", subs=(2, 5), nonpositive="mask")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")


def _draw_bound(axes: "Axes", records: Sequence[Record], bound: str) -> None:
    drawn = [record for record in records if 0 < (record.get(bound) or 0) < math.inf]
    if drawn:
        values = _column(drawn, bound)
        axes.plot(_column(drawn, "step"), values, color=BLACK, linewidth=1, linestyle=(0, (5, 3)))
        axes.annotate(
            bound,
            (drawn[-1]["step"], values[-1]),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            color=BLACK,
        )


def _draw_line(axes: "Axes", line: Line) -> None:
    axes.plot(line.learning_rates, line.losses, color=BLUE, linewidth=1.8, label="true loss")
    axes.plot(line.learning_rates, line.parabola, color=ORANGE, linewidth=1.8, linestyle="--", label="parabola")
    axes.axvline(line.chosen, color=BLACK, linewidth=1, linestyle=":", label="chosen rate")
    axes.set(title=f"Step {line.step:,}", xlabel="learning rate")
    lowest, highest = min(*line.losses, *line.parabola), max(line.losses)
    margin = 0.08 * (highest - lowest)
    if 0 < margin < math.inf:
        # A parabola that leaves the loss far behind would flatten everything else.
        axes.set_ylim(lowest - margin, highest + margin)
    axes.locator_params(nbins=5)
    axes.yaxis.set_major_formatter("{x:g}")


def _put_legend_beside_title(axes: "Axes") -> None:
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1, 0.99),
        ncols=3,
        columnspacing=0.8,
        handlelength=1.2,
        handletextpad=0.4,
        borderpad=0,
    )


def _kind(record: Record) -> str | None:
    reason = record.get("reason")
    return reason if reason in ("accepted", "clamped", None) else "declined"


def _column(records: Iterable[Record], name: str) -> list[float]:
    return [math.nan if record[name] is None else record[name] for record in records]


def _smoothed(values: Sequence[float], logarithmic: bool, memory: float = 0.9) -> list[float]:
    """The exponentially weighted mean so far, of the logarithms if the eye sees those; NaN until there is one."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = memory * total, memory * weight
        if math.isfinite(value):
            total += math.log(value) if logarithmic else value
            weight += 1
        mean = total / weight if weight else math.nan
        smoothed.append(math.exp(mean) if logarithmic else mean)
    return smoothed
