"""The table of one run, which compares the dense and the compressed network, for the terminal and for report.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text

from lightning_compress.report.summary import Measurement, Point, Report

HEADER = ("", "dense", "before recovery", "compressed", "compressed against dense")
CLOCK_NOISE = 0.05  # relative; medians of the same network, timed twice on an idle machine, differ by less


def percent(share: float | None) -> str:
    """Return a share in per cent with two decimals, or a dash.

    Example:
        >>> percent(0.98611), percent(None)
        ('98.61 %', '-')
    """
    return "-" if share is None else f"{100 * share:.2f} %"


def factor(before: float, after: float, *, better: str, worse: str, noise: float = 0.0) -> str:
    """Return in words by which factor a quantity has become smaller or larger.

    Args:
        before: The positive quantity.
        after: The same quantity later.
        better: Word for a smaller quantity, such as "faster".
        worse: Word for a larger quantity, such as "slower".
        noise: Relative difference that is insignificant.

    Example:
        >>> factor(1200, 100, better="smaller", worse="larger"), factor(2.0, 3.0, better="faster", worse="slower")
        ('12.0x smaller', '1.50x slower')
        >>> factor(2.0, 2.02, better="faster", worse="slower", noise=0.05)
        'about the same'
    """
    if before == after:
        return "the same"
    if after == 0:
        return "nothing left"
    ratio, word = (before / after, better) if after < before else (after / before, worse)
    if ratio <= 1 + noise:
        return "about the same"
    return f"{ratio:.1f}x {word}" if ratio >= 1.95 else f"{ratio:.2f}x {word}"


def comparison_rows(report: Report) -> list[tuple[str, str, str, str, str]]:
    """Return the rows below `HEADER`, whose first column has the quantity with its unit.

    The techniques' own numbers, such as the sparsity, follow the measured quantities, as the last epoch has them.
    """
    dense, compressed = report.dense, report.compressed
    metric = report.tested
    values = (dense.test_metric, report.before_recovery, compressed.test_metric)
    change = metric.change(dense.test_metric, compressed.test_metric)
    rows = [(metric.name, metric.show(values[0]), metric.show(values[1]), metric.show(values[2]), change)]
    for label, name, show, better, worse in [
        ("parameters", "parameters", "{:,}", "fewer", "more"),
        ("non-zero parameters", "nonzero_parameters", "{:,}", "fewer", "more"),
        ("MACs per sample", "macs", "{:,}", "fewer", "more"),
        ("file (bytes)", "file_bytes", "{:,}", "smaller", "larger"),
        ("latency (ms)", "latency_ms", "{:,.3f}", "faster", "slower"),
        ("peak memory (bytes)", "peak_memory_bytes", "{:,}", "less", "more"),
    ]:
        before, after = getattr(dense, name), getattr(compressed, name)
        if before is None or after is None:
            continue
        noise = CLOCK_NOISE if name == "latency_ms" else 0.0
        ratio = factor(before, after, better=better, worse=worse, noise=noise)
        if name == "latency_ms" and report.busy:
            ratio = "the machine was busy"
        rows.append((label, show.format(before), "", show.format(after), ratio))
    numbers = report.history[-1].numbers if report.history else {}
    return rows + [(f"{name} (last epoch)", "", "", f"{value:.4g}", "") for name, value in numbers.items()]


def notes(report: Report) -> list[str]:
    """Return the notes below the table, which prevent wrong conclusions from its numbers."""
    dense, compressed = report.dense, report.compressed
    sentences = []
    if compressed.nonzero_parameters < dense.nonzero_parameters and dense.macs == compressed.macs:
        sentences.append(
            "Zeros that stay in the tensors make the file smaller; dense kernels still multiply by them,"
            " so MACs and latency stay."
        )
    if report.busy:
        spread = max(dense.latency_spread, compressed.latency_spread)
        sentences.append(
            "The machine was busy while the networks were timed in turns: the latencies moved too much to be compared"
            f" (the middle half of the timed passes spans {spread:.0%} of their median)."
        )
    if uncounted := _uncounted([dense, compressed]):
        sentences.append(f"MACs leave out operators that torch's counter has no formula for: {', '.join(uncounted)}.")
    return sentences


def comparison_table(report: Report, *, title: str | None = "dense beside compressed") -> Table:
    """Return the table for a rich console, with the notes as its caption."""
    caption = Text("\n".join(notes(report))) if notes(report) else None
    table = Table(title=title, title_style="bold", caption=caption, caption_justify="left")
    table.add_column(HEADER[0])
    for heading in HEADER[1:]:
        table.add_column(heading, justify="right", style="bold" if heading == "compressed" else None)
    for *cells, ratio in comparison_rows(report):
        table.add_row(*cells, Text(ratio, style=_style(ratio)))
    return table


POINTS_HEADER = ("", "test", "MACs per sample", "latency (ms)", "time against dense", "file (bytes)")


VARIANTS_HEADER = ("", "test", "non-zero parameters", "MACs per sample", "epochs", "file (bytes)")


def variants_rows(report: Report) -> list[tuple[str, ...]]:
    """Return the rows below `VARIANTS_HEADER`: the dense and the compressed network, and the other ways to compress.

    There are none where the run has compressed in one way only.
    """
    if not any(point.kind == "variant" for point in report.points):
        return []
    metric = report.tested
    return [
        (
            _readable(report.called if _is_own(point) else point.name),
            metric.show(point.test_metric),
            *("" if one is None else f"{one:,.0f}" for one in (point.nonzero_parameters, point.macs, point.epochs)),
            "" if point.file_bytes is None else f"{point.file_bytes:,.0f}",
        )
        for point in report.points
        if _is_own(point) or point.kind in ("dense", "variant")
    ]


VARIANTS_NOTE = "Epochs are those of a network's own fit. One seed: differences of a few test samples are chance."


def variants_table(report: Report) -> Table:
    """Return the table of the ways to compress, for a rich console."""
    return _table(
        "ways to compress, from the same start and seed", VARIANTS_HEADER, variants_rows(report), [VARIANTS_NOTE]
    )


def _is_own(point: Point) -> bool:
    """Return whether this is the compressed network as a whole."""
    return point.kind == "point" and point.name == "compressed"


def _readable(name: str) -> str:
    """Return the name of a variant in a config as words, which a narrow console can break."""
    return name.replace("_", " ")


def points_rows(report: Report) -> list[tuple[str, str, str, str, str, str]]:
    """Return the rows below `POINTS_HEADER`: the dense network, the ways to run the compressed one, the controls.

    There are none where the compressed network can be run in one way only and there is no control.
    """
    if all(_is_own(point) or point.kind in ("dense", "variant") for point in report.points):
        return []
    dense = next((one.latency_ms for one in report.points if one.kind == "dense"), None)
    metric = report.tested
    return [
        (
            f"{point.name} (trained alone)" if point.kind == "control" else point.name,
            metric.show(point.test_metric),
            f"{point.macs:,.0f}",
            f"{point.latency_ms:,.3f}",
            "" if dense is None else f"{point.latency_ms / dense:.2f}",
            "" if point.file_bytes is None else f"{point.file_bytes:,.0f}",
        )
        for point in report.points
        if point.kind != "variant"
    ]


def points_notes(report: Report) -> list[str]:
    """Return the note below the ways to run the network: one file beside those of the networks trained alone."""
    alone = [one.file_bytes for one in report.points if one.kind == "control" and one.file_bytes is not None]
    if not alone:
        return []
    one, together = report.compressed.file_bytes, sum(alone)
    files = "file" if len(alone) == 1 else f"{len(alone)} files"
    return [
        f"The compressed network has one file of {one:,} bytes for all ways to run it; the {files} of what was trained "
        f"alone {'has' if len(alone) == 1 else 'have'} {together:,.0f} bytes, {together / one:.2f} times as many."
    ]


def points_table(report: Report) -> Table:
    """Return the table of the ways to run the compressed network, for a rich console."""
    return _table("ways to run the network", POINTS_HEADER, points_rows(report), points_notes(report))


def _table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]], said: Sequence[str]) -> Table:
    caption = Text("\n".join(said)) if said else None
    table = Table(title=title, title_style="bold", title_justify="left", caption=caption, caption_justify="left")
    for i, heading in enumerate(header):
        table.add_column(heading, justify="right" if i else "left", overflow="fold")  # cut, names could be the same
    for row in rows:
        table.add_row(*row)
    return table


def report_markdown(report: Report) -> str:
    """Return the content of report.md: the table with its notes, the layers, and the settings."""
    lines = ["# Dense beside compressed", "", *markdown_table(HEADER, comparison_rows(report)), ""]
    lines += [line for note in notes(report) for line in (note, "")]
    if rows := variants_rows(report):
        lines += ["## Ways to compress, from the same start and seed", ""]
        lines += [*markdown_table(VARIANTS_HEADER, rows), "", VARIANTS_NOTE, ""]
    if points_rows(report):
        lines += ["## Ways to run the network", "", *markdown_table(POINTS_HEADER, points_rows(report)), ""]
        lines += [line for note in points_notes(report) for line in (note, "")]
    lines += ["## What is left of each layer", ""]
    if report.layers:
        header = ("layer", "parameters", "non-zero, dense", "non-zero, compressed", "left")
        rows = [
            (
                f"`{layer.name}`",
                f"{layer.parameters:,}",
                f"{layer.nonzero_dense:,}",
                f"{layer.nonzero_compressed:,}",
                percent(layer.nonzero_compressed / layer.parameters),
            )
            for layer in report.layers
        ]
        lines += [*markdown_table(header, rows), ""]
    else:
        lines += ["The compressed network has layers of its own, which are not compared with the dense ones.", ""]
    if report.settings:
        pairs = [(f"`{key}`", f"`{value}`") for key, value in flatten(report.settings).items()]
        lines += ["## Settings", "", *markdown_table(("setting", "value"), pairs, right=False), ""]
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, right: bool = True) -> list[str]:
    """Return the lines of a Markdown table; `right` aligns all columns but the first to the right.

    Example:
        >>> markdown_table(("a", "b"), [("x", "1")])
        ['| a | b |', '|---|--:|', '| x | 1 |']
    """
    rule = "|---|" + ("--:|" if right else "---|") * (len(header) - 1)
    lines = (" | ".join(cell.replace("|", "\\|") for cell in cells) for cells in [header, *rows])
    first, *rest = (f"| {line} |" for line in lines)
    return [first, rule, *rest]


def flatten(settings: dict[str, object], prefix: str = "") -> dict[str, object]:
    """Return nested settings under dotted names.

    Example:
        >>> flatten({"seed": 0, "callbacks": {"iterative_pruning": {"amount": 0.9}}})
        {'seed': 0, 'callbacks.iterative_pruning.amount': 0.9}
    """
    flat: dict[str, object] = {}
    for key, value in settings.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _uncounted(measurements: Iterable[Measurement]) -> list[str]:
    return sorted({name for measurement in measurements for name in measurement.uncounted_operators})


def _style(ratio: str) -> str:
    if ratio.endswith(("fewer", "smaller", "faster", "less", "(better)")):
        return "green"
    return "red" if ratio.endswith(("more", "larger", "slower", "(worse)")) else ""
