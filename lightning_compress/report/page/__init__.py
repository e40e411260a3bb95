"""report.html: one self-contained page for a run, or for the comparison of many runs."""

from lightning_compress.report.page.write import (
    can_write_page,
    comparison_page,
    report_page,
    write_comparison_page,
    write_report_page,
)

__all__ = ["can_write_page", "comparison_page", "report_page", "write_comparison_page", "write_report_page"]
