"""The sections of a page that belong to one run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from lightning_compress.report.page.charts import over_epochs
from lightning_compress.report.page.elements import chart, command, listed, table, text
from lightning_compress.report.summary import Layer, Report
from lightning_compress.report.tables import (
    HEADER,
    POINTS_HEADER,
    VARIANTS_HEADER,
    VARIANTS_NOTE,
    comparison_rows,
    flatten,
    notes,
    percent,
    points_notes,
    points_rows,
    variants_rows,
)

TILES = ("file (bytes)", "MACs per sample", "latency (ms)")


def techniques(report: Report) -> list[str]:
    """Return the names of the run's techniques, as its settings have them."""
    named = []
    for section in ("callbacks", "wrappers"):
        nodes = report.settings.get(section)
        for name, node in nodes.items() if isinstance(nodes, dict) else ():
            target = node.get("_target_", "") if isinstance(node, dict) else ""
            if str(target).startswith("lightning_compress."):
                named.append(str(name))
    return named


def tiles(report: Report) -> str:
    """Return the most important numbers: what compression cost, and what it saved."""
    metric, *others = comparison_rows(report)
    costs = {row[0]: row for row in others}
    items = []
    for label, before, _, after, change in [metric, *(costs[name] for name in TILES if name in costs)]:
        amount, bracket, verdict = change.partition(" (")
        items.append(
            f"<div><dt>{text(label)}</dt><dd><b>{escape(amount)}</b>"
            f"<small>{escape(f'{before} → {after}{bracket}{verdict}')}</small></dd></div>"
        )
    return f'<dl class="tiles">{"".join(items)}</dl>'


def sections(report: Report) -> Iterator[str]:
    """Return what a page says about one run, below its headline."""
    yield "<h3>Dense beside compressed</h3>"
    yield table(HEADER, comparison_rows(report))
    if rows := variants_rows(report):
        yield "<h3>Ways to compress, from the same start and seed</h3>"
        yield table(VARIANTS_HEADER, rows)
        yield listed([VARIANTS_NOTE])
    if points_rows(report):
        yield "<h3>Ways to run the network</h3>"
        yield table(POINTS_HEADER, points_rows(report))
        yield listed(points_notes(report))
    if charts := over_epochs(report.history, report.validated):
        yield "<h3>Over the epochs</h3>"
        yield f'<div class="charts two">{"".join(chart(spec, title) for title, spec in charts.items())}</div>'
    yield "<h3>What is left of each layer</h3>"
    yield _layers(report.layers)
    if said := [*notes(report), *unmeasured(report)]:
        yield "<h3>What could not be measured, and what to mind</h3>"
        yield listed(said)
    yield "<h3>The command that repeats it</h3>"
    yield command(report.command)


def unmeasured(report: Report) -> list[str]:
    """Return what the report lacks, besides what `notes` say."""
    said = []
    if report.metric is None:
        said.append("Nothing was tested (metric=null), so no quality stands beside the costs.")
    else:
        for name, one in (("dense", report.dense), ("compressed", report.compressed)):
            if one.test_metric is None:
                said.append(f"The test of the {name} network gave no finite {report.metric}.")
        said += [
            f"The test of {point.name!r} gave no finite {report.metric}."
            for point in report.points
            if point.test_metric is None
        ]
    if not report.history:
        said.append("No epoch was recorded.")
    elif all(one.val_metric is None for one in report.history):
        said.append(f"No epoch has a {report.val_metric}: the validation did not log it, or it was not finite.")
    elif missing := sum(one.val_metric is None for one in report.history):
        said.append(f"{missing} of {len(report.history)} epochs have no {report.val_metric}.")
    if report.before_recovery is None and report.metric is not None:
        said.append("The network was not tested before recovery: no technique came to an end before the training did.")
    if report.compressed.peak_memory_bytes is None:
        said.append("The peak of the memory was not measured.")
    return said


def settings(report: Report) -> str:
    """Return the settings, folded."""
    if not report.settings:
        return ""
    rows = [(key, str(value)) for key, value in flatten(report.settings).items()]
    listing = table(("setting", "value"), rows, text_columns=2)
    return f"<details><summary>All {len(rows)} settings</summary>{listing}</details>"


def _layers(layers: Sequence[Layer]) -> str:
    if not layers:
        return "<p>The compressed network has layers of its own, which are not compared with the dense ones.</p>"
    kept, total = sum(layer.nonzero_compressed for layer in layers), sum(layer.parameters for layer in layers)
    together = Layer("together", total, sum(layer.nonzero_dense for layer in layers), kept)
    rows = []
    for layer in [*layers, together]:
        share = layer.nonzero_compressed / layer.parameters
        last = ' class="sum"' if layer is together else ""
        rows.append(
            f'<tr{last}><td class="text name">{text(layer.name)}</td><td>{layer.parameters:,}</td>'
            f"<td>{layer.nonzero_compressed:,}</td><td>{percent(share)}</td>"
            f'<td class="bar"><i style="width:{100 * share:.4g}%"></i></td></tr>'
        )
    head = "<th>parameters</th><th>not zero</th><th>left</th><th></th>"
    return (
        f'<div class="scroll"><table class="layers"><thead><tr><th class="text">layer</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
