"""The whole page of a run and of a comparison, and the writing of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import cache
from html import escape
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

from lightning_compress.report.compare import Comparison, Run
from lightning_compress.report.metric import Metric
from lightning_compress.report.page.charts import CONFIG, COSTS, kinds_of, trade_off
from lightning_compress.report.page.elements import HERE, chart, document, json_text, legend, listed, text
from lightning_compress.report.page.points import Place, best, in_frame, places
from lightning_compress.report.page.runs import recipes, runs_table, tested_by
from lightning_compress.report.page.sections import sections, settings, techniques, tiles
from lightning_compress.report.summary import Report
from lightning_compress.report.write import write_text

log = logging.getLogger(__name__)

PAGE = "report.html"
LARGEST = 1_900_000  # bytes of a page; what a comparison says about single runs gets what the rest leaves


def can_write_page() -> bool:
    """Return whether the drawing library is installed; where it is not, a warning says what to install."""
    found = find_spec("vl_convert") is not None
    if not found:
        log.warning("No %s is written without vl-convert-python: pip install 'lightning-compress[page]'.", PAGE)
    return found


def write_report_page(report: Report, folder: str | Path) -> Path:
    """Write report.html of one run, and return its path.

    Raises:
        ImportError: vl-convert-python is not installed; the message names the extra that installs it.
    """
    return _write(report_page(report), folder)


def write_comparison_page(comparison: Comparison, folder: str | Path) -> Path:
    """Write report.html of many runs, and return its path.

    Raises:
        ImportError: vl-convert-python is not installed; the message names the extra that installs it.
    """
    found = [run.name for run in comparison.runs if run.name != "." and (Path(folder) / run.name / PAGE).is_file()]
    return _write(comparison_page(comparison, own_pages=found), folder)


def report_page(report: Report) -> str:
    """Return the page of one run."""
    run = (1, Run(".", report), report.command or ", ".join(techniques(report)))
    title = " + ".join(techniques(report)) or "Dense beside compressed"
    body = [f"<header><p>One run</p><h1>{text(title)}</h1></header>", tiles(report)]
    body += _charts(places([run]), report.tested, single=True)
    body += [*sections(report), settings(report)]
    return document(title, body, _scripts())


def comparison_page(comparison: Comparison, *, own_pages: Sequence[str] = ()) -> str:
    """Return the page of many runs.

    Args:
        comparison: The runs.
        own_pages: Names of the runs whose folders have a page, to which this one links.
    """
    metric, tested, others = tested_by(comparison.runs)
    recipe = recipes(comparison.runs)
    known = [(number, run, recipe[number - 1]) for number, run in tested]
    title = "1 run" if len(comparison.runs) == 1 else f"{len(comparison.runs)} runs"
    shown = places(known)
    first = best(known, metric)
    body = [f"<header><p>Comparison</p><h1>{title}</h1></header>", *_charts(shown, metric, single=False)]
    body += [
        '<h2 id="all">All runs</h2>',
        '<p class="hint">Click on a heading to sort, and on a run or a point to see its layers below.</p>',
        runs_table(comparison.runs, metric),
        f'<section id="chosen" data-run="{first}" aria-live="polite"></section>',
    ]
    room = LARGEST - len("".join([*body, *_scripts(), *others]).encode())
    details, left_out = _details(comparison.runs, first, own_pages, room)
    body += details
    if said := [*others, *left_out, *comparison.unreadable]:
        body += ["<h2>What is not shown</h2>", listed(said)]
    return document(f"{title} compared", body, _scripts())


def _charts(shown: Sequence[Place], metric: Metric, *, single: bool) -> Iterator[str]:
    yield f"<h2>{escape(metric.name)} against what the network costs</h2>"
    if not shown:
        yield "<p>Nothing was tested, so there is nothing to draw against the costs.</p>"
        return
    everything, shown = shown, list(shown) if single else in_frame(shown, metric.mode)
    yield legend(kinds_of(shown), front=metric.mode is not None)
    drawn = []
    for cost, (name, _, _) in COSTS.items():
        if any(getattr(one, cost) is not None for one in shown):
            drawn.append(chart(trade_off(shown, cost, metric, single=single), name))
    yield f'<div class="charts three">{"".join(drawn)}</div>'
    said = []
    if metric.mode is None:
        said.append(f"It is unknown whether more {metric.name} is better: metric_mode=max or min draws the front.")
    if any(one.latency_ms is None for one in shown):
        said.append("The latencies of runs on a busy machine are left out.")
    if outside := len(everything) - len(shown):
        said.append(f"Far worse than the others, and outside the charts: {outside} of {len(everything)} networks.")
    if said:
        yield f'<p class="hint">{escape(" ".join(said))}</p>'


def _details(runs: Sequence[Run], first: int, own_pages: Sequence[str], room: int) -> tuple[list[str], list[str]]:
    """Return one template for each run, which a script shows when the run is chosen, and what had to be left out.

    Args:
        runs: The runs.
        first: Number of the run that comes first, from 1.
        own_pages: Names of the runs whose folders have a page.
        room: Bytes that the templates may have.
    """
    found, left_out = [], []
    for number, run in sorted(enumerate(runs, start=1), key=lambda one: one[0] != first):
        link = f' <a href="{quote(run.name)}/{PAGE}">its own page</a>' if run.name in own_pages else ""
        link += ' <a href="#all">all runs</a>'
        title = f'<h2><span class="number">Run {number}</span> {text(run.name)}{link}</h2>'
        content = "".join([title, tiles(run.report), *sections(run.report)])
        size = len(content.encode())
        if size > room:
            left_out.append(f"{number} {run.name}")
            content = f"{title}<p>This page would be too large with the layers of this run, which report.json has.</p>"
            size = len(content.encode())
        room -= size
        found.append(f'<template id="run-{number}">{content}</template>')
    if left_out:
        few = ", ".join(left_out[:5]) + (f", and {len(left_out) - 5} more" if len(left_out) > 5 else "")
        left_out = [f"Layers and epochs of {len(left_out)} runs, which would make this page too large: {few}."]
    return found, left_out


def _scripts() -> list[str]:
    return [_library(), (HERE / "page.js").read_text(encoding="utf-8").replace("CONFIG", json_text(CONFIG))]


@cache
def _library() -> str:
    """Return Vega, Vega-Lite and vega-embed, which vl-convert-python carries and bundles without a network."""
    try:
        library = import_module("vl_convert")
    except ImportError as error:
        raise ImportError(
            f"{PAGE} is drawn with Vega, and vl-convert-python, which carries it, is not installed: "
            "pip install 'lightning-compress[page]'."
        ) from error
    bundle: str = library.javascript_bundle()
    return bundle.replace("</script", "<\\/script")


def _write(page: str, folder: str | Path) -> Path:
    path = Path(folder) / PAGE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return path
