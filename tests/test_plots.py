"""Pictures of a run: what they show, from records, from a file, and with gaps."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import gen_dist as gen
from gen_dist.plots import RecordedLine

RATES = [0.0, 0.1, 0.2, 0.3, 0.4]
LINE = RecordedLine(8, RATES, [1.0, 0.8, 0.9, 1.4, math.inf], [1.0, 0.85, 0.8, 0.85, 1.0], 0.1, minimum=0.2, lr_max=0.1)
REASONS = ["accepted", "clamped", "shortened", "curvature not positive", None]
RECORDS: list[dict[str, Any]] = [
    {"step": i + 1, "loss": 2.0 - i / 10, "lr": 0.1 - 0.01 * i, "lr_min": 0.0, "lr_max": 0.2, "reason": reason}
    for i, reason in enumerate(REASONS)
]


def labels(axes: Axes) -> list[str]:
    return axes.get_legend_handles_labels()[1]


def drawn(figure: Figure) -> Figure:
    """The figure, rendered, which fails if a layout or a scale cannot take the data."""
    figure.canvas.draw()
    return figure


def test_rates_and_what_became_of_them() -> None:
    (axes,) = drawn(gen.plots.rate_figure(RECORDS)).axes
    assert labels(axes) == ["accepted", "clamped", "shortened", "declined"]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()) == ("step", "learning rate", "log")
    assert [text.get_text() for text in axes.texts] == ["lr_max"]
    marked = {scatter.get_label(): scatter.get_offsets().tolist() for scatter in axes.collections}  # type: ignore[union-attr]
    assert marked["declined"] == [[4.0, pytest.approx(0.07)]]


def test_the_loss_and_its_running_mean() -> None:
    gap = {"step": 6, "loss": None, "lr": 0.1}
    (axes,) = drawn(gen.plots.loss_figure([*RECORDS, gap])).axes
    assert labels(axes) == ["each step", "running mean"]
    assert math.isnan(axes.lines[0].get_ydata()[-1])  # type: ignore[index, arg-type]


def test_lines_against_their_parabolas() -> None:
    figure = drawn(gen.plots.line_figure([LINE, LINE._replace(step=9)]))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Step 8", "Step 9"]
    (legend,) = figure.legends
    shown = {text.get_text() for text in legend.get_texts()}
    assert shown == {"true loss", "parabola", "clamp", "chosen rate", "minimum of the parabola"}
    top = figure.axes[0].get_ylim()[1]
    assert 1.4 <= top < 2.0, "an infinite loss must not stretch the picture"


def test_what_was_watched() -> None:
    history = [gen.Watched(i, 0.1 / i, 0.2 * i, 0.4 * i, 1.0, 1.0, 1.0) for i in (1, 2, 3)]
    history[1] = history[1]._replace(minimum=None, edge=None, reason="curvature not positive")
    (axes,) = drawn(gen.plots.watch_figure(history)).axes
    assert labels(axes) == ["learning rate", "minimum along the step", "edge of stability"]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()) == ("step", "learning rate", "log")
    rate, minimum, *_ = (line.get_ydata() for line in axes.lines)
    assert list(rate) == [0.1 / i for i in (1, 2, 3)]  # type: ignore[arg-type]
    assert list(minimum) == pytest.approx([0.2, math.nan, 0.6], nan_ok=True)  # type: ignore[arg-type]
    two = drawn(gen.plots.watch_figure({"low": history, "high": [each._asdict() for each in history]}))
    assert [axes.get_title(loc="left") for axes in two.axes] == ["low", "high"]
    with pytest.raises(ValueError, match="no run to draw"):
        gen.plots.watch_figure({})


def test_records_of_every_kind(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with_line = [RECORDS[0] | {"line": LINE._replace(losses=[1.0, 0.8, 0.9, 1.4, None])._asdict()}, *RECORDS[1:]]
    path.write_text("".join(json.dumps(record) + "\n" for record in with_line))
    for records in (path, str(path), with_line, iter(with_line)):
        assert len(drawn(gen.plots.training_figure(records)).axes) == 3
    assert len(gen.plots.line_figure(path).axes) == 1
    assert len(gen.plots.training_figure(RECORDS, [LINE, LINE]).axes) == 4
    updates = [gen.Update(0.1, 1.0, 10.0, 2.0, "accepted"), gen.Update(0.2, 1.0, 5.0, 1.5, "clamped")]
    (axes,) = drawn(gen.plots.rate_figure(updates)).axes
    assert list(axes.lines[0].get_xdata()) == [1, 2]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "records",
    [
        [{"step": 1, "loss": math.nan, "lr": 0.0, "reason": "not finite"}],
        [{"step": 1, "loss": None, "lr": None}],
        [{"loss": 0.0, "lr": 1e-3, "lr_min": 1e-3, "lr_max": 1e-3, "reason": "clamped"}],
    ],
)
def test_a_run_that_went_wrong_is_drawn_all_the_same(records: list[dict[str, Any]]) -> None:
    drawn(gen.plots.training_figure(records))


def test_nothing_to_draw_is_told() -> None:
    for function in (
        gen.plots.training_figure,
        gen.plots.loss_figure,
        gen.plots.rate_figure,
        gen.plots.watch_figure,
    ):
        with pytest.raises(ValueError, match="no records to draw"):
            function([])
    with pytest.raises(ValueError, match="no line to draw"):
        gen.plots.line_figure(RECORDS)


def test_the_library_needs_neither_matplotlib_nor_numpy_nor_tqdm() -> None:
    program = """
import sys
for name in ("matplotlib", "numpy", "tqdm"):
    sys.modules[name] = None
import gen_dist as gen
try:
    gen.plots.loss_figure([{"loss": 1.0, "lr": 0.1}])
except ImportError as error:
    assert "gen_dist[plots]" in str(error), error
else:
    raise AssertionError("drawn without matplotlib")
imported = {"torch._dynamo", "torch.distributed.fsdp"} & sys.modules.keys()
assert not imported, imported  # with them, a job of DDP on gloo may hang at its end
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
