"""Writing a run's report into its folder: each file is replaced as a whole, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_compress.core.files import replacing
from lightning_compress.report.figure import report_figure
from lightning_compress.report.summary import Report
from lightning_compress.report.tables import report_markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_report(report: Report, folder: str | Path, *, figure: bool = True) -> list[Path]:
    """Write report.json, report.md and report.png, and return their paths.

    Args:
        report: The report of the run.
        folder: Folder of the files, which is created if necessary.
        figure: Whether to draw report.png, which needs matplotlib.

    Raises:
        ImportError: `figure` is True and matplotlib is not installed; report.json and report.md have been written.
        ValueError: The report contains a number that JSON cannot express (NaN, infinity).
        TypeError: The settings contain an object that JSON cannot express.

    Example:
        >>> import tempfile
        >>> from lightning_compress.report import Measurement
        >>> dense = Measurement(0.98, 100, 100, 100, 400, 1.0)
        >>> paths = write_report(Report(dense=dense, compressed=dense), tempfile.mkdtemp(), figure=False)
        >>> [path.name for path in paths]
        ['report.json', 'report.md']
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "report.json", folder / "report.md"]
    write_text(paths[0], json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n")
    write_text(paths[1], report_markdown(report))
    if figure:
        paths.append(folder / "report.png")
        write_figure(paths[2], report_figure(report))
    return paths


def write_text(path: Path, text: str) -> None:
    """Write a text file as a whole, or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_figure(path: Path, figure: Figure) -> None:
    """Write a PNG file as a whole, or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
