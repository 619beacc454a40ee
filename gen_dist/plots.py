"""Pictures of a training run. Each function returns a `matplotlib.figure.Figure`: `.savefig("run.png")`.

`records` are one mapping a step, such as `{"step": 1, "loss": 2.3, **scheduler.last._asdict()}`, or the path of a file
with one JSON object a line; `scheduler.last` itself is one too. Used are `step`, `loss`, `lr` and, where present,
`lr_min`, `lr_max` and `reason`: "accepted", "clamped", "shortened", why an update was declined, or None at a step
without one. A number that was not finite may be None. Records without a `step` are numbered from 1. `watch_figure`
takes `watch.history`, and uses `step`, `lr`, `minimum` and `edge`.

All raise `ValueError` where there is nothing to draw, and `ImportError` without matplotlib.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gen_dist.update import Update
    from gen_dist.watch import Watched

    Records = str | Path | Iterable[Mapping[str, Any] | Update | Watched]

Record = Mapping[str, Any]

# Okabe and Ito's colours, which stay apart for colour-blind readers; the markers differ as well.
BLUE, ORANGE, VERMILION, GREEN, GREY, BLACK = "#0072B2", "#E69F00", "#D55E00", "#009E73", "#8C8C8C", "#222222"
MINIMUM: Any = {
    "color": ORANGE,
    "marker": "o",
    "markersize": 7,
    "markeredgecolor": BLACK,
    "markeredgewidth": 0.8,
    "linestyle": "none",
    "zorder": 4,
    "label": "minimum of the parabola",
}

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


class RecordedLine(NamedTuple):
    """The loss along the direction of one step: `losses` as they are, `parabola` as it was fitted."""

    step: int
    learning_rates: Sequence[float]
    losses: Sequence[float]
    parabola: Sequence[float]
    chosen: float
    minimum: float | None = None  # of the parabola
    lr_min: float = 0.0
    lr_max: float = math.inf


def loss_figure(records: "Records") -> "Figure":
    """Draw the training loss over the steps, and its running mean."""
    return _one_panel(_draw_loss, _records(records))


def rate_figure(records: "Records") -> "Figure":
    """Draw the learning rate over the steps, and how each update ended: accepted, clamped, shortened or declined."""
    return _one_panel(_draw_rate, _records(records))


def line_figure(records: "Records | Iterable[RecordedLine]") -> "Figure":
    """Draw the loss along the direction and its parabola, for each `RecordedLine` or record with one as its `line`."""
    lines = list(_each_line(_records(records) if isinstance(records, str | Path) else records))
    if not lines:
        raise ValueError("there is no line to draw: give gen_dist.plots.RecordedLine, or records with a 'line'")
    columns = min(len(lines), 3)
    rows = math.ceil(len(lines) / columns)
    with _style():
        figure = _figure(3.4 * columns if columns > 1 else 5.5, 2.6 * rows + 0.6)
        _draw_lines(figure, [figure.add_subplot(rows, columns, i + 1) for i in range(len(lines))], lines)
    return figure


def training_figure(records: "Records", lines: Iterable[RecordedLine] = ()) -> "Figure":
    """Draw a run at a glance: loss and learning rate over the steps, and the loss along the direction.

    Draws `lines`, or else the `line` of each record that has one.
    """
    records = _records(records)
    lines = list(lines) or list(_each_line(records))
    with _style():
        figure = _figure(10, 6.2 if lines else 3.2)
        width = max(len(lines), 1)
        grid = figure.add_gridspec(2 if lines else 1, 2 * width, hspace=0.12)
        _draw_loss(figure.add_subplot(grid[0, :width]), records)
        _draw_rate(figure.add_subplot(grid[0, width:]), records)
        _draw_lines(figure, [figure.add_subplot(grid[1, 2 * i : 2 * i + 2]) for i in range(len(lines))], lines)
    return figure


def watch_figure(runs: "Records | Mapping[str, Records]") -> "Figure":
    """Draw what `Watch` saw, from `watch.history`; or several runs side by side, from a mapping of titles to them.

    How to read it: a rate far below the minimum is too low; above the edge, the loss rises along the step.
    """
    histories = {title: _records(run) for title, run in (runs if isinstance(runs, Mapping) else {"Rate": runs}).items()}
    if not histories:
        raise ValueError("there is no run to draw: give watch_figure(watch.history)")
    with _style():
        figure = _figure(3.4 * len(histories) if len(histories) > 1 else 6, 3.6)
        panels = figure.subplots(1, len(histories), squeeze=False, sharey=True)[0]
        for axes, (title, history) in zip(panels, histories.items(), strict=True):
            _draw_watched(axes, history)
            axes.set(title=title, xlabel="step")
        panels[0].set_ylabel("learning rate")
        _legend_below(figure, panels)
    return figure


def suggestion_figure(suggestion: Any) -> "Figure":
    """Draw a `Suggestion`: the true line over all rates tried, and near its rate the parabola."""
    rate = suggestion.rate
    near = rate is not None
    if not (suggestion.scan.rates or near):
        raise ValueError(f"there is nothing to draw: {suggestion!r}")
    with _style():
        figure = _figure(10 if near else 5.5, 3.8)
        _draw_scan(figure.add_subplot(1, 2 if near else 1, 1), suggestion)
        if rate is not None:
            _draw_suggested(figure.add_subplot(1, 2, 2), suggestion, rate)
        _legend_below(figure, figure.axes)
    return figure


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _one_panel(draw: "Callable[[Axes, Sequence[Record]], None]", records: Sequence[Record]) -> "Figure":
    with _style():
        figure = _figure(6, 3.2)
        draw(figure.add_subplot(), records)
    return figure


def _style() -> AbstractContextManager[None]:
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "gen_dist[plots]"') from error
    return rc_context(STYLE)


def _records(records: "Records") -> list[Record]:
    """One mapping a step, each with its number."""
    if isinstance(records, str | Path):
        with open(records, encoding="utf-8") as file:
            found = [json.loads(line) for line in file if line.strip()]
    else:
        found = [record._asdict() if hasattr(record, "_asdict") else record for record in records]
    if not found:
        raise ValueError("there are no records to draw: give one mapping a step")
    return [record if "step" in record else {**record, "step": i} for i, record in enumerate(found, 1)]


def _each_line(records: Iterable[Any]) -> Iterator[RecordedLine]:
    for record in records:
        if isinstance(record, RecordedLine):
            yield record
        elif isinstance(record, Mapping) and record.get("line") is not None:
            line = record["line"]
            yield line if isinstance(line, RecordedLine) else _line(line)


def _line(written: Mapping[str, Any]) -> RecordedLine:
    """A line that was read from a file, where None stands for what was not finite."""
    line = RecordedLine(**written)
    return line._replace(
        losses=[math.nan if loss is None else loss for loss in line.losses],
        parabola=[math.nan if loss is None else loss for loss in line.parabola],
        lr_max=math.inf if line.lr_max is None else line.lr_max,
    )


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
        "shortened": {"marker": "s", "s": 14, "color": GREEN, "linewidth": 0},
        "declined": {"marker": "x", "s": 22, "color": VERMILION, "linewidth": 1.1},
    }
    for kind, mark in marks.items():
        marked = [record for record in records if _kind(record) == kind]
        if marked:
            axes.scatter(_column(marked, "step"), _column(marked, "lr"), label=kind, zorder=3, **mark)
    for bound in ("lr_min", "lr_max"):
        _draw_bound(axes, records, bound)
    axes.set(title="Rate", xlabel="step", ylabel="learning rate")
    axes.margins(x=0.02, y=0.12)
    if any(rate > 0 for rate in _column(records, "lr")):
        _scale_rates(axes)
    if axes.collections:
        _put_legend_beside_title(axes)


def _draw_watched(axes: "Axes", history: Sequence[Record]) -> None:
    """The rate, and what was seen at each look with its running mean; gaps where a step had no minimum."""
    steps, rates = _column(history, "step"), _column(history, "lr")
    axes.plot(steps, rates, color=BLUE, linewidth=1.8, label="learning rate")
    for name, color, style, label in (
        ("minimum", ORANGE, "-", "minimum along the step"),
        ("edge", VERMILION, "--", "edge of stability"),
    ):
        seen = _column(history, name)
        axes.plot(steps, seen, ".", color=color, markersize=3, alpha=0.5)
        axes.plot(steps, _smoothed(seen, True, 0.7), color=color, linewidth=1.8, linestyle=style, label=label)
    axes.margins(x=0.02)
    if any(rate > 0 for rate in rates):
        axes.set_yscale("log", nonpositive="mask")


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
            xytext=(0, 5),
            textcoords="offset points",
            ha="right",
            color=BLACK,
        )


def _draw_lines(figure: "Figure", panels: Sequence["Axes"], lines: Sequence[RecordedLine]) -> None:
    for axes, line in zip(panels, lines, strict=True):
        _draw_line(axes, line, f"Step {line.step:,}", min(line.parabola))
    if panels:
        panels[0].set_ylabel("loss along the direction")
        _legend_below(figure, panels)


def _draw_line(axes: "Axes", line: RecordedLine, title: str, lowest: float) -> None:
    """The true loss and its parabola, whose minimum has the loss `lowest`."""
    _draw_curve(axes, line.learning_rates, line.losses)
    axes.plot(line.learning_rates, line.parabola, color=ORANGE, linewidth=1.8, linestyle="--", label="parabola")
    _draw_choice(axes, line.chosen, line.lr_min, line.lr_max, line.learning_rates)
    axes.set(title=title, xlabel="learning rate")
    _frame(axes, line.losses, line.parabola)
    _draw_minimum(axes, line.minimum, lowest)


def _draw_scan(axes: "Axes", suggestion: Any) -> None:
    rates, losses = suggestion.scan
    _draw_curve(axes, rates, losses)
    axes.axhline(suggestion.loss, color=GREY, linewidth=1, zorder=1, label="loss now")
    _draw_choice(axes, suggestion.rate, suggestion.lr_min, suggestion.lr_max, (0.0, *rates))
    axes.set_xscale("log")
    title = "All rates tried" if suggestion.rate is not None else f"No rate: {suggestion.reason}"
    axes.set(title=title, xlabel="learning rate", ylabel="loss after one step")
    finite = [loss for loss in losses if math.isfinite(loss)]
    fall = max(suggestion.loss - min(finite, default=0.0), 0.02 * abs(suggestion.loss))
    if finite and fall > 0:
        axes.set_ylim(min(*finite, suggestion.loss) - 0.15 * fall, suggestion.loss + fall)


def _draw_suggested(axes: "Axes", suggestion: Any, rate: float) -> None:
    rates, losses = suggestion.line
    loss, slope, curvature = suggestion.loss, suggestion.slope, suggestion.curvature
    parabola = [loss + slope * a + curvature * a**2 / 2 for a in rates]
    line = RecordedLine(0, rates, losses, parabola, rate, suggestion.minimum, suggestion.lr_min, suggestion.lr_max)
    _draw_line(axes, line, f"Near the suggested {rate:.3g}", loss + slope * (suggestion.minimum or 0.0) / 2)


def _draw_curve(axes: "Axes", rates: Sequence[float], losses: Sequence[float]) -> None:
    axes.plot(rates, losses, color=BLUE, linewidth=1.8, label="true loss")


def _draw_choice(axes: "Axes", chosen: float | None, lr_min: float, lr_max: float, rates: Sequence[float]) -> None:
    """The rate, and the clamp as far as the picture reaches."""
    for bound in (lr_min, lr_max):
        if min(rates) < bound <= 1.01 * max(rates):
            axes.axvline(bound, color=VERMILION, linewidth=4, alpha=0.35, label="clamp")
    if chosen is not None:
        axes.axvline(chosen, color=BLACK, linewidth=1, linestyle=":", label="chosen rate")


def _draw_minimum(axes: "Axes", rate: float | None, loss: float) -> None:
    """The minimum of the parabola, where the picture reaches it."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    if rate is not None and left <= rate <= right and low <= loss <= high:
        axes.plot([rate], [loss], **MINIMUM)


def _frame(axes: "Axes", losses: Sequence[float], parabola: Sequence[float]) -> None:
    """A parabola that leaves the loss far behind would flatten everything else, and so would a loss that explodes."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if finite:
        start, least = finite[0], min(finite)
        fall = start - least
        lowest = max(min(*finite, *parabola), least - 2 * fall) if fall > 0 else least
        highest = min(max(finite), start + 2 * fall) if fall > 0 else max(finite)
        margin = 0.08 * (highest - lowest)
        if margin > 0:
            axes.set_ylim(lowest - margin, highest + margin)
    axes.locator_params(nbins=5)
    axes.ticklabel_format(axis="x", scilimits=(-3, 4))
    axes.yaxis.set_major_formatter("{x:g}")


def _legend_below(figure: "Figure", panels: Sequence["Axes"]) -> None:
    """One for all panels, each entry once."""
    entries: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        entries.update(zip(labels, handles, strict=True))
    columns = len(entries) if figure.get_figwidth() > 7 else 3
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)


def _put_legend_beside_title(axes: "Axes") -> None:
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1, 0.99),
        ncols=4,
        fontsize=9,
        columnspacing=0.7,
        handlelength=1.0,
        handletextpad=0.3,
        borderpad=0,
    )


def _kind(record: Record) -> str | None:
    reason = record.get("reason")
    return reason if reason in ("accepted", "clamped", "shortened", None) else "declined"


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
