"""The figure of one run: metric and technique over the epochs, and what is left of each layer."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import groupby
from typing import TYPE_CHECKING

from lightning_compress.report.metric import Metric
from lightning_compress.report.summary import Epoch, Layer, Point, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

BLUE, ORANGE, GREY, LIGHT = "#1f5fa8", "#d9822b", "#5c6670", "#e6eaee"


def can_draw() -> bool:
    """Return whether matplotlib is installed; where it is not, a warning says what to install."""
    found = find_spec("matplotlib") is not None
    if not found:
        log.warning("No figure is drawn without matplotlib: pip install 'lightning-compress[figures]'.")
    return found


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure that needs no display and leaves matplotlib's global state alone.

    Args:
        width: Inches.
        height: Inches.

    Raises:
        ImportError: matplotlib is not installed; the message names the extra that installs it.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError(
            "Figures are drawn with matplotlib, and it is not installed: pip install 'lightning-compress[figures]'."
        ) from error
    figure = Figure(figsize=(width, height), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    FigureCanvasAgg(figure)
    return figure


def report_figure(report: Report) -> Figure:
    """Return the figure of report.png.

    Its left panel shows the validation metric over the epochs, with the first number of the first technique that names
    one, such as the sparsity. The next panel shows the layers, and a third one, where the network can be run in several
    ways, the test's metric by time.

    Raises:
        ImportError: matplotlib is not installed.
    """
    height = min(max(4.6, 1.6 + 0.3 * len(report.layers)), 16)
    if report.points:
        figure = new_figure(18, height)
        left, right, last = figure.subplots(1, 3, width_ratios=(1.15, 1, 1.15))
        _draw_points(last, report.points, report.tested)
    else:
        figure = new_figure(12, height)
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    _draw_history(left, report.history, report.validated)
    _draw_layers(right, report.layers)
    return figure


def _draw_points(axes: Axes, points: Sequence[Point], metric: Metric) -> None:
    axes.set_title(f"{metric.name} by time", loc="left", fontweight="bold", pad=22)
    tidy(axes)
    axes.set_xlabel("latency of a batch (ms)")
    axes.set_ylabel(metric.label)
    for kind, color, marker in (
        ("point", BLUE, "o"),
        ("variant", BLUE, "^"),
        ("control", ORANGE, "s"),
        ("dense", GREY, "D"),
    ):
        known = [(one, one.test_metric) for one in points if one.kind == kind and one.test_metric is not None]
        places = [(one.latency_ms, metric.scaled(value)) for one, value in known]
        axes.plot([x for x, _ in places], [y for _, y in places], marker, color=color, label=kind)
        for (one, _), place in zip(known, places, strict=True):
            axes.annotate(one.name, place, xytext=(4, 4), textcoords="offset points", fontsize=8, color=color)
    axes.legend(frameon=False, loc="lower right")


def _draw_history(axes: Axes, history: Sequence[Epoch], metric: Metric) -> None:
    number = next(iter(history[-1].numbers), None) if history else None
    title = f"{metric.name} and {number}" if number else metric.name
    axes.set_title(f"{title} over the epochs", loc="left", fontweight="bold", pad=22)
    tidy(axes)
    axes.set_xlabel("epoch")
    axes.set_ylabel(metric.label, color=BLUE)
    axes.tick_params(axis="y", colors=BLUE)
    if not history:
        empty(axes, "no epoch was trained")
        return
    from matplotlib.ticker import MaxNLocator

    numbers = range(1, len(history) + 1)  # through all fits, each of which calls its first epoch 0
    if number is not None:
        _draw_number(axes, number, [entry.numbers.get(number, math.nan) for entry in history])
    validated = [
        (i, metric.scaled(entry.val_metric))
        for i, entry in zip(numbers, history, strict=True)
        if entry.val_metric is not None
    ]
    marker = "o" if len(history) <= 40 else None
    axes.plot(
        [i for i, _ in validated], [y for _, y in validated], color=BLUE, linewidth=2, marker=marker, markersize=3.5
    )
    axes.set_xlim(0.5, len(history) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    phases = [(phase, len(list(members))) for phase, members in groupby(history, key=lambda entry: entry.phase)]
    _mark_phases(axes, phases)
    if limits := vertical_range(history, metric):
        axes.set_ylim(*limits)


def vertical_range(history: Sequence[Epoch], metric: Metric) -> tuple[float, float] | None:
    """Return the range of the metric that a chart over the epochs shows; None where nothing was validated.

    The dense training begins far below the rest, and its first half may leave the frame: compression costs only a few
    points, and they must be visible.
    """
    phases = [len(list(members)) for _, members in groupby(history, key=lambda entry: entry.phase)]
    hidden = phases[0] // 2 if len(phases) > 1 else 0
    shown = [metric.scaled(entry.val_metric) for entry in history[hidden:] if entry.val_metric is not None]
    if not shown:
        return None
    margin = max(0.08 * (max(shown) - min(shown)), 0.2 if metric.share else 1e-3)
    return min(shown) - margin, max(shown) + margin


def _draw_number(axes: Axes, name: str, values: Sequence[float]) -> None:
    """Draw a technique's number as an area behind the metric; NaN marks epochs that do not have it."""
    behind = axes.twinx()
    edges = [i + 0.5 for i in range(len(values) + 1)]
    behind.stairs(values, edges, fill=True, color=ORANGE, alpha=0.16)
    behind.stairs(values, edges, color=ORANGE, linewidth=1.2)
    known = [value for value in values if not math.isnan(value)]
    behind.set_ylim(1.05 * min(0, *known), 1.05 * max(1, *known))
    behind.set_ylabel(name, color=ORANGE)
    behind.tick_params(axis="y", colors=ORANGE, length=0, labelsize=9)
    behind.spines[:].set_visible(False)
    axes.set_zorder(behind.get_zorder() + 1)
    axes.patch.set_visible(False)


def _mark_phases(axes: Axes, phases: Sequence[tuple[str, int]]) -> None:
    begin = 0.5
    for phase, epochs in phases:
        if begin > 0.5:
            axes.axvline(begin, color=GREY, linewidth=0.8, linestyle=":")
        axes.annotate(
            phase,
            (begin + epochs / 2, 1.0),
            xycoords=axes.get_xaxis_transform(),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            color=GREY,
            fontsize=9,
        )
        begin += epochs


def _draw_layers(axes: Axes, layers: Sequence[Layer]) -> None:
    axes.set_title("What is left of each layer", loc="left", fontweight="bold", pad=22)
    tidy(axes)
    if not layers:
        empty(axes, "no layer was compared")
        return
    kept, total = sum(layer.nonzero_compressed for layer in layers), sum(layer.parameters for layer in layers)
    axes.annotate(
        f"together {kept:,} of {total:,}  ({100 * kept / total:.1f} %)",
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 4),
        textcoords="offset points",
        color=GREY,
        fontsize=9,
    )
    rows = range(len(layers))
    left = [100 * layer.nonzero_compressed / layer.parameters for layer in layers]
    axes.barh(rows, [100] * len(layers), color=LIGHT, height=0.72)
    axes.barh(rows, left, color=BLUE, height=0.72)
    for row, layer, share in zip(rows, layers, left, strict=True):
        axes.text(
            101.5,
            row,
            f"{layer.nonzero_compressed:,} of {layer.parameters:,}  ({share:.1f} %)",
            va="center",
            fontsize=8.5,
            color=GREY,
        )
    axes.set_yticks(rows, [layer.name for layer in layers])
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_xlabel("non-zero parameters left (%)")
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)


def tidy(axes: Axes) -> None:
    """Give axes the style that all figures of this package share."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=GREY, labelsize=9)
    axes.grid(axis="y", color=LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)


def empty(axes: Axes, reason: str) -> None:
    """Write into empty axes the reason why they are empty."""
    axes.text(0.5, 0.5, reason, transform=axes.transAxes, ha="center", va="center", color=GREY)
    axes.set_xticks([])
    axes.set_yticks([])
