"""The table of all runs of a comparison, and what distinguishes them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from html import escape

from lightning_compress.report.compare import Run, common_metric, short_names, varying_settings
from lightning_compress.report.metric import Metric
from lightning_compress.report.page.elements import text
from lightning_compress.report.page.points import MANY
from lightning_compress.report.page.sections import techniques
from lightning_compress.report.tables import flatten

Cell = tuple[str, float | str | None]  # the text, and the value by which it is sorted


def tested_by(runs: Sequence[Run]) -> tuple[Metric, list[tuple[int, Run]], list[str]]:
    """Return the first run's metric, the numbered runs that were tested by it, and a sentence about the others."""
    first = runs[0].report
    numbered = list(enumerate(runs, start=1))
    same = [(i, run) for i, run in numbered if run.report.metric == first.metric]
    metric = common_metric([run for _, run in same]) or first.tested
    others = [
        f"Run {i} {run.name} was {f'tested by {run.report.metric}' if run.report.metric else 'not tested'}, and is in "
        f"the table only."
        for i, run in numbered
        if run.report.metric != first.metric
    ]
    untested = [
        f"The test of run {i} {run.name} gave no finite {first.metric}."
        for i, run in same
        if first.metric is not None and run.report.compressed.test_metric is None
    ]
    return metric, same, others + untested


def recipes(runs: Sequence[Run]) -> list[str]:
    """Return what distinguishes each run: its settings that vary, or if these are many, its words on the command line.

    A run without a command line has the names of its techniques instead.
    """
    varying = varying_settings(runs)
    if len(varying) > MANY or not varying:
        words = [shlex.split(run.report.command or "") for run in runs]
        shared = set.intersection(*map(set, words)) if len(runs) > 1 else {"lightning-compress"}
        own = [" ".join(word for word in line if word not in shared) for line in words]
        return [line or " + ".join(techniques(run.report)) for line, run in zip(own, runs, strict=True)]
    pairs = list(zip(varying, short_names(varying), strict=True))
    flat = [flatten(run.report.settings) for run in runs]
    return [", ".join(f"{short}={one[name]}" for name, short in pairs if name in one) for one in flat]


def runs_table(runs: Sequence[Run], metric: Metric) -> str:
    """Return the table of all runs, which a script sorts."""
    varying = varying_settings(runs)
    varying = varying if len(varying) <= MANY else []
    names = short_names(varying) if varying else ["recipe"] if len(runs) > 1 else []
    header = ["#", "run", *names, metric.name, "change", "not zero", "MACs", "file (bytes)", "smaller", "ms", "faster"]
    recipe, words = recipes(runs), 1 + (names == ["recipe"])  # columns of text
    rows = []
    for number, run in enumerate(runs, start=1):
        flat = flatten(run.report.settings)
        own: list[Cell] = [(str(flat.get(name, "-")), _sortable(flat.get(name))) for name in varying]
        if names == ["recipe"]:
            own = [(recipe[number - 1], recipe[number - 1])]
        cells = [(run.name, run.name), *own, *_measured(run, metric)]
        button = f'<button type="button" data-run="{number}">{number}</button>'
        line = f'<td data-value="{number}">{button}</td>'
        for column, (shown, value) in enumerate(cells, start=1):
            left = ' class="text"' if column <= words else ""
            sortable = "" if value is None else escape(str(value), quote=True)
            line += f'<td{left} data-value="{sortable}">{text(shown) if left else escape(shown)}</td>'
        rows.append(f'<tr data-run="{number}">{line}</tr>')
    longest = min(max(len(run.name) for run in runs), 22)
    left = f' class="text" style="min-width:{longest + 3}ch"'
    heads = "".join(
        f'<th{left if 1 <= column <= words else ""}><button type="button">{escape(name)}</button></th>'
        for column, name in enumerate(header)
    )
    return (
        f'<div class="scroll all"><table class="runs"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _measured(run: Run, metric: Metric) -> list[Cell]:
    report = run.report
    dense, compressed, same = report.dense, report.compressed, report.metric == metric.name or report.metric is None
    own = metric if same else report.tested
    value = compressed.test_metric
    change = None if value is None or dense.test_metric is None else value - dense.test_metric
    faster = dense.latency_ms / compressed.latency_ms
    smaller = dense.file_bytes / compressed.file_bytes
    return [
        (own.show(value) if same else f"{own.name} {own.show(value)}", value),
        (own.change(dense.test_metric, value, word=False), change),
        (f"{compressed.nonzero_parameters:,}", compressed.nonzero_parameters),
        (f"{compressed.macs:,}", compressed.macs),
        (f"{compressed.file_bytes:,}", compressed.file_bytes),
        (f"{smaller:.1f}x", smaller),
        (f"{compressed.latency_ms:.3f}", compressed.latency_ms),
        ("busy", None) if report.busy else (f"{faster:.2f}x", faster),
    ]


def _sortable(value: object) -> float | str | None:
    return value if isinstance(value, (int, float)) else None if value is None else str(value)
