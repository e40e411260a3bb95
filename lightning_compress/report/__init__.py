"""Reports of one run, and comparisons of many: JSON, tables and figures."""

from lightning_compress.report.compare import Comparison, Run, gather, runs_figure, runs_table, write_comparison
from lightning_compress.report.figure import report_figure
from lightning_compress.report.summary import Epoch, Layer, Measurement, Point, Report, compare_layers
from lightning_compress.report.tables import comparison_table, points_table, report_markdown, variants_table
from lightning_compress.report.write import write_report

__all__ = [
    "Comparison",
    "Epoch",
    "Layer",
    "Measurement",
    "Point",
    "Report",
    "Run",
    "compare_layers",
    "comparison_table",
    "gather",
    "points_table",
    "report_figure",
    "report_markdown",
    "runs_figure",
    "runs_table",
    "variants_table",
    "write_comparison",
    "write_report",
]
