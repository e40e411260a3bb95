"""A comparison of many runs in one table and one figure, from the report.json files below a folder."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from lightning_compress.report.figure import BLUE, GREY, LIGHT, ORANGE, empty, new_figure, tidy
from lightning_compress.report.metric import Metric
from lightning_compress.report.renamed import translated
from lightning_compress.report.summary import Measurement, Report
from lightning_compress.report.tables import flatten, markdown_table
from lightning_compress.report.write import write_figure, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COSTS = ("non-zeros", "bytes", "smaller", "ms", "faster")  # the ratios to the dense costs follow bytes and ms
NARROW = 110  # characters; a narrower terminal shows only the ratios, and comparison.md shows all columns


@dataclass(frozen=True)
class Run:
    """A report and the name of its folder, relative to the folder that was searched."""

    name: str
    report: Report


@dataclass(frozen=True)
class Comparison:
    """The runs below a folder, and the reports that can't be read.

    Attributes:
        runs: The runs in the order of their folders' names, in which numbers are ordered by value.
        unreadable: One sentence for each incomplete report.json, which names the file and the fault.
    """

    runs: tuple[Run, ...]
    unreadable: tuple[str, ...] = ()


def gather(folder: str | Path) -> Comparison:
    """Read every report.json below a folder.

    Raises:
        ValueError: The folder does not exist, or there is no complete report.json below it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give the one that the runs to compare are in.")
    paths = sorted(folder.rglob("report.json"), key=_natural)
    runs, unreadable = [], []
    for path in paths:
        try:
            report = Report.load(path)
        except ValueError as error:
            unreadable.append(str(error))
            continue
        settings = translated(report.settings)  # a renamed key has one column for runs before and after
        name = path.parent.relative_to(folder).as_posix()
        runs.append(Run(name=name, report=replace(report, settings=settings)))
    if not runs:
        found = "; ".join(unreadable) or "no run has written one"
        raise ValueError(f"There is no complete report.json below {folder}: {found}.")
    return Comparison(tuple(runs), tuple(unreadable))


def varying_settings(runs: Sequence[Run]) -> list[str]:
    """Return the dotted names of the settings that are not the same in all runs."""
    settings = [flatten(run.report.settings) for run in runs]
    names = dict.fromkeys(name for flat in settings for name in flat)
    return [name for name in names if any(flat.get(name) != settings[0].get(name) for flat in settings)]


def comparison_cells(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table: run, varying settings, metric, costs, ratios to the dense costs."""
    varying, metric = varying_settings(runs), common_metric(runs)
    header = ["#", "run", *short_names(varying), "metric" if metric is None else metric.name, "change", *COSTS]
    rows = []
    for number, run in enumerate(runs, start=1):
        dense, compressed = run.report.dense, run.report.compressed
        settings = flatten(run.report.settings)
        own = metric or run.report.tested
        rows.append(
            [
                str(number),
                run.name,
                *(str(settings.get(name, "-")) for name in varying),
                own.show(compressed.test_metric) if metric else f"{own.name} {own.show(compressed.test_metric)}",
                own.change(dense.test_metric, compressed.test_metric, word=False),
                f"{compressed.nonzero_parameters:,}",
                f"{compressed.file_bytes:,}",
                f"{dense.file_bytes / compressed.file_bytes:.1f}x",
                f"{compressed.latency_ms:.3f}",
                "busy" if run.report.busy else f"{dense.latency_ms / compressed.latency_ms:.2f}x",
            ]
        )
    return header, rows


def common_metric(runs: Sequence[Run]) -> Metric | None:
    """Return the metric that all runs were tested by; None where runs have different metrics."""
    first = runs[0].report
    if any((run.report.metric, run.report.metric_mode) != (first.metric, first.metric_mode) for run in runs):
        return None
    values = [network.test_metric for run in runs for network in (run.report.dense, run.report.compressed)]
    return Metric.of(first.metric or "not tested", values, mode=first.metric_mode)


def short_names(names: Sequence[str]) -> list[str]:
    """Shorten dotted names to their last parts, unless two names have the same last part.

    Example:
        >>> short_names(["seed", "callbacks.iterative_pruning.amount"])
        ['seed', 'amount']
    """
    last = [name.rpartition(".")[2] for name in names]
    return last if len(set(last)) == len(last) else list(names)


def runs_table(comparison: Comparison, *, width: int | None = None) -> Table:
    """Return the table for a rich console; its caption lists the reports that can't be read.

    Args:
        comparison: The runs.
        width: Width of the console in characters. A narrow console shows the ratios without the costs themselves.
    """
    header, rows = comparison_cells(comparison.runs)
    left_out = {"non-zeros", "bytes", "ms"} if width is not None and width < NARROW else set()
    caption = Text("\n".join(comparison.unreadable), style="red") if comparison.unreadable else None
    table = Table(title=f"{len(rows)} runs", title_style="bold", caption=caption, caption_justify="left")
    shown = [column for column, heading in enumerate(header) if heading not in left_out]
    for column in shown:
        # Metric and costs follow the settings. A number that is broken into two lines would be unreadable.
        number = column == 0 or column >= len(header) - len(COSTS) - 2
        table.add_column(header[column], justify="left" if column == 1 else "right", overflow="fold", no_wrap=number)
    for row in rows:
        # rich would read a run's name such as "[a,b]" in a plain string as markup.
        table.add_row(*(Text(row[column]) for column in shown))
    return table


def runs_markdown(comparison: Comparison) -> str:
    """Return the table of all columns in Markdown, and below it the reports that can't be read."""
    header, rows = comparison_cells(comparison.runs)
    lines = [f"# {len(rows)} runs", "", *markdown_table(header, rows), ""]
    if comparison.unreadable:
        lines += ["Not in the table:", "", *(f"- {reason}" for reason in comparison.unreadable), ""]
    return "\n".join(lines)


def runs_csv(comparison: Comparison) -> str:
    """Return one line per run with plain numbers: the settings that vary, the measurements, the techniques' numbers.

    The techniques' numbers are those of the last epoch.
    """
    varying = varying_settings(comparison.runs)
    measured = [name for name in Measurement.__dataclass_fields__ if name != "uncounted_operators"]
    last = [run.report.history[-1].numbers if run.report.history else {} for run in comparison.runs]
    named = list(dict.fromkeys(name for numbers in last for name in numbers))
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    header = [f"{network}.{name}" for network in ("dense", "compressed") for name in measured]
    writer.writerow(["run", *varying, *header, "before_recovery", *(f"last_epoch.{name}" for name in named)])
    for run, numbers in zip(comparison.runs, last, strict=True):
        settings, report = flatten(run.report.settings), run.report
        cells = [getattr(network, name) for network in (report.dense, report.compressed) for name in measured]
        cells += [report.before_recovery, *(numbers.get(name) for name in named)]
        writer.writerow([run.name, *(settings.get(name) for name in varying), *cells])
    return output.getvalue()


def runs_figure(comparison: Comparison) -> Figure:
    """Return the figure, which shows the test's metric against the size of the file and against the latency.

    The numbers of the points are those of the table. Runs with another metric than the first run are left out.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure(12, 4.8)
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    left, right = figure.subplots(1, 2, sharey=True)
    first = comparison.runs[0].report.metric
    runs = {number: run for number, run in enumerate(comparison.runs, start=1) if run.report.metric == first}
    metric = common_metric(list(runs.values())) or comparison.runs[0].report.tested
    if all(run.report.compressed.test_metric is None and run.report.dense.test_metric is None for run in runs.values()):
        for axes in (left, right):
            empty(axes, "no run was tested")
        return figure
    _scatter(left, runs, metric, "file_bytes", "file")
    left.set_xscale("log")
    left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.xaxis.set_major_formatter(EngFormatter(unit="B"))
    left.xaxis.set_minor_formatter(NullFormatter())
    left.set_ylabel(metric.label)
    left.set_title(f"{metric.name} against bytes of the file", loc="left", fontweight="bold")
    _scatter(right, runs, metric, "latency_ms", "latency (ms)")
    slowest = max(max(run.report.dense.latency_ms, run.report.compressed.latency_ms) for run in comparison.runs)
    right.set_xlim(0, 1.1 * slowest)  # an axis that does not begin at 0 would magnify the noise of equal latencies
    right.set_title(f"{metric.name} against latency", loc="left", fontweight="bold")
    right.legend(frameon=False, labelcolor=GREY, loc="best")
    return figure


def write_comparison(comparison: Comparison, folder: str | Path, *, figure: bool = True) -> list[Path]:
    """Write comparison.md, comparison.csv and comparison.png, and return their paths.

    Raises:
        ImportError: `figure` is True and matplotlib is not installed; the other files have been written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "comparison.md", folder / "comparison.csv"]
    write_text(paths[0], runs_markdown(comparison))
    write_text(paths[1], runs_csv(comparison))
    if figure:
        paths.append(folder / "comparison.png")
        write_figure(paths[2], runs_figure(comparison))
    return paths


def _scatter(axes: Axes, runs: Mapping[int, Run], metric: Metric, quantity: str, label: str) -> None:
    tidy(axes)
    axes.grid(axis="x", color=LIGHT, linewidth=0.8)
    axes.set_xlabel(label)
    dense, compressed = (
        {
            number: (getattr(one, quantity), metric.scaled(one.test_metric))
            for number, one in side
            if one.test_metric is not None
        }
        for side in (
            [(number, run.report.dense) for number, run in runs.items()],
            [(number, run.report.compressed) for number, run in runs.items()],
        )
    )
    _points(axes, sorted(set(dense.values())), label="dense", color="white", edgecolors=ORANGE, s=60, zorder=2)
    _points(axes, list(compressed.values()), label="compressed", color=BLUE, s=36, zorder=3)
    for number, place in compressed.items():
        axes.annotate(str(number), place, xytext=(5, 5), textcoords="offset points", fontsize=8.5, color=GREY)


def _points(axes: Axes, places: Sequence[tuple[float, float]], **style: Any) -> None:
    axes.scatter([x for x, _ in places], [y for _, y in places], **style)


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """Return a sort key that places run 10 after run 9."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in path.parts]
